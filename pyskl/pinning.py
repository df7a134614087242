# SPDX-License-Identifier: BSD-2-Clause
"""What programs, maps and links have in common: an fd, an id, and pins on bpffs (``BPF_OBJ_PIN``, ``BPF_OBJ_GET``)."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from pyskl import _sys
from pyskl._fd import FdOwner, HasFileno, fd_of
from pyskl.errors import BpfError

if TYPE_CHECKING:
    from typing_extensions import Self

StrPath: TypeAlias = str | os.PathLike[str]


def _text(path: StrPath) -> str:
    name = os.fspath(path)
    if "\0" in name:
        raise ValueError(f"a path has no NUL in it: {name!r}")
    return name


def kind_of(fd: int) -> str:
    """Tell what kind of BPF object an fd is of: "prog", "map", "link", or what else it is.

    The name of the file in /proc differs between kernels and between a new link and a pinned one; the keys that each
    kind prints about itself do not (proc_pid_fdinfo(5)).
    """
    try:
        with open(f"/proc/thread-self/fdinfo/{fd}", "rb") as description:
            keys = {line.partition(b":")[0] for line in description}
    except FileNotFoundError:
        raise BpfError(errno.ENOENT, "no /proc", call="open", hint="mount -t proc proc /proc") from None
    for kind in ("link", "map", "prog", "btf"):  # a link tells its program too
        if f"{kind}_id".encode() in keys:
            return kind
    return "not a BPF object"


def fd_of_kind(thing: object, kind: str) -> int:
    """Give the fd of a program, map or link, and of nothing else.

    Raises:
        TypeError: it is of another kind, or no object of pyskl.
    """
    if not isinstance(thing, KernelObject) or thing._kind != kind:
        raise TypeError(f"{_WORDS[kind]} is needed, not {type(thing).__name__}")
    return thing.fileno()


_WORDS = {"prog": "a BPF program", "map": "a BPF map", "link": "a BPF link", "btf": "BTF"}


class KernelObject(FdOwner):
    """A program, a map or a link: kept by the kernel as long as an fd, a pin or another object refers to it."""

    _kind: ClassVar[str]  # as bpf(2) abbreviates it in its commands

    def _learn(self) -> None:
        self._pins: dict[str, int] = {}  # paths, and the inodes there, by which another's pin is told from ours

    @classmethod
    def _checked(cls, fd: int, origin: str) -> Self:
        """Own an fd, or close it and raise TypeError where it is of another kind of object."""
        try:
            kind = kind_of(fd)
        except OSError:
            os.close(fd)
            raise
        if kind == cls._kind:
            return cls.own(fd)
        os.close(fd)
        raise TypeError(f"{origin} is {_WORDS.get(kind, kind)}, and {cls.__name__} needs {_WORDS[cls._kind]}")

    @classmethod
    def from_fd(cls, fd: HasFileno | int) -> Self:
        """Open what an fd refers to, such as one that was inherited or received; the fd itself is left alone.

        Raises:
            TypeError: it is of another kind of object.
            OSError: it is not open (EBADF).
        """
        number = fd_of(fd)
        return cls._checked(_sys.dup(number), f"fd {number}")

    @classmethod
    def from_pin(cls, path: StrPath) -> Self:
        """Open what is pinned at a path (``BPF_OBJ_GET``); it needs write permission on the file.

        Raises:
            NoSuchPin: nothing is there (a FileNotFoundError, too).
            TypeError: another kind of object is pinned there.
            BpfError: the path is not on bpffs, or its mode forbids it (EACCES).
        """
        return cls._from_pin(path)

    @classmethod
    def _from_pin(cls, path: StrPath, *, read_only: bool = False) -> Self:
        name = _text(path)
        opened = cls._checked(_sys.obj_get(name, read_only=read_only), f"what is pinned at {name!r}")
        opened._remember(name)
        return opened

    @classmethod
    def from_id(cls, number: int) -> Self:
        """Open an object by its id (``BPF_*_GET_FD_BY_ID``).

        Raises:
            PermissionDenied: the process lacks CAP_SYS_ADMIN.
            BpfError: no object of this kind has the id (ENOENT).
        """
        if not 0 < number < 1 << 32:
            raise ValueError(f"an id is a positive number of 32 bits, not {number}")
        return cls.own(_sys.fd_by_id(cls._kind, number))

    def pin(self, path: StrPath) -> None:
        """Give the object a name on bpffs, by which it lives and can be opened when no fd is left (``BPF_OBJ_PIN``).

        Raises:
            ValueError: the file's name has a dot in it, which bpffs reserves.
            PinExists: something is there (a FileExistsError, too).
            NoSuchPin: the folder does not exist (a FileNotFoundError, too).
            BpfError: the path is not on bpffs (EPERM).
        """
        fd, name = self.fileno(), _text(path)
        if "." in os.path.basename(name):
            raise ValueError(f"bpffs takes no dot in a name: {name!r}")
        _sys.obj_pin(fd, name)
        self._remember(name)

    def _remember(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # removed already
            self._pins[os.path.abspath(name)] = os.stat(name).st_ino

    def unpin(self) -> None:
        """Remove the pins that were made through this object, or that it was opened from.

        One that is gone, or replaced by another object's, is left as it is.

        Raises:
            ValueError: there are none.
            OSError: a pin could not be removed; it stays known.
        """
        self.fileno()
        if not self._pins:
            raise ValueError(f"{self!r} was neither pinned nor opened from a pin")
        for path, inode in tuple(self._pins.items()):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
            self._pins.pop(path, None)
