# SPDX-License-Identifier: BSD-2-Clause
"""A whole ELF object: every program and map in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyskl import loader
from pyskl._fd import Closable, Held
from pyskl.program import Program, adopt

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pyskl.maps import Map


class BpfObject(Closable):
    """The programs and maps of an ELF object, loaded together.

    `close()` closes all that nobody holds; a `Program` or `Map` that was taken out lives until its own `close()`.
    """

    _closed = True  # until there is something to close

    def __init__(self, programs: dict[str, Program], maps: dict[str, Map[Any, Any]]) -> None:
        self._programs = Held("program", programs)
        self._maps = Held("map", maps)
        self._closed = False

    @classmethod
    def load(
        cls,
        source: loader.Source,
        *,
        programs: Iterable[str] | None = None,
        constants: Mapping[str, loader.Constant] | None = None,
        max_entries: Mapping[str, int] | None = None,
        reuse: Mapping[str, Map[Any, Any]] | None = None,
        log_level: int = 0,
    ) -> BpfObject:
        """Load an ELF object: what clang makes of a BPF program, with BTF (``clang -g -target bpf``).

        A map with ``LIBBPF_PIN_BY_NAME`` is not pinned by this: `Map.pin`, and `reuse`, say where it lives.

        Args:
            source: the path of the object, or its bytes.
            programs: the names of those to load; all of them where None.
            constants: values for ``const volatile`` globals, by name: an int, or the bytes of any other type.
            max_entries: sizes for maps, by name.
            reuse: existing maps to put in the place of the object's, by name; of the same type, key and value size.
            log_level: how much the verifier tells the logger ``pyskl.libbpf`` (1: its steps, 2: more, 4: statistics);
                0: nothing but why it rejects a program.

        Raises:
            FileNotFoundError: there is no such file.
            KeyError: the object has no program, constant or map of a name.
            ValueError: a value does not fit.
            VerifierError: the verifier rejected a program.
            PermissionDenied: the process lacks a capability (CAP_BPF, for sockmaps CAP_NET_ADMIN too).
            BpfError: it is not an object (ENOEXEC), or libbpf or the kernel refused it.
        """
        with loader.open_object(source) as opened:
            chosen = programs if programs is None or isinstance(programs, str) else tuple(programs)
            return cls(*adopt(*loader.load(opened, chosen, constants, max_entries, reuse, log_level)))

    @property
    def programs(self) -> Mapping[str, Program]:
        """The programs that were loaded, by the names of their functions."""
        return self._programs

    @property
    def maps(self) -> Mapping[str, Map[Any, Any]]:
        """The maps, by name; those of global variables are ``".rodata"``, ``".data"`` and ``".bss"``."""
        return self._maps

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    def close(self) -> None:
        """Close the programs and maps, but for those that somebody holds. Calling it again does nothing."""
        self._closed = True
        self._programs.release()
        self._maps.release()

    def __repr__(self) -> str:
        return f"<BpfObject {'closed' if self._closed else ', '.join(self._programs)}>"
