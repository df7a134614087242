# SPDX-License-Identifier: BSD-2-Clause
"""``pyskl run``: a program started with listening sockets that a dispatcher steers to, and gone with it.

The program gets its sockets as a service of systemd does (sd_listen_fds(3)), or one connection as its standard input
and output, as inetd gave it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from pyskl.enums import Protocol
from pyskl.systemd import LISTEN_FDS_START

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pyskl.address import Address
    from pyskl.binding import Binding

PASSED_ON: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
MAX_CONNECTIONS: Final = 64  # as MaxConnections= of systemd.socket(5)
_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_SI_KERNEL: Final = 0x80  # si_code of a signal that the terminal sent to the whole process group
_BACKLOG: Final = 4096


class Listener(NamedTuple):
    """A socket for the program.

    Attributes:
        protocol: TCP or UDP.
        sock: the socket: TCP listens, UDP is bound.
    """

    protocol: Protocol
    sock: socket.socket


@contextlib.contextmanager
def listeners(bindings: Iterable[Binding], address: Address | None = None) -> Iterator[list[Listener]]:
    """Open a socket for each protocol of some bindings, of the family that they need, or of both.

    Where no address is given it is bound to a free port of the loopback address, so that nothing but what is steered
    reaches it from elsewhere. One for both families is bound to 127.0.0.1 as IPv6 writes it, which leaves it
    dual-stack, and is steered IPv6 to all the same.

    Raises:
        ValueError: a socket that is bound to the address can't take what is for one of the families.
        OSError: it can't be bound.
    """
    families: dict[Protocol, set[int]] = {}
    for binding in bindings:
        families.setdefault(binding.protocol, set()).add(binding.prefix.version)
    with contextlib.ExitStack() as opened:
        yield [Listener(of, _listener(of, versions, address, opened)) for of, versions in families.items()]


def _listener(
    protocol: Protocol, versions: set[int], address: Address | None, opened: contextlib.ExitStack
) -> socket.socket:
    if address is None:
        address = "::ffff:127.0.0.1" if len(versions) > 1 else "::1" if 6 in versions else "127.0.0.1", 0
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == Protocol.TCP else socket.SOCK_DGRAM
    sock = opened.enter_context(socket.socket(family, kind))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, protocol == Protocol.TCP)  # one that ended just now
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 4 not in versions)
    try:
        sock.bind(address)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "{}:{}".format(*address)) from None
    if 6 in versions and family == socket.AF_INET:
        raise ValueError(f"a socket that is bound to {address[0]} takes no IPv6")
    if 4 in versions and family == socket.AF_INET6 and sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        raise ValueError(f"a socket that is bound to {address[0]} takes no IPv4")
    if protocol == Protocol.TCP:
        sock.listen(_BACKLOG)
    return sock


def check_command(name: str) -> None:
    """Look whether there is such a program.

    Raises:
        ValueError: there is none, or it can't be executed.
    """
    if shutil.which(name) is None:
        raise ValueError(f"there is no program {name!r} that can be executed")


# --- a program that takes LISTEN_FDS ----------------------------------------------------------------------------------


def start(command: Sequence[str], inherit: Sequence[Listener], environ: Mapping[str, str]) -> int:
    """Start a program that inherits these sockets, and tell its process's id.

    Its ``LISTEN_PID`` is its own, which nobody knows before there is the process: so it is set between fork(2) and
    execve(2). It starts with the mask of signals that this process had before `signals_blocked`.

    Raises:
        OSError: the program can't be executed.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _become(command, inherit, environ, writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    if said:
        os.waitpid(pid, 0)
        number = int(said)
        raise OSError(number, os.strerror(number), command[0])
    return pid


def _become(command: Sequence[str], inherit: Sequence[Listener], environ: Mapping[str, str], writer: int) -> NoReturn:
    """Be the program, in the new process; or say why not, and end."""
    try:
        fds = [listener.sock.fileno() for listener in inherit]
        # Out of the way first, of each other and of the pipe.
        room = LISTEN_FDS_START + len(fds)
        fds, writer = [_above(fd, room) for fd in fds], _above(writer, room)
        for place, fd in enumerate(fds):
            os.dup2(fd, LISTEN_FDS_START + place)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # which Python ignores
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _handled())
        names = ":".join(listener.protocol.name.lower() for listener in inherit)
        activation = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
        os.execvpe(command[0], list(command), {**environ, **activation})  # noqa: S606 - that is what it is for
    except OSError as error:
        os.write(writer, b"%d" % (error.errno or 0))
    finally:
        os._exit(127)


def _above(fd: int, room: int) -> int:
    """Duplicate an fd to a number that is not in the way."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, room)


def _handled() -> set[signal.Signals]:
    return {signal.SIGCHLD, *PASSED_ON}


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Keep the signals that are passed on, and that of a child's end, waiting for `supervise`."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores it has no children to wait for
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _handled())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, before)


def supervise(pid: int) -> int:
    """Wait for a child, pass signals on to it, and give its status: 128 and the number of the signal that ended it.

    What the terminal sent (Ctrl-C) has reached it already, and is not sent again.
    """
    while True:
        arrived = signal.sigwaitinfo(_handled())
        if arrived.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return _status(os.waitstatus_to_exitcode(status))
        elif arrived.si_code != _SI_KERNEL:
            os.kill(pid, arrived.si_signo)


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


# --- a program for each connection ------------------------------------------------------------------------------------


def serve(command: Sequence[str], sock: socket.socket, environ: Mapping[str, str], limit: int) -> int:
    """Start the program for each connection, which it has as its standard input and output, until a signal ends it.

    The programs are in sessions of their own, and get the signal too; it returns when all have ended.

    Args:
        command: the program and its arguments.
        sock: a listening socket.
        environ: for the programs, which get ``REMOTE_ADDR`` and ``REMOTE_PORT`` beside it.
        limit: how many there may be at a time; more clients wait.

    Returns:
        128 and the number of the signal.
    """
    children: set[subprocess.Popen[bytes]] = set()
    ended = 0
    sock.setblocking(False)
    with _waking(*_ENDING, signal.SIGCHLD) as (wakeups, arrived), selectors.DefaultSelector() as selector:
        selector.register(wakeups, selectors.EVENT_READ)
        selector.register(sock, selectors.EVENT_READ)
        while not ended or children:
            for key, _ in selector.select():
                if key.fileobj is sock:
                    _accept(command, sock, environ, children)
            for number in arrived():
                if number != signal.SIGCHLD:
                    ended = ended or number
                    for child in children:
                        child.send_signal(number)
            children -= {child for child in children if child.poll() is not None}
            taking = not ended and len(children) < limit
            if taking and sock not in selector.get_map():
                selector.register(sock, selectors.EVENT_READ)
            elif not taking and sock in selector.get_map():
                selector.unregister(sock)
    return 128 + ended


def _accept(
    command: Sequence[str],
    sock: socket.socket,
    environ: Mapping[str, str],
    children: set[subprocess.Popen[bytes]],
) -> None:
    try:
        connection, (host, port, *_) = sock.accept()
    except OSError:  # it went away, or there is no fd left: the next one is tried
        return
    with connection:
        connection.setblocking(True)
        remote = {"REMOTE_ADDR": host.removeprefix("::ffff:"), "REMOTE_PORT": str(port)}
        fd = connection.fileno()
        try:  # reaped by `serve`, which SIGCHLD tells of its end
            child = subprocess.Popen(  # noqa: S603 - the user's own command
                command, stdin=fd, stdout=fd, env={**environ, **remote}, start_new_session=True
            )
        except OSError as error:  # this client's loss, and not the others'
            print(f"pyskl run: {error.strerror}: {command[0]!r}", file=sys.stderr, flush=True)  # noqa: T201
        else:
            children.add(child)


@contextlib.contextmanager
def _waking(*numbers: int) -> Iterator[tuple[socket.socket, Callable[[], Iterable[int]]]]:
    """Give a socket that can be read from when a signal came, and a function that tells which came."""
    reader, writer = socket.socketpair()

    def arrived() -> Iterable[int]:
        try:
            return reader.recv(4096)
        except BlockingIOError:
            return ()

    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader, arrived
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in before.items():
                signal.signal(number, handler)
