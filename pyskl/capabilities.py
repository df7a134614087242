# SPDX-License-Identifier: BSD-2-Clause
"""Which capabilities this thread has, to say which one it lacks (capabilities(7))."""

from __future__ import annotations

import os
from typing import Final

# The numbers of <linux/capability.h>; those that BPF and pidfd_getfd(2) ask for.
_NUMBERS: Final = {"CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
# CAP_SYS_ADMIN contains what was split from it, for BPF.
_ALL: Final = "CAP_SYS_ADMIN"
_APART: Final = "CAP_SYS_PTRACE"
# The inode of the initial user namespace, fixed by the kernel (PROC_USER_INIT_INO).
_INITIAL_USER_NS: Final = 0xEFFFFFFD


def in_user_namespace() -> bool:
    """Tell whether the calling thread is in another than the initial user namespace (user_namespaces(7))."""
    try:
        return os.stat("/proc/thread-self/ns/user").st_ino != _INITIAL_USER_NS
    except OSError:  # no /proc
        return False


def effective() -> frozenset[str]:
    """Name the capabilities in the calling thread's effective set that count for bpf(2).

    Those of another than the initial user namespace do not count, so there are none. Where it can't be told, for want
    of /proc or of an fd, there are all: none is then called missing.
    """
    if in_user_namespace():
        return frozenset()
    try:
        with open("/proc/thread-self/status", "rb") as status:
            bits = next(int(line.split()[1], 16) for line in status if line.startswith(b"CapEff:"))
    except OSError:
        return frozenset(_NUMBERS)
    return frozenset(name for name, number in _NUMBERS.items() if bits >> number & 1)


def missing(needed: tuple[str, ...]) -> tuple[str, ...]:
    """Tell which of the capabilities the calling thread lacks, in the order given."""
    have = effective()
    return tuple(name for name in needed if name not in have and (name == _APART or _ALL not in have))
