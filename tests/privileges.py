"""Running a function in a child process that has given up its capabilities."""

from __future__ import annotations

import ctypes
import os
import pickle
import struct
from collections.abc import Callable, Collection

NUMBERS = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
_libc = ctypes.CDLL(None, use_errno=True)


def drop(keep: Collection[str] = ()) -> None:
    """Have these capabilities and no other from now on, for good."""
    mask = sum(1 << NUMBERS[name] for name in keep)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    data = struct.pack("=6I", low, low, 0, high, high, 0)  # effective, permitted, inheritable
    if _libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def run(function: Callable[[], object], *, keep: Collection[str] = ()) -> object:
    """The function's result, or its exception raised here, from a child without capabilities.

    It is a fork, so that what was opened before stays open: that is what an fd's authority is.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        try:
            drop(keep)
            outcome: tuple[bool, object] = (True, function())
        except BaseException as error:
            outcome = (False, error)
        with os.fdopen(writer, "wb") as pipe:
            try:
                pipe.write(pickle.dumps(outcome))
            except BaseException as error:
                pipe.write(pickle.dumps((False, AssertionError(f"{outcome!r}: {error!r}"))))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    succeeded, result = pickle.loads(data)
    if not succeeded:
        raise result
    return result
