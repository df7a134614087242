# SPDX-License-Identifier: BSD-2-Clause
"""A dispatcher's objects on bpffs, which many processes use.

In the folder (pyskl/folders.py) are pins: of the maps by their names, of the table in force as ``table_ID``, of the
programs as ``program`` and ``explain``, and of the link. Who changes something holds the folder's lock; what somebody
who died left half-done is finished or undone by the next who opens it for writing. Who only reads takes no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
from typing import TYPE_CHECKING, Any

from pyskl import _sys, folders
from pyskl.errors import AlreadyLoaded, BpfError, Damaged, Incompatible, NoSuchPin
from pyskl.link import Link
from pyskl.maps import ArrayMap, Map
from pyskl.netns import NetNS, netns_fd
from pyskl.program import Program
from pyskl.sockets import cookie_of_netns
from pyskl.store import EXPLAIN, MAPS, NETNS_COOKIE, NETNS_INODE, PROGRAM, Store, load
from pyskl.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pyskl.netns import NetNSLike
    from pyskl.pinning import StrPath

ASKING = "asking"  # a folder, whose lock is of those who ask the program
PROGRAMS = {PROGRAM: "program", EXPLAIN: "explain"}  # the pin of each
NEW = "_new"  # after the name of a pin that is to be renamed in the course of an upgrade
TABLE = "table_"
# What who may register sockets writes to.
_OF_SOCKETS = frozenset({"sockets", "siblings", "stayers", "registered", "groups", "labels", "alone", "parking"})


class PinnedStore(Store):
    """A dispatcher's objects on bpffs."""

    def __init__(
        self,
        path: str,
        folder: int,
        netns: NetNS | None,
        programs: Mapping[str, Program],
        maps: Mapping[str, Map[Any, Any]],
        link: Link | None,
        table: Table,
        *,
        read_only: bool,
        timeout: float,
    ) -> None:
        self.path: str | None = path
        self._name = path
        self.read_only = read_only
        self._folder = folder
        self._timeout = timeout
        super().__init__(netns, programs, maps, link, table)

    # --- made, opened, removed ----------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: StrPath,
        netns: NetNSLike,
        max_labels: int,
        max_sockets: int,
        *,
        group: int | None,
        group_sockets: bool,
        timeout: float,
    ) -> PinnedStore:
        """Load, attach and pin in a new folder.

        Raises:
            AlreadyLoaded: there is one.
            BpfError: the path is not on bpffs.
        """
        name = folders.checked(path)
        with contextlib.ExitStack() as unless_done:
            with netns_fd(netns) as fd:
                space = unless_done.enter_context(NetNS.from_fd(fd))
            folders.clean_up(name)
            _check_free(name, space)
            temporary, folder = folders.make(name)
            unless_done.callback(os.close, folder)
            unless_done.callback(folders.remove, temporary)
            loaded = unless_done.enter_context(load(space, max_labels, max_sockets))
            table = Table.build(b"", max_labels + 1, {})
            unless_done.callback(table.close)
            loaded.maps["tables"][0] = table.map
            for each, pinned in loaded.maps.items():
                if each in MAPS:
                    pinned.pin(os.path.join(temporary, each))
            table.map.pin(os.path.join(temporary, f"{TABLE}{table.map.info.id}"))
            for each, pin in PROGRAMS.items():
                loaded.programs[each].pin(os.path.join(temporary, pin))
            os.mkdir(os.path.join(temporary, ASKING), 0o700)
            link = unless_done.enter_context(loaded.programs[PROGRAM].attach(space))
            link.pin(os.path.join(temporary, folders.LINK))
            set_modes(temporary, group, group_sockets=group_sockets)
            folders.rename(temporary, name)
            maps = {each: pinned for each, pinned in loaded.maps.items() if each in MAPS}
            made = cls(name, folder, space, loaded.programs, maps, link, table, read_only=False, timeout=timeout)
            loaded.close()  # what was taken out of it stays
            unless_done.pop_all()
        fcntl.flock(folder, fcntl.LOCK_UN)
        return made

    @classmethod
    def open(cls, path: StrPath, *, read_only: bool, timeout: float) -> PinnedStore:
        """Open what is pinned; for writing, what somebody left half-done is finished or undone first.

        Raises:
            NotLoaded: there is nothing.
            Incompatible: another version made it.
            Damaged: a pin is missing, or the link was severed, or its namespace is gone.
            Busy: another process held the lock for too long.
        """
        name = folders.checked(path)
        if not read_only:
            folders.clean_up(name)
        with contextlib.ExitStack() as unless_done:
            folder = folders.open_folder(name)
            unless_done.callback(os.close, folder)
            if not read_only:
                folders.lock(folder, name, timeout)
                unless_done.callback(fcntl.flock, folder, fcntl.LOCK_UN)
                folders.check_there(folder, name)
            maps = _open_maps(name, unless_done)
            link = _opened(Link, name, folders.LINK, unless_done)
            programs = {}
            if link is not None and not read_only:
                finish_upgrade(name, link)
            for each, pin in PROGRAMS.items():
                program = _opened(Program, name, pin, unless_done)
                if program is not None:
                    programs[each] = program
            netns = None
            if link is not None:
                netns = unless_done.enter_context(_netns_of(name, link, maps["state"]))
            table = _open_table(name, maps["tables"])
            unless_done.callback(table.close)
            if not read_only:
                _drop_tables(name, table)
            made = cls(name, folder, netns, programs, maps, link, table, read_only=read_only, timeout=timeout)
            unless_done.pop_all()
        if not read_only:
            fcntl.flock(folder, fcntl.LOCK_UN)
        return made

    @staticmethod
    def remove(path: StrPath, *, timeout: float) -> None:
        """Detach and remove what is pinned in a folder, whatever state it is in.

        Raises:
            NotLoaded: there is nothing.
            Busy: another process held the lock for too long.
        """
        name = folders.checked(path)
        folders.clean_up(name)
        folder = folders.open_folder(name)
        try:
            folders.lock(folder, name, timeout)
            folders.check_there(folder, name)
            folders.take_away(name)
        finally:
            os.close(folder)

    # --- in use -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[Table]:
        """Hold the lock, and have the table that is in force."""
        with self._locked():
            yield self.table()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of those who change something."""
        if self.read_only:
            raise BpfError(
                errno.EACCES, os.strerror(errno.EACCES), call="flock", hint="it was opened for reading alone"
            )
        with self._lock:
            folders.lock(self._folder, self._name, self._timeout)
            try:
                folders.check_there(self._folder, self._name)
                yield
            finally:
                fcntl.flock(self._folder, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[Table]:
        """Hold the lock of those who ask the program, and have the table that is in force."""
        with self._lock:
            try:
                asking = os.open(os.path.join(self._name, ASKING), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                folders.check_there(self._folder, self._name)
                raise _missing(self._name, ASKING) from None
            try:
                fcntl.flock(asking, fcntl.LOCK_EX)
                yield self.table()
            finally:
                os.close(asking)

    def table(self) -> Table:
        """Give the table that is in force, which another process may have replaced."""
        with self._lock:
            if self.maps["tables"][0] != self._table.map.info.id:
                before, self._table = (
                    self._table,
                    _open_table(self._name, self.maps["tables"]),
                )
                before.close()
            return self._table

    def swap(self, table: Table) -> None:
        """Put another table in force, in one step; on return no look-up sees the old one any more."""
        pin = os.path.join(self._name, f"{TABLE}{table.map.info.id}")
        model = os.stat(os.path.join(self._name, "tables"))
        try:
            table.map.pin(pin)
            os.chown(pin, -1, model.st_gid)
            os.chmod(pin, model.st_mode & 0o777)
            super().swap(table)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(pin)
            raise
        _drop_tables(self._name, table)

    def upgrade(self) -> None:
        """Put the programs of this version in the place of those that run."""
        with self.writing():
            new = self.new_programs()
            try:
                for each, pin in PROGRAMS.items():
                    new[each].pin(os.path.join(self._name, pin + NEW))
                    os.chmod(os.path.join(self._name, pin + NEW), 0o600)
                self._take(new)
                finish_upgrade(self._name, self.attached())
            except BaseException:
                finish_upgrade(self._name, self.attached())
                raise

    def unload(self) -> None:
        """Detach and remove just this one."""
        with self._locked():
            folders.take_away(self._name)

    def close(self) -> None:
        """Close what this process has open of it."""
        super().close()
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)


# --- pins -------------------------------------------------------------------------------------------------------------


def granted(folder: str) -> tuple[int | None, bool]:
    """Tell the group that may read what is in a folder, None where none may, and whether it may register sockets."""
    maps = [os.stat(os.path.join(folder, each)) for each in os.listdir(folder) if each in MAPS]
    group = os.stat(folder).st_gid if any(each.st_mode & stat.S_IRGRP for each in maps) else None
    return group, any(each.st_mode & stat.S_IWGRP for each in maps)


def set_modes(folder: str, group: int | None, *, group_sockets: bool) -> None:
    """Let a group read, and register sockets where that was asked for; programs and the link are of the owner alone."""
    for each in os.listdir(folder):
        path = os.path.join(folder, each)
        if each in {*PROGRAMS.values(), folders.LINK, ASKING} or group is None:
            mode = 0o700 if each == ASKING else 0o600
        else:
            mode = 0o660 if group_sockets and each in _OF_SOCKETS else 0o640
            os.chown(path, -1, group)
        os.chmod(path, mode)
    if group is not None:
        os.chown(folder, -1, group)
    os.chmod(folder, 0o750)  # noqa: S103 - the group looks for pins in it


def _open_maps(name: str, unless_done: contextlib.ExitStack) -> dict[str, Map[Any, Any]]:
    """Open the maps, for writing where that may be."""
    maps = {}
    for each in ("state", *sorted(MAPS - {"state"})):
        path = os.path.join(name, each)
        try:
            maps[each] = unless_done.enter_context(_open_map(path))
        except NoSuchPin:
            raise _missing(name, each) from None
        if each == "state":
            check_abi(name, maps[each])
    return maps


def check_abi(name: str, state: Any) -> None:
    """See that a dispatcher has the maps of this version."""
    abi = int.from_bytes(state[0][:8], sys.byteorder)
    if abi != _sys.ABI:
        raise Incompatible(
            f"the dispatcher at {name!r} has ABI {abi}, and this version of pyskl has {_sys.ABI}: "
            "unload it and load it anew"
        )


def _open_map(path: str) -> Map[Any, Any]:
    """Open a map, for reading alone where this user may no more."""
    try:
        return Map.from_pin(path)
    except BpfError as error:
        if error.errno not in {errno.EACCES, errno.EPERM}:
            raise
    return Map.from_pin(path, read_only=True)


def _missing(name: str, pin: str) -> Damaged:
    return Damaged(f"the dispatcher at {name!r} lacks its pin {pin!r}: mend it (doctor --repair), or unload it")


def _opened(kind: Any, name: str, pin: str, unless_done: contextlib.ExitStack) -> Any:
    """Open a program or the link; None where this user may not."""
    try:
        return unless_done.enter_context(kind.from_pin(os.path.join(name, pin)))
    except NoSuchPin:
        raise _missing(name, pin) from None
    except BpfError as error:
        if error.errno not in {errno.EACCES, errno.EPERM}:
            raise
        return None


def _open_table(name: str, tables: Any) -> Table:
    while True:
        number = tables[0]
        try:
            holder: Any = _open_map(os.path.join(name, f"{TABLE}{number}"))
        except NoSuchPin:
            if number == tables[0]:
                raise _missing(name, f"{TABLE}{number}") from None
            continue  # it was replaced just now
        return Table(holder)


def _drop_tables(name: str, but: Table) -> None:
    """Remove the pins of tables that are not in force."""
    for each in os.listdir(name):
        if each.startswith(TABLE) and each != f"{TABLE}{but.map.info.id}":
            with contextlib.suppress(PermissionError):  # one who may register sockets, and no more
                os.unlink(os.path.join(name, each))


def finish_upgrade(name: str, link: Link) -> None:
    """Finish an upgrade where the link has the new program, else undo it."""
    new = os.path.join(name, PROGRAMS[PROGRAM] + NEW)
    try:
        with Program.from_pin(new) as program:
            done = program.info.id == link.info.prog_id
    except NoSuchPin:
        done = not os.path.exists(os.path.join(name, PROGRAMS[PROGRAM] + NEW)) and _runs(name, link)
    for pin in sorted(PROGRAMS.values()):  # "explain" first: the other tells what to do
        path = os.path.join(name, pin + NEW)
        with contextlib.suppress(FileNotFoundError):
            if done:
                os.rename(path, path.removesuffix(NEW))
            else:
                os.unlink(path)


def _runs(name: str, link: Link) -> bool:
    with contextlib.suppress(NoSuchPin), Program.from_pin(os.path.join(name, PROGRAMS[PROGRAM])) as program:
        return program.info.id == link.info.prog_id
    return False


# --- the namespace ----------------------------------------------------------------------------------------------------


def _netns_of(name: str, link: Link, state: Any) -> NetNS:
    """Open the namespace that a dispatcher's link is attached to.

    Raises:
        Damaged: it is gone, or the link was severed; or it is not that which the dispatcher was made for.
    """
    inode = link.info.netns_inode
    words = memoryview(state[0]).cast("Q")
    if not inode:
        raise Damaged(
            f"the dispatcher at {name!r} is attached to nothing: its network namespace is gone, or its link was "
            "severed; mend it in its namespace (doctor --repair), or unload it"
        )
    for found in _namespaces():
        if found.inode == inode and is_made_for(found, words):
            return found
        found.close()
    raise Damaged(
        f"the network namespace {inode} of the dispatcher at {name!r} can't be found: no process or file has it"
    )


def _namespaces() -> Iterator[NetNS]:
    """Open the namespaces that can be found: the thread's own, those with a name, of processes, and of their fds."""
    yield NetNS.current()
    with contextlib.suppress(OSError):
        for named in os.listdir("/run/netns"):
            with contextlib.suppress(OSError, ValueError):
                yield NetNS.named(named)
    processes = [pid for pid in os.listdir("/proc") if pid.isdecimal()]
    for pid in processes:
        with contextlib.suppress(OSError):
            yield NetNS.from_pid(int(pid))
    for pid in processes:
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}").startswith("net:"):
                        yield NetNS.from_path(f"/proc/{pid}/fd/{fd}")


def _check_free(name: str, netns: NetNS) -> None:
    """See that there is no dispatcher at a path; one whose namespace is gone is removed."""
    if not os.path.lexists(name):
        return
    try:
        with Link.from_pin(os.path.join(name, folders.LINK)) as link:
            severed = not link.info.netns_inode
        with ArrayMap.from_pin(os.path.join(name, "state")) as state:
            words = memoryview(state[0]).cast("Q")
    except (OSError, TypeError):
        severed = False
    if not severed or is_made_for(netns, words):
        hint = ", but its link was severed: mend it (doctor --repair), or unload it" if severed else ""
        raise AlreadyLoaded(f"a dispatcher is at {name!r} already{hint}")
    PinnedStore.remove(name, timeout=0)


def is_made_for(netns: NetNS, state: memoryview) -> bool:
    """Whether a namespace is that which a dispatcher was made for; its inode alone may be another's since."""
    if state[NETNS_COOKIE]:
        with contextlib.suppress(OSError):
            return bool(cookie_of_netns(netns) == state[NETNS_COOKIE])
    return bool(netns.inode == state[NETNS_INODE])
