# SPDX-License-Identifier: BSD-2-Clause
"""Programs: loaded, attached, run once for a test, and listed."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from pyskl import _sys, loader
from pyskl._fd import Held
from pyskl.address import Address, ProtocolLike, parse_endpoint, parse_protocol
from pyskl.enums import ProgramType, Verdict
from pyskl.errors import BpfError
from pyskl.link import Link
from pyskl.maps import Map
from pyskl.netns import NetNSLike, netns_fd
from pyskl.pinning import KernelObject

if TYPE_CHECKING:
    from collections.abc import Mapping

REDIRECT = os.path.join(os.path.dirname(__file__), "bpf", "redirect.bpf.o")
"""The path of the object that ships with pyskl: its program ``redirect`` sends what arrives for one IPv4 and one IPv6
prefix to the four slots of its sockmap ``sockets``. bpf/redirect.bpf.c says what its constants mean."""


class ProgramInfo(NamedTuple):
    """What the kernel says of a program (struct bpf_prog_info); all but the id is None where it does not tell.

    Attributes:
        id: by which `Program.from_id` opens it.
        type: its type.
        name: of its function, cut to 15 bytes.
        tag: a hash of its instructions, in hexadecimal.
        map_ids: of the maps that it uses.
        run_count: how often it ran, counted while the sysctl kernel.bpf_stats_enabled is 1.
        run_time_ns: how long it ran in all, in nanoseconds, likewise.
        load_time_ns: when it was loaded, in nanoseconds since boot.
        created_by_uid: the user who loaded it.
        verified_insns: how many instructions the verifier looked at (Linux 5.16).
        xlated_size: of its instructions as the kernel keeps them, in bytes.
        jited_size: of its machine code, in bytes; 0 where the interpreter runs it.
        btf_id: of its type information, or 0.
    """

    id: int
    type: ProgramType | None = None
    name: str | None = None
    tag: str | None = None
    map_ids: tuple[int, ...] | None = None
    run_count: int | None = None
    run_time_ns: int | None = None
    load_time_ns: int | None = None
    created_by_uid: int | None = None
    verified_insns: int | None = None
    xlated_size: int | None = None
    jited_size: int | None = None
    btf_id: int | None = None


class TestRun(NamedTuple):
    """What a program decided about one look-up.

    Attributes:
        verdict: what it returned.
        cookie: of the socket that it selected (`socket_cookie`), or 0.
        duration_ns: the mean of a run, in nanoseconds.
    """

    verdict: Verdict
    cookie: int
    duration_ns: int


TestRun.__test__ = False  # type: ignore[attr-defined] # for pytest, which would take it for a test


class Program(KernelObject):
    """A program in the kernel: kept as long as an fd, a pin or a link refers to it."""

    _kind = "prog"
    _maps: Held[Map[Any, Any]] | None = None  # once they were asked for, or loaded with it
    _type: ProgramType | None = None  # once it was asked for

    @classmethod
    def load(
        cls,
        source: loader.Source,
        name: str | None = None,
        *,
        constants: Mapping[str, loader.Constant] | None = None,
        max_entries: Mapping[str, int] | None = None,
        reuse: Mapping[str, Map[Any, Any]] | None = None,
        log_level: int = 0,
    ) -> Program:
        """Load one program of an ELF object, with its maps.

        Args:
            source: the path of the object, or its bytes.
            name: of the program, where the object has several.
            constants: see `BpfObject.load`, as for the other arguments and the errors.
            max_entries: likewise.
            reuse: likewise.
            log_level: likewise.

        Raises:
            ValueError: the object has several programs, or none, and no name was given.
            KeyError: it has none of this name.
        """
        with loader.open_object(source) as opened:
            names = list(opened.programs)
            if name is None and len(names) != 1:
                raise ValueError(f"the object's programs are {', '.join(names) or 'none'}: name one")
            chosen = names if name is None else (name,)
            loaded, made = adopt(*loader.load(opened, chosen, constants, max_entries, reuse, log_level))
        (program,) = loaded.values()
        for each in made.keys() - program.maps.keys():
            made[each].close()
        return program

    @property
    def info(self) -> ProgramInfo:
        """What the kernel says of the program now (``BPF_OBJ_GET_INFO_BY_FD``)."""
        found, map_ids = _sys.prog_info(self.fileno())
        return ProgramInfo(
            found.id,
            ProgramType(found.type),
            _sys.text(found.name),
            bytes(found.tag).hex(),
            map_ids,
            found.run_cnt,
            found.run_time_ns,
            found.load_time,
            found.created_by_uid,
            found.verified_insns,
            found.xlated_prog_len,
            found.jited_prog_len,
            found.btf_id,
        )

    @property
    def maps(self) -> Mapping[str, Map[Any, Any]]:
        """The maps that the program uses, by name.

        Those of a program that was loaded by this object have the names that they have in its source; of any other the
        kernel's, which are cut to 15 bytes, and opening them needs CAP_SYS_ADMIN.
        """
        fd = self.fileno()
        if self._maps is None:
            self._maps = _open_maps(_sys.prog_info(fd)[1])
        return self._maps

    def close(self) -> None:
        """Close the program's fd, and its maps but for those that somebody holds. Links keep it attached."""
        super().close()
        held, self._maps = self._maps, None
        if held is not None:
            held.release()

    def attach(self, netns: NetNSLike = None) -> Link:
        """Attach the program to a network namespace, behind those that are attached already (``BPF_LINK_CREATE``).

        Args:
            netns: the namespace; the calling thread's own where None.

        Raises:
            ValueError: the program is not of type SK_LOOKUP, or `netns` is no network namespace.
            BpfError: 64 programs are attached already (E2BIG).
        """
        self._must_be_sk_lookup("attached to a network namespace")
        with netns_fd(netns) as fd:
            return Link(_sys.link_create(self.fileno(), fd))

    def test_run(
        self,
        protocol: ProtocolLike,
        destination: Address,
        source: Address,
        *,
        repeat: int = 1,
    ) -> TestRun:
        """Ask the program what it would do with a packet, which nobody sends (``BPF_PROG_TEST_RUN``).

        Args:
            protocol: ``"tcp"`` or ``"udp"``.
            destination: (host, port) of this host.
            source: (host, port) of the peer.
            repeat: how often to run it, for `TestRun.duration_ns`.

        Raises:
            ValueError: the addresses are not of one family, or are none, or the program is not of type SK_LOOKUP.
            BpfError: the program selected a socket of a SO_REUSEPORT group, which a test run can't do (EOPNOTSUPP).
        """
        number = parse_protocol(protocol)
        version, local, local_port = parse_endpoint(destination)
        remote_version, remote, remote_port = parse_endpoint(source)
        if version != remote_version:
            raise ValueError(f"{destination[0]} and {source[0]} are not of one family")
        if not 0 < repeat <= 0x7FFFFFFF:
            raise ValueError(f"repeat is a positive int of 31 bits, not {repeat}")
        self._must_be_sk_lookup("run so")
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        verdict, cookie, duration = _sys.prog_test_run(
            self.fileno(), number, family, local, local_port, remote, remote_port, repeat
        )
        return TestRun(Verdict(verdict), cookie, duration)

    def _must_be_sk_lookup(self, to_be: str) -> None:
        fd = self.fileno()
        if self._type is None:
            self._type = ProgramType(_sys.prog_info(fd)[0].type)
        kind = self._type
        if kind != ProgramType.SK_LOOKUP:
            hint = ""
            if kind == ProgramType.SK_REUSEPORT:
                hint = "; give it to a group: setsockopt(SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, program.fileno())"
            raise ValueError(f"only a program of type SK_LOOKUP can be {to_be}: this is of type {kind.name}{hint}")


def adopt(programs: dict[str, int], maps: dict[str, int]) -> tuple[dict[str, Program], dict[str, Map[Any, Any]]]:
    """Make objects of the fds of a load, which they own; where that fails, all are closed."""
    made_programs: dict[str, Program] = {}
    made_maps: dict[str, Map[Any, Any]] = {}
    try:
        for name in list(maps):
            made_maps[name] = Map.own(maps.pop(name))
        for name in list(programs):
            made_programs[name] = Program.own(programs.pop(name))
        named = {each.info.id: (name, each) for name, each in made_maps.items()}
        for program in made_programs.values():
            used = program.info.map_ids or ()
            program._maps = Held("map", dict(named[number] for number in used if number in named))
    except BaseException:
        for fd in (*maps.values(), *programs.values()):
            os.close(fd)
        for made in (*made_maps.values(), *made_programs.values()):
            made.close()
        raise
    return made_programs, made_maps


def _open_maps(ids: tuple[int, ...]) -> Held[Map[Any, Any]]:
    """Open a program's maps by their ids."""
    found: dict[str, Map[Any, Any]] = {}
    try:
        for number in ids:
            opened: Map[Any, Any] = Map.from_id(number)
            name = _sys.section_name(opened.info.name)
            found[f"{name}#{number}" if name in found else name] = opened
    except BaseException:
        for opened in found.values():
            opened.close()
        raise
    return Held("map", found)


def query(netns: NetNSLike = None) -> tuple[ProgramInfo, ...]:
    """List the sk_lookup programs attached to a namespace, in the order in which they run (``BPF_PROG_QUERY``).

    Args:
        netns: the namespace; the calling thread's own where None.

    Raises:
        PermissionDenied: the process lacks CAP_NET_ADMIN. Without CAP_SYS_ADMIN it gets the ids alone.
    """
    with netns_fd(netns) as fd:
        return tuple(_info_by_id(number) for number in _sys.prog_query(fd))


def _info_by_id(number: int) -> ProgramInfo:
    try:
        with Program.from_id(number) as program:
            return program.info
    except BpfError as error:
        if error.errno not in (errno.EPERM, errno.ENOENT):  # not allowed to open it, or gone since
            raise
        return ProgramInfo(number)
