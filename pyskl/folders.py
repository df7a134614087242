# SPDX-License-Identifier: BSD-2-Clause
"""The folder of a dispatcher on bpffs: made beside its place and renamed, locked, cleaned up, removed.

One that is being made or removed is called ``NAME~PID~RANDOM``, and whoever does it holds its lock (flock(2)), which
dies with him; who finds one that is not locked removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from typing import TYPE_CHECKING

from pyskl import _sys
from pyskl.errors import AlreadyLoaded, BpfError, Busy, NotLoaded
from pyskl.link import Link

if TYPE_CHECKING:
    from pyskl.pinning import StrPath

LINK = "link"
_PAUSE = 0.001  # seconds between two tries to get a lock


def checked(path: StrPath) -> str:
    """Give the absolute path of a folder, whose name bpffs takes."""
    name = os.path.abspath(os.fspath(path))
    if "." in os.path.basename(name) or "~" in os.path.basename(name):
        raise ValueError(f"a dispatcher's folder has neither a dot nor a tilde in its name: {name!r}")
    return name


def beside(name: str) -> str:
    """Name a folder beside a place."""
    return f"{name}~{os.getpid()}~{os.urandom(4).hex()}"


def make(name: str) -> tuple[str, int]:
    """Make a folder beside a place, and hold its lock."""
    parent = os.path.dirname(name)
    _check_bpffs(parent)
    os.makedirs(parent, mode=0o755, exist_ok=True)
    while True:
        temporary = beside(name)
        os.mkdir(temporary, 0o700)
        try:
            folder = open_folder(temporary)
        except NotLoaded:
            continue  # somebody took it for a dead one's, in the moment before it was locked
        fcntl.flock(folder, fcntl.LOCK_EX)
        if os.fstat(folder).st_nlink:
            return temporary, folder
        os.close(folder)


def _check_bpffs(parent: str) -> None:
    there = parent
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if not _sys.is_bpffs(there):
        hint = f"a dispatcher's folder is on bpffs ({_sys.MOUNT_BPFFS})"
        raise BpfError(errno.EPERM, "not a BPF file system", call="statfs", hint=hint, filename=parent)


def open_folder(name: str) -> int:
    """Open a folder: its fd, by which it is locked."""
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotLoaded(f"no dispatcher is at {name!r}: load one") from None
    except NotADirectoryError:
        raise NotLoaded(f"no dispatcher is at {name!r}, which is no folder") from None


def check_there(folder: int, name: str) -> None:
    """See whether a folder that is locked now is still in its place."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(name).st_ino == os.fstat(folder).st_ino:
            return
    raise NotLoaded(f"the dispatcher at {name!r} was unloaded")


def rename(temporary: str, name: str) -> None:
    """Put a folder into its place."""
    try:
        os.rename(temporary, name)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise AlreadyLoaded(f"a dispatcher is at {name!r} already") from None
        raise


def lock(folder: int, name: str, timeout: float) -> None:
    """Lock a folder, or raise `Busy` when that took too long, in seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                break
            time.sleep(_PAUSE)
        else:
            return
    pid = _holder(folder)
    who = f"process {pid}" if pid else "another process"
    busy = Busy(f"{who} holds the lock of {name!r}, and did so for {timeout} seconds")
    busy.pid = pid
    raise busy


def _holder(folder: int) -> int | None:
    """Tell who has the lock of a folder: /proc/locks (proc_locks(5))."""
    status = os.fstat(folder)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError), open("/proc/locks") as locks:
        for line in locks:
            words = line.split()
            if words[1] == "FLOCK" and words[-3] == wanted:
                return int(words[-4])
    return None


def clean_up(name: str) -> None:
    """Remove the folders that somebody who died was making or removing."""
    parent, base = os.path.split(name)
    with contextlib.suppress(OSError):
        for each in os.listdir(parent):
            if each.startswith(f"{base}~"):
                path = os.path.join(parent, each)
                with contextlib.suppress(OSError, NotLoaded):
                    folder = open_folder(path)
                    try:
                        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        remove(path)
                    finally:
                        os.close(folder)


def take_away(name: str) -> None:
    """Remove a folder whose lock the caller holds: at once for all, then piece by piece."""
    going = beside(name)
    os.rename(name, going)
    remove(going)


def remove(path: str) -> None:
    """Detach the link of a folder, and remove all that is in it."""
    with contextlib.suppress(BpfError, TypeError), Link.from_pin(os.path.join(path, LINK)) as link:
        link.detach()
    with contextlib.suppress(FileNotFoundError):
        remove_tree(path)


def remove_tree(path: str) -> None:
    """Remove a folder and all that is in it; shutil would be most of what this module takes to import."""
    with os.scandir(path) as entries:
        for each in entries:
            if each.is_dir(follow_symlinks=False):
                remove_tree(each.path)
            else:
                os.unlink(each.path)
    os.rmdir(path)
