# SPDX-License-Identifier: BSD-2-Clause
"""What systemd and a service say to each other: inherited sockets (sd_listen_fds(3)) and notices (sd_notify(3))."""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING, Final, NamedTuple

from pyskl._fd import fd_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyskl.sockets import Socket

LISTEN_FDS_START: Final = 3
_UNNAMED: Final = "unknown"  # sd_listen_fds_with_names(3)
_MAX_FDS: Final = 1 << 20


class Inherited(NamedTuple):
    """An fd that was handed to this process.

    Attributes:
        fd: its number.
        name: what the socket unit calls it (``FileDescriptorName=`` of systemd.socket(5)).
    """

    fd: int
    name: str

    def fileno(self) -> int:
        """Give the fd."""
        return self.fd


def inherited(environ: Mapping[str, str] = os.environ) -> list[Inherited]:
    """List the fds that were handed to this process, and make them close-on-exec: ``LISTEN_FDS``, as systemd sets it.

    They are for the process of ``LISTEN_PID`` alone; for another there are none.

    Raises:
        ValueError: a variable is not what it must be; the message quotes it.
    """
    if "LISTEN_FDS" not in environ or "LISTEN_PID" not in environ:
        return []
    if _number(environ, "LISTEN_PID") != os.getpid():
        return []
    count = _number(environ, "LISTEN_FDS")
    if not count:
        return []
    if count > _MAX_FDS:
        raise ValueError(f"LISTEN_FDS is no number of fds: {environ['LISTEN_FDS']!r}")
    names = environ["LISTEN_FDNAMES"].split(":") if "LISTEN_FDNAMES" in environ else [_UNNAMED] * count
    if len(names) != count:
        raise ValueError(f"LISTEN_FDNAMES has {len(names)} names for {count} fds: {environ['LISTEN_FDNAMES']!r}")
    found = [Inherited(LISTEN_FDS_START + place, name) for place, name in enumerate(names)]
    for each in found:
        try:
            os.set_inheritable(each.fd, False)
        except OSError:
            raise ValueError(f"LISTEN_FDS is {count}, and fd {each.fd} is not open") from None
    return found


def _number(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", environ[name]):
        raise ValueError(f"{name} is no number: {environ[name]!r}")
    return int(environ[name])


def notify(*states: str, fds: Sequence[Socket] = (), environ: Mapping[str, str] = os.environ) -> bool:
    """Tell the service manager something, such as ``"READY=1"``; where ``NOTIFY_SOCKET`` is not set, nobody.

    Args:
        states: assignments, as sd_notify(3) lists them.
        fds: to be kept by the service manager, with ``"FDSTORE=1"``.
        environ: the environment.

    Raises:
        OSError: the service manager is not there any more.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address[0] == "@":  # an abstract one (unix(7))
        address = f"\0{address[1:]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        message = "\n".join(states).encode()
        if numbers := [fd_of(fd) for fd in fds]:
            socket.send_fds(sock, [message], numbers)
        else:
            sock.send(message)
    return True


def store(fds: Sequence[Socket], *, instead_of: Sequence[Inherited], environ: Mapping[str, str] = os.environ) -> None:
    """Let the service manager keep fds for the process that follows this one, in the place of what it kept before.

    Raises:
        OSError: the service manager is not there any more.
    """
    name = f"process-{os.getpid()}"
    if notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=fds, environ=environ):
        for old in sorted({each.name for each in instead_of} - {name}):
            notify("FDSTOREREMOVE=1", f"FDNAME={old}", environ=environ)
