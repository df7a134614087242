# SPDX-License-Identifier: BSD-2-Clause
"""Owners of file descriptors, and holders of such owners."""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self


_FD_MAX = 0x7FFFFFFF


class HasFileno(Protocol):
    """Anything with a ``fileno()``: a socket, a file, an object of pyskl."""

    def fileno(self) -> int: ...


def fd_of(thing: HasFileno | int) -> int:
    """Give the fd of anything that has one; an int is one already."""
    try:
        return thing.fileno()  # type: ignore[union-attr]
    except AttributeError:
        if not isinstance(thing, int):
            raise TypeError(f"an fd or an object with fileno() is needed, not {type(thing).__name__}") from None
        if not -1 <= thing <= _FD_MAX:
            raise ValueError(f"no file descriptor has the number {thing}") from None
        return thing


class Closable(ABC):
    """What is closed by hand or by ``with``; when it is forgotten, with a ResourceWarning, as a file is."""

    _held = False  # by a holder that will close it, so that nobody is to blame when it goes

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether `close()` was called."""

    @abstractmethod
    def close(self) -> None:
        """Close it; once more does nothing."""

    def __enter__(self) -> Self:
        if self.closed:
            raise ValueError(f"operation on a closed {type(self).__name__}")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self.closed:
            return
        try:
            if not self._held:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        finally:  # the warning may be made an error
            self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} owns file descriptors: it can be neither pickled nor copied")


class FdOwner(Closable):
    """An object that owns one file descriptor, which is close-on-exec.

    `close()` may be called twice, from any thread; after it every operation raises ValueError. One that is forgotten is
    closed with a ResourceWarning, as a file is.
    """

    _fd = -1  # of the class: what is left when close() has taken the instance's own away

    def __init__(self, fd: int) -> None:
        self._fd = fd  # ours from the first moment: what fails from here on closes it, and nobody else
        try:
            self._learn()
        except BaseException:
            self.close()
            raise

    def _learn(self) -> None:
        """Ask the kernel what the object needs to know of itself."""

    @classmethod
    def _class_of(cls, fd: int) -> type[Self]:  # noqa: ARG003 - for classes that have others below them
        """Choose the class that fits what an fd is of."""
        return cls

    @classmethod
    def own(cls, fd: int) -> Self:
        """Make an object of the fitting class of an fd, which it owns from now on; it is closed where this fails."""
        try:
            fitting = cls._class_of(fd)
        except BaseException:
            os.close(fd)
            raise
        return fitting(fd)

    def fileno(self) -> int:
        """Give the file descriptor.

        Raises:
            ValueError: it is closed.
        """
        fd = self._fd
        if fd < 0:
            raise ValueError(f"operation on a closed {type(self).__name__}")
        return fd

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the file descriptor; the kernel's object goes with the last reference to it."""
        fd = self.__dict__.pop("_fd", -1)  # in one step: whoever gets it closes it
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self.closed else f'fd={self._fd}'}>"


Owner_co = TypeVar("Owner_co", bound=FdOwner, covariant=True)


class Held(Mapping[str, Owner_co]):
    """Owners by name, kept by the object that they came with.

    When that closes, those that nobody else refers to are closed; those that somebody took live on in their hands.
    """

    def __init__(self, what: str, owners: dict[str, Owner_co]) -> None:
        self._what = what
        self._owners: dict[str, Owner_co] | None = owners
        for owner in owners.values():
            owner._held = True

    def _open(self) -> dict[str, Owner_co]:
        if self._owners is None:
            raise ValueError(f"operation on the {self._what}s of a closed object")
        return self._owners

    def __getitem__(self, name: str) -> Owner_co:
        owners = self._open()
        try:
            return owners[name]
        except KeyError:
            raise KeyError(f"no {self._what} {name!r}: there are {', '.join(owners) or 'none'}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._open())

    def __len__(self) -> int:
        return len(self._open())

    def __repr__(self) -> str:
        return f"<{self._what}s: {'closed' if self._owners is None else ', '.join(self._owners)}>"

    def release(self) -> None:
        """Let go of them all: what nobody holds is closed, in silence, and what somebody holds is theirs to close."""
        owners, self._owners = self._owners or {}, None
        handles = []
        with contextlib.suppress(KeyError):  # empty
            while True:
                _, owner = owners.popitem()
                owner._held = True
                handles.append(weakref.ref(owner))
                del owner
        for handle in handles:
            if (taken := handle()) is not None:
                taken._held = False
