# SPDX-License-Identifier: BSD-2-Clause
"""What can go wrong: every error of pyskl, and nothing that it does itself.

Whatever the kernel refuses is a `BpfError`, which is an OSError. Where Python has a standard exception for the same
thing (KeyError, PermissionError, FileNotFoundError, …), it is that one as well, so that ordinary code catches it
unaware of BPF.
"""

from __future__ import annotations

import errno as _errno

# By the names that the kernel uses where a number has two.
_NAMES = {**_errno.errorcode, _errno.EOPNOTSUPP: "EOPNOTSUPP", _errno.EAGAIN: "EAGAIN"}


class PysklError(Exception):
    """The base of every error that pyskl defines."""


class BpfError(PysklError, OSError):
    """The kernel, or libbpf, refused.

    Attributes:
        errno: the number, as errno(3) names it; never one that it does not name.
        strerror: the kernel's words for it, or libbpf's.
        call: what was asked, as the kernel names it: ``"BPF_LINK_CREATE"`` (a command of bpf(2)), ``"setns"``, or a
            function of libbpf.
        hint: what to do about it, or None.
        filename: the path, where there is one.
    """

    def __init__(
        self,
        errno: int,
        strerror: str,
        *,
        call: str,
        hint: str | None = None,
        filename: str | None = None,
    ) -> None:
        super().__init__(errno, strerror, *([] if filename is None else [filename]))
        self.call = call
        self.hint = hint

    def __str__(self) -> str:
        name = _NAMES.get(self.errno or 0, str(self.errno))
        path = "" if self.filename is None else f": {self.filename!r}"
        hint = "" if self.hint is None else f": {self.hint}"
        return f"{self.call}: {self.strerror} ({name}){path}{hint}"

    def __reduce__(self) -> tuple[object, ...]:
        arguments = (type(self), self.errno, self.strerror, self.filename, self.__dict__)
        return _rebuild, arguments


def _rebuild(
    kind: type[BpfError],
    errno: int,
    strerror: str,
    filename: str | None,
    attributes: dict[str, object],
) -> BpfError:
    """Make a pickled error again, whatever else its class asks for."""
    error = kind.__new__(kind)
    BpfError.__init__(error, errno, strerror, call="", filename=filename)
    error.__dict__.update(attributes)
    return error


class VerifierError(BpfError):
    """The verifier rejected a program.

    Attributes:
        log: the whole of what the verifier said; its last lines are in ``str()`` too.
    """

    log: str = ""

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *self.log.splitlines()[-6:]])


class PermissionDenied(BpfError, PermissionError):
    """The process lacks a capability that the call needs.

    Attributes:
        missing: the names of the capabilities it lacks, such as ``("CAP_BPF", "CAP_NET_ADMIN")`` (capabilities(7)).
    """

    missing: tuple[str, ...] = ()


class NotSupported(BpfError):
    """This kernel can't do it.

    Attributes:
        feature: what is lacking.
        since: the first version of Linux that has it; None where none does, or it is not known.
    """

    feature: str = ""
    since: str | None = None


class NoSuchKey(BpfError, KeyError):
    """A map has nothing under this key."""


class NoSuchPin(BpfError, FileNotFoundError):
    """There is nothing at this path on bpffs, or its folder is missing."""


class PinExists(BpfError, FileExistsError):
    """Something is at this path on bpffs already."""


class BadSocket(PysklError, ValueError):
    """This socket can't be steered to.

    Attributes:
        reason: what is wrong with it.
    """

    reason: str = ""


class BindingConflict(PysklError, ValueError):
    """Two bindings contradict each other.

    Attributes:
        bindings: the two.
    """

    bindings: tuple[object, ...] = ()


class BindingsFileError(PysklError, ValueError):
    """A bindings file says what can't be; the message names the entry, and quotes it."""


class AlreadyLoaded(PysklError):
    """There is a dispatcher at this path already."""


class NotLoaded(PysklError):
    """There is no dispatcher at this path."""


class Damaged(PysklError):
    """Something of the dispatcher at this path is missing, or it is attached to nothing."""


class Incompatible(PysklError):
    """The dispatcher at this path was made by a version that this one can neither use nor upgrade."""


class Busy(PysklError):
    """Another process holds the lock.

    Attributes:
        pid: of that process, or None where it can't be told.
    """

    pid: int | None = None


class LimitReached(PysklError):
    """A dispatcher has no room for more labels or sockets; what it was made for is an argument of its creation."""


class SocketRefused(BpfError, BadSocket):
    """A map does not take this socket; `reason` says what is wrong with it."""
