# SPDX-License-Identifier: BSD-2-Clause
"""Mend what a person broke in a dispatcher's folder: a missing pin, a foreign file, a link that was severed.

Whatever of it the kernel still holds is found by its id, from the program or the link.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from pyskl import folders
from pyskl.errors import Damaged, NoSuchPin
from pyskl.link import Link
from pyskl.maps import Map
from pyskl.netns import NetNS
from pyskl.pinned import ASKING, NEW, PROGRAMS, TABLE, check_abi, finish_upgrade, granted, is_made_for, set_modes
from pyskl.program import Program
from pyskl.store import EXPLAIN, MAPS, PROGRAM, load_object

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyskl.pinning import StrPath


def repair(path: StrPath, *, timeout: float) -> tuple[str, ...]:
    """Mend a folder: what was done, in sentences.

    Raises:
        NotLoaded: there is nothing.
        Incompatible: another version made it.
        Damaged: it can't be mended.
        PermissionDenied: the process lacks CAP_SYS_ADMIN, which opening by id needs.
        Busy: another process held the lock for too long.
    """
    name = folders.checked(path)
    folders.clean_up(name)
    folder = folders.open_folder(name)
    try:
        folders.lock(folder, name, timeout)
        folders.check_there(folder, name)
        with contextlib.ExitStack() as closing:
            group, group_sockets = granted(name)
            done = tuple(_Mending(name, closing).steps())
            if done:
                set_modes(name, group, group_sockets=group_sockets)
            return done
    finally:
        os.close(folder)


def foreign(name: str) -> list[str]:
    """List what is in a dispatcher's folder and none of its."""
    known = {*MAPS, *PROGRAMS.values(), *(pin + NEW for pin in PROGRAMS.values()), folders.LINK, ASKING}
    return sorted(each for each in os.listdir(name) if each not in known and not each.startswith(TABLE))


class _Mending:
    """What is being mended, and what of it was found."""

    def __init__(self, name: str, closing: contextlib.ExitStack) -> None:
        self._name = name
        self._closing = closing
        self._link: Link | None = self._open(Link, folders.LINK)
        self._program: Any = self._open(Program, PROGRAMS[PROGRAM])
        self._maps: dict[str, Any] = {}

    def steps(self) -> Iterator[str]:
        """Mend one thing after the other."""
        yield from self._programs()
        yield from self._missing_maps()
        yield from self._foreign()
        yield from self._tables()
        yield from self._severed()
        yield from self._explaining()

    def _there(self, pin: str) -> bool:
        return os.path.lexists(os.path.join(self._name, pin))

    def _open(self, kind: Any, pin: str) -> Any:
        with contextlib.suppress(NoSuchPin):
            return self._closing.enter_context(kind.from_pin(os.path.join(self._name, pin)))
        return None

    def _pin(self, thing: Any, pin: str) -> None:
        path = os.path.join(self._name, pin)
        thing.pin(path)
        os.chmod(path, 0o600)

    def _foreign(self) -> Iterator[str]:
        for each in foreign(self._name):
            path = os.path.join(self._name, each)
            if os.path.isdir(path):
                folders.remove_tree(path)
            else:
                os.unlink(path)
            yield f"removed {each!r}, which is none of the dispatcher's"

    def _programs(self) -> Iterator[str]:
        if self._program is not None:
            return
        if self._link is None:
            raise Damaged(f"neither the program nor the link of {self._name!r} is there: unload it, and load it anew")
        self._program = self._closing.enter_context(Program.from_id(self._link.info.prog_id))
        self._pin(self._program, PROGRAMS[PROGRAM])
        yield "pinned the program again, which the link holds"

    def _missing_maps(self) -> Iterator[str]:
        missing = {each for each in MAPS if not self._there(each)}
        held: dict[str, Any] = {}
        for program in (self._program, self._open(Program, PROGRAMS[EXPLAIN])) if missing else ():
            for number in (program and program.info.map_ids) or ():
                found: Any = self._closing.enter_context(Map.from_id(number))
                held[found.info.name] = found
        for each in sorted(MAPS - missing):
            self._maps[each] = self._open(Map, each)
        state = self._maps.get("state", held.get("state"))
        if state is not None:
            check_abi(self._name, state)  # what of another version's is foreign, this one can't tell
        for each in sorted(missing):
            if each not in held:
                raise Damaged(f"the map {each!r} of {self._name!r} is lost: unload it, and load it anew")
            self._maps[each] = held[each]
            self._pin(held[each], each)
            yield f"pinned the map {each!r} again, which the programs hold"

    def _tables(self) -> Iterator[str]:
        number = self._maps["tables"][0]
        if not self._there(f"{TABLE}{number}"):
            table: Any = self._closing.enter_context(Map.from_id(number))
            self._pin(table, f"{TABLE}{number}")
            yield "pinned the table again, which the programs hold"
        for each in sorted(os.listdir(self._name)):
            if each.startswith(TABLE) and each != f"{TABLE}{number}":
                os.unlink(os.path.join(self._name, each))
                yield f"removed {each!r}, which is not in force"

    def _severed(self) -> Iterator[str]:
        if self._link is not None and self._link.info.netns_inode:
            finish_upgrade(self._name, self._link)
            return
        with NetNS.current() as here:
            if not is_made_for(here, memoryview(self._maps["state"][0]).cast("Q")):
                raise Damaged(
                    f"the dispatcher at {self._name!r} is attached to nothing: mend it in its own network namespace"
                )
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._name, folders.LINK))
            self._link = self._closing.enter_context(self._program.attach(here))
        self._pin(self._link, folders.LINK)
        yield "attached the program again, whose link was severed"

    def _explaining(self) -> Iterator[str]:
        if not self._there(ASKING):
            os.mkdir(os.path.join(self._name, ASKING), 0o700)
            yield f"made the folder {ASKING!r} again"
        if not self._there(PROGRAMS[EXPLAIN]):
            with load_object(programs=(EXPLAIN,), reuse={each: self._maps[each] for each in MAPS}) as loaded:
                self._pin(loaded.programs[EXPLAIN], PROGRAMS[EXPLAIN])
            yield "loaded the program that explains again"
