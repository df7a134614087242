"""What the tests share: namespaces, sockets inside them, questions, and what the kernel holds.

Nothing here goes through pyskl but the switching of namespaces, so that a test's evidence is the
kernel's own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import json
import os
import platform
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import pyskl
from pyskl.pytest_plugin import namespace, unavailable  # noqa: F401 - the tests take both from here

HERE = Path(__file__).parent
BPFFS = Path("/sys/fs/bpf")
NETNS = Path("/run/netns")
TIMEOUT = 5.0  # a bound on what should take microseconds; nothing waits it out unless it fails
LOAD = int(os.environ.get("PYSKL_TEST_LOAD", "40000"))  # how many clients ask; fewer, where emulated

# What socket.h has and Python's socket module (of some version) has not.
SO_ATTACH_FILTER = 26
SO_ATTACH_REUSEPORT_EBPF = 52
SO_COOKIE = 57
SO_NETNS_COOKIE = 71
IP_RECVORIGDSTADDR = 20
IPV6_RECVORIGDSTADDR = 74
IPV6_FREEBIND = 78
UDP_SEGMENT = 103
UDP_GRO = 104
IPPROTO_MPTCP = 262
IPPROTO_UDPLITE = 136

# Flags of bpf_sk_assign().
REPLACE, NO_REUSEPORT = 1, 2

# One address of each documentation prefix; every one is local to a namespace made by namespace().
V4, V4_B, V4_C = "192.0.2.1", "198.51.100.1", "203.0.113.1"
V6, V6_B = "2001:db8::1", "2001:db8:b::1"

Child = subprocess.Popen  # of str

needs = pytest.mark.needs  # @needs("map_batch"): skips, with the feature's reason, where it is not


# -- objects ---------------------------------------------------------------------------------------


@functools.cache
def _build_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pyskl-objects-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def bpf_object(name: str) -> Path:
    """The object of tests/bpf/NAME.bpf.c: from $PYSKL_TEST_OBJECTS, or compiled, once a session."""
    if ready := os.environ.get("PYSKL_TEST_OBJECTS"):
        return Path(ready, f"{name}.bpf.o")
    target = _build_folder() / f"{name}.bpf.o"
    headers = f"-I/usr/include/{platform.machine()}-linux-gnu"
    arguments = ["clang", "-O2", "-g", "-Wall", "-Werror", "-target", "bpf", headers]
    source = HERE / "bpf" / f"{name}.bpf.c"
    subprocess.run([*arguments, "-c", source, "-o", target], check=True, timeout=60)
    return target


# -- namespaces ------------------------------------------------------------------------------------


@contextlib.contextmanager
def named(ns: pyskl.NetNS) -> Iterator[str]:
    """A name for a namespace, as ip-netns(8) gives it."""
    name = f"pyskl-{os.getpid()}-{next(_numbers)}"
    with ns.entered():
        subprocess.run(["sh", "-c", f"exec ip netns attach {name} $$"], check=True, timeout=60)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=60)


_numbers = itertools.count()


def ip(ns: pyskl.NetNS, *lines: str) -> None:
    """ip(8)'s commands, inside a namespace."""
    with ns.entered():
        command, text = ["ip", "-batch", "-"], "\n".join(lines)
        subprocess.run(command, input=text, text=True, check=True, timeout=60)


def sysctl(ns: pyskl.NetNS, name: str, value: object) -> None:
    """Set net.NAME (in slashes) of a namespace; skip where this kernel has no such setting."""
    with ns.entered():
        path = Path("/proc/sys/net", name)
        if not path.exists():
            unavailable(path.name, f"no {path}")
        path.write_text(str(value))


# -- sockets ---------------------------------------------------------------------------------------


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def new_socket(ns: pyskl.NetNS, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket made inside a namespace, which it keeps; its operations are bounded by TIMEOUT."""
    with ns.entered():
        sock = socket.socket(family, kind, protocol)
    sock.settimeout(TIMEOUT)
    return sock


def _bound(ns: pyskl.NetNS, kind: int, host: str, port: int, reuseport: bool, v6only: bool) -> socket.socket:
    sock = new_socket(ns, family_of(host), kind)
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        if reuseport:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def tcp_listener(
    ns: pyskl.NetNS,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    reuseport: bool = False,
    v6only: bool = True,
    backlog: int = 4096,
) -> socket.socket:
    """A listening TCP socket; `tcp_listener(ns, "::", v6only=False)` is a dual-stack one."""
    sock = _bound(ns, socket.SOCK_STREAM, host, port, reuseport, v6only)
    sock.listen(backlog)
    return sock


def udp_socket(
    ns: pyskl.NetNS,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    reuseport: bool = False,
    v6only: bool = True,
) -> socket.socket:
    """A bound, unconnected UDP socket."""
    return _bound(ns, socket.SOCK_DGRAM, host, port, reuseport, v6only)


def server(ns: pyskl.NetNS, protocol: str, host: str, port: int = 0, **how: bool) -> socket.socket:
    """A listening TCP socket or a bound UDP socket, by the protocol's name."""
    return {"tcp": tcp_listener, "udp": udp_socket}[protocol](ns, host, port, **how)


def loopback(family: str) -> str:
    """The loopback address of "v4" or "v6", where no documentation address is."""
    return {"v4": "127.0.0.1", "v6": "::1"}[family]


def tcp_client(ns: pyskl.NetNS, host: str, port: int, *, source: tuple[str, int] | None = None) -> socket.socket:
    """A connected TCP client; ConnectionRefusedError where a RST came."""
    return _client(ns, socket.SOCK_STREAM, host, port, source)


def udp_client(ns: pyskl.NetNS, host: str, port: int, *, source: tuple[str, int] | None = None) -> socket.socket:
    """A connected UDP client, which is told of ICMP errors."""
    return _client(ns, socket.SOCK_DGRAM, host, port, source)


def _client(ns: pyskl.NetNS, kind: int, host: str, port: int, source: tuple[str, int] | None) -> socket.socket:
    sock = new_socket(ns, family_of(host), kind)
    try:
        if source is not None:
            if sock.family == socket.AF_INET6:  # an address that is local by its route alone
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            sock.bind(source)
        sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def cookie(sock: socket.socket | int) -> int:
    """SO_COOKIE, asked without pyskl."""
    fd = sock if isinstance(sock, int) else sock.fileno()
    with socket.socket(fileno=os.dup(fd)) as copy:
        return int(struct.unpack("=Q", copy.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0])


def silence(sock: socket.socket) -> socket.socket:
    """Give a socket a classic filter that returns 0: it takes packets in and lets none through."""
    code = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0))  # BPF_RET | BPF_K, 0
    program = struct.pack("@HP", 1, ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    return sock


def send_together(client: socket.socket, to: tuple[str, int], data: bytes, size: int) -> None:
    """Datagrams of so many bytes, as one that is taken apart as late as can be: UDP_SEGMENT."""
    segment = socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size)
    assert client.sendmsg([data], [segment], 0, to) == len(data)


def needs_coalescing(ns: pyskl.NetNS) -> None:
    """Skip where datagrams that were sent together do not arrive so: over loopback, Linux 5.10 takes them apart."""
    with udp_socket(ns) as server, udp_socket(ns) as client:
        server.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        send_together(client, server.getsockname(), b"abcd", 2)
        if server.recv(9) != b"abcd":
            unavailable("udp_gro", "over loopback this kernel coalesces nothing")


# -- questions -------------------------------------------------------------------------------------


def readable(*socks: socket.socket, timeout: float = TIMEOUT) -> list[socket.socket]:
    """Those that have something to read, as soon as one has."""
    poller = select.poll()
    by_fd = {sock.fileno(): sock for sock in socks}
    for fd in by_fd:
        poller.register(fd, select.POLLIN)
    return [by_fd[fd] for fd, _ in poller.poll(timeout * 1000)]


def ask_tcp(
    ns: pyskl.NetNS,
    host: str,
    port: int,
    *servers: socket.socket,
    source: tuple[str, int] | None = None,
) -> socket.socket:
    """The one of the listening servers that a new connection reaches.

    ConnectionRefusedError where it is refused, TimeoutError where none of them has it.
    """
    with tcp_client(ns, host, port, source=source):
        for found in readable(*servers):
            found.accept()[0].close()
            return found
    raise TimeoutError(f"[{host}]:{port} reached none of the servers")


def ask_udp(
    ns: pyskl.NetNS,
    host: str,
    port: int,
    *servers: socket.socket,
    source: tuple[str, int] | None = None,
) -> socket.socket:
    """The one of the servers that a datagram reaches; errors as with ask_tcp."""
    with udp_client(ns, host, port, source=source) as client:
        client.send(b"?")
        for found in readable(client, *servers):
            found.recv(16)  # the client has nothing to receive: it raises the ICMP error
            return found
    raise TimeoutError(f"[{host}]:{port} reached none of the servers")


def ask(
    protocol: str,
    ns: pyskl.NetNS,
    host: str,
    port: int,
    *servers: socket.socket,
    source: tuple[str, int] | None = None,
) -> socket.socket:
    """ask_tcp or ask_udp, by the protocol's name."""
    how = {"tcp": ask_tcp, "udp": ask_udp}[protocol]
    return how(ns, host, port, *servers, source=source)


@contextlib.contextmanager
def unanswered(ns: pyskl.NetNS, host: str, port: int) -> Iterator[socket.socket]:
    """A TCP client whose SYN is met with silence so far; by the end it must be connected.

    On loopback a SYN and what answers it are processed before connect() returns, so what came of
    it is known at once; the next chance is the SYN that the client sends again after a second.
    """
    with new_socket(ns, family_of(host), socket.SOCK_STREAM) as client:
        client.setblocking(False)
        assert client.connect_ex((host, port)) == errno.EINPROGRESS
        poller = select.poll()
        poller.register(client, select.POLLOUT)
        assert poller.poll(0) == []
        yield client
        assert poller.poll(TIMEOUT * 1000) == [(client.fileno(), select.POLLOUT)]
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def eventually(condition: Callable[[], object], timeout: float = TIMEOUT) -> bool:
    """For what the kernel does after an RCU grace period, and tells nobody: poll, to a deadline."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.005)
    return True


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for "localhost", and its key."""
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - dt.timedelta(1)).not_valid_after(now + dt.timedelta(1))
    signed = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(signed.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    return paths


# -- what the kernel holds -------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_BPF = {"x86_64": 321, "aarch64": 280, "s390x": 351}[platform.machine()]
_SYS_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "s390x": 356}[platform.machine()]
_NEXT_ID = {"prog": 11, "map": 12, "link": 31}


def sys_bpf(command: int, attributes: bytes | ctypes.Array[ctypes.c_char]) -> int:
    """bpf(2) itself; OSError with its errno."""
    buffer = attributes if isinstance(attributes, ctypes.Array) else bytearray(attributes)
    if isinstance(buffer, bytearray):
        buffer = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    result = int(_libc.syscall(_SYS_BPF, command, buffer, len(buffer)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def bpf_ids() -> set[tuple[str, int]]:
    """("prog", 12), … of every BPF object of the machine; nothing without CAP_SYS_ADMIN, or without bpf(2)."""
    found = set()
    for kind, command in _NEXT_ID.items():
        number = 0
        while True:
            attributes = ctypes.create_string_buffer(struct.pack("=III", number, 0, 0), 12)
            try:
                sys_bpf(command, attributes)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EPERM, errno.ENOSYS):
                    break
                raise
            number = struct.unpack_from("=I", attributes, 4)[0]
            found.add((kind, number))
    return found


def bpf_ids_of(pid: int | str) -> set[tuple[str, int]]:
    """The BPF objects that a process has fds of."""
    found = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fdinfo"):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines():
                    name, _, value = line.partition(":")
                    if name in ("prog_id", "map_id", "link_id"):
                        found.add((name[:-3], int(value)))
    return found


def strangers() -> set[tuple[str, int]]:
    """BPF objects that processes which are none of ours hold: systemd makes programs of its own."""
    ours = {os.getpid(), *children()}
    pids = {int(name) for name in os.listdir("/proc") if name.isdecimal()} - ours
    return set().union(*map(bpf_ids_of, pids))


def children() -> set[int]:
    """This process's running children, and their orphans (conftest makes it a subreaper)."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        try:
            of_task = Path(f"/proc/self/task/{task}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has just ended: its children, if any, are another's now
        for pid in map(int, of_task):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ChildProcessError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    os.waitpid(pid, os.WNOHANG)
                else:
                    found.add(pid)
    return found


def fds() -> set[tuple[int, str]]:
    """This process's file descriptors, with what each is."""
    found = set()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return found


def pins() -> set[str]:
    """Every file and folder on bpffs."""
    return {os.path.join(folder, name) for folder, folders, files in os.walk(BPFFS) for name in (*folders, *files)}


def namespaces() -> set[str]:
    """The named network namespaces of these tests: the others are no business of theirs."""
    return {name for name in os.listdir(NETNS) if name.startswith("pyskl-")} if NETNS.exists() else set()


@functools.cache
def full_trie_takes_updates() -> bool:
    """Whether an entry of a full LPM trie can be replaced; Linux 5.10 asks for room for one more."""
    key, value = (ctypes.create_string_buffer(data) for data in (struct.pack("=I4x", 32), bytes(4)))
    with pyskl.LpmTrie.create(key_size=8, value_size=4, max_entries=1) as trie:
        attributes = struct.pack("=I4xQQQ", trie.fileno(), ctypes.addressof(key), ctypes.addressof(value), 0)
        sys_bpf(2, attributes)  # BPF_MAP_UPDATE_ELEM
        try:
            sys_bpf(2, attributes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
    return True


def grace_period() -> None:
    """After this, no packet is on its way with what a look-up before it found (RCU)."""
    if _libc.syscall(_SYS_MEMBARRIER, 1, 0, 0):  # MEMBARRIER_CMD_GLOBAL is synchronize_rcu()
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@functools.cache
def kernel_has(function: str) -> bool:
    """Whether the kernel has a function of this name, where no other probe tells."""
    with open("/proc/kallsyms") as file:
        return any(line.split()[2] == function for line in file)


def deny_bpf() -> None:
    """Take bpf(2) from this process, as a kernel without it would: ENOSYS (seccomp(2)). There is no way back."""
    load, equal, give = 0x20, 0x15, 0x06  # the number of the call; is it that one; SECCOMP_RET_ERRNO or _ALLOW
    code = ((load, 0, 0, 0), (equal, 0, 1, _SYS_BPF), (give, 0, 0, 0x50000 | errno.ENOSYS), (give, 0, 0, 0x7FFF0000))
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(buffer))
    if _libc.prctl(38, 1, 0, 0, 0) or _libc.prctl(22, 2, program):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# -- other processes -------------------------------------------------------------------------------


def python(code: str, *arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a process of its own; its failure is ours."""
    result = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        **how,  # type: ignore[call-overload]
    )
    assert result.returncode == 0, result.stderr
    return result


def child(
    code: str, *arguments: object, ns: pyskl.NetNS | None = None, started_by: Sequence[str] = (), **how: Any
) -> Child:
    """A piece of Python beside the test, in a namespace; its standard streams are pipes."""
    command = [*started_by, sys.executable, "-I", "-W", "error", "-c", code, *map(str, arguments)]
    with contextlib.nullcontext() if ns is None else ns.entered():
        return subprocess.Popen(command, **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **how})


@contextlib.contextmanager
def handed_over(socks: Sequence[Any], names: str | None = None) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """How a service manager starts a program with sockets: the words before the program's own, and options of Popen.

    ``LISTEN_PID`` and ``LISTEN_FDS`` of the environment stay, where it has them.
    """
    copies = [fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 100) for sock in socks]  # out of the way of fds 3, 4, …

    def place() -> None:
        for number, copy in enumerate(copies, 3):
            os.dup2(copy, number)

    script = (
        'export LISTEN_PID="${LISTEN_PID-$$}" LISTEN_FDS="${LISTEN_FDS-$1}"; [ -z "$2" ] || export LISTEN_FDNAMES="$2"'
    )
    words = ["sh", "-c", f'{script}; shift 2; exec "$@"', "sh", str(len(socks)), names or ""]
    try:
        yield words, {"preexec_fn": place, "pass_fds": range(3, 3 + len(socks))}
    finally:
        for copy in copies:
            os.close(copy)


def kill(process: Child) -> None:
    """SIGKILL, reaped; its pipes closed."""
    process.kill()
    with process:
        pass


# -- the program of most tests ---------------------------------------------------------------------


class Result(NamedTuple):
    """Of tests/bpf/choose.bpf.c: its runs, was there a socket, the errno of bpf_sk_assign()."""

    runs: int
    found: bool
    errno: int


def result(program: pyskl.Program) -> Result:
    runs, found, error = struct.unpack("=QIi", program.maps["result"][0])
    return Result(runs, bool(found), -error)


@contextlib.contextmanager
def chooser(
    sockets: Mapping[int, socket.socket] | None = None,
    *,
    name: str = "choose",
    reuse: Mapping[str, pyskl.Map] | None = None,
    **constants: object,
) -> Iterator[pyskl.Program]:
    """choose.bpf.c with these constants, loaded; its SOCKMAP filled with these."""
    path = bpf_object("choose")
    with pyskl.Program.load(path, name=name, constants=constants, reuse=reuse) as program:
        for slot, sock in (sockets or {}).items():
            program.maps["sockets"][slot] = sock
        yield program


@contextlib.contextmanager
def choosing(
    ns: pyskl.NetNS, sockets: Mapping[int, socket.socket] | None = None, **how: Any
) -> Iterator[pyskl.Program]:
    """chooser(), attached."""
    with chooser(sockets, **how) as program, program.attach(ns):
        yield program


@contextlib.contextmanager
def steered(ns: pyskl.NetNS, *socks: Any, **constants: Any) -> Iterator[pyskl.Program]:
    """All of 192.0.2.0/24 and 2001:db8::/48 to these sockets, by redirect.bpf.o; one of IPv6 has IPv4's too."""
    constants |= {"prefix4": socket.inet_aton("192.0.2.0"), "prefix4_len": 24}
    constants |= {"prefix6": socket.inet_pton(socket.AF_INET6, "2001:db8::"), "prefix6_len": 48}
    with pyskl.Program.load(pyskl.REDIRECT, constants=constants) as program, program.attach(ns):
        for sock in socks:
            with socket.socket(fileno=os.dup(sock.fileno())) as copy:
                udp, v6 = copy.type == socket.SOCK_DGRAM, copy.family == socket.AF_INET6
            for slot in (0, 2) if v6 else (0,):
                program.maps["sockets"][slot + udp] = sock
        yield program


# -- load ------------------------------------------------------------------------------------------

_CLIENT = """
import collections, errno, itertools, json, select, socket, struct, sys
protocol, port, count, until_told = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}[protocol]
outcomes = collections.Counter()
for number in itertools.count():
    if number >= count and not (until_told and not select.select([0], (), (), 0)[0]):
        break
    try:
        with socket.socket(socket.AF_INET, kind) as client:
            client.settimeout(5)
            address = f"192.0.2.{number % 250 + 1}", port
            if protocol == "tcp":  # closed by RST: no TIME_WAIT, which would use up the ports
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.connect(address)
            else:
                client.sendto(b"?", address)
            outcomes[client.recv(16).decode()] += 1
    except OSError as error:
        outcomes[errno.errorcode.get(error.errno, type(error).__name__)] += 1
print(json.dumps(outcomes))
"""

_SERVER = """
import socket, sys
sock, answer = socket.socket(fileno=int(sys.argv[1])), sys.argv[2].encode()
while True:
    if sock.type == socket.SOCK_STREAM:
        connection, _ = sock.accept()
        try:
            connection.sendall(answer)
        except OSError:
            pass
        connection.close()
    else:
        sock.sendto(answer, sock.recvfrom(16)[1])
"""


class Load:
    """Clients, in processes of their own, that ask port 80 of the addresses of 192.0.2.0/24.

    So many times in all; or more often, `until_told`, which asking for the outcomes does.
    """

    def __init__(
        self, ns: pyskl.NetNS, count: int, *, protocol: str = "tcp", clients: int = 2, until_told: bool = False
    ):
        arguments = protocol, 80, count // clients, until_told
        self._clients = [child(_CLIENT, *arguments, ns=ns) for _ in range(clients)]

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            kill(client)

    @property
    def running(self) -> bool:
        return any(client.poll() is None for client in self._clients)

    def outcomes(self) -> Counter[str]:
        """How many asked in vain, by errno, and how many were answered, by the answer."""
        total: Counter[str] = Counter()
        for client in self._clients:
            total.update(json.loads(client.communicate(timeout=60)[0]))
        return total


@contextlib.contextmanager
def answering(sock: socket.socket, answer: str) -> Iterator[Child]:
    """A process that answers each client of a socket with this, and holds a copy of the socket."""
    sock.setblocking(True)
    process = child(_SERVER, sock.fileno(), answer, pass_fds=[sock.fileno()])
    try:
        yield process
    finally:
        kill(process)
