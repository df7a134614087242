# SPDX-License-Identifier: BSD-2-Clause
"""The table that a dispatcher's program searches: bindings, and the labels' policies, in the memory of one BPF map.

Bindings are packed here (struct pyskl_binding of bpf/abi.h), with the numbers of their labels. A table is built as a
whole; afterwards one prefix at a time can be changed in place.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyskl import _sys
from pyskl.maps import ArrayMap

if TYPE_CHECKING:
    from collections.abc import Mapping

RECORD = _sys.BINDING_SIZE
_SEEDS = 4  # that are tried before the table is made larger
_SPARE = 2  # sixteenths that are left for changes in place


class Table:
    """A table, over its map; `close()` closes that one."""

    def __init__(self, holder: ArrayMap) -> None:
        self.map = holder
        self._memory = None if holder.read_only else holder.mmap()

    @property
    def memory(self) -> memoryview:
        """The table as it is now: shared memory, or a copy for who may only read."""
        return memoryview(self.map.snapshot()).toreadonly() if self._memory is None else self._memory

    @classmethod
    def build(
        cls,
        records: bytes | bytearray,
        labels: int,
        policies: Mapping[int, int],
        number: int = 0,
    ) -> Table:
        """Make a table of bindings that are prepared.

        Args:
            records: the bindings, as `_sys.bindings_prepare` leaves them.
            labels: how many numbers labels can have.
            policies: of labels, by number: words of struct pyskl_policy.
            number: of the table.

        Raises:
            PermissionDenied: the process lacks CAP_BPF.
            BpfError: the kernel has no memory for it (ENOMEM).
        """
        spare = _SPARE
        while True:
            plan = _sys.Plan(records, labels, spare)
            flags = _sys.BPF_F_MMAPABLE | _sys.BPF_F_INNER_MAP
            table = cls(ArrayMap.create(4, _sys.LINE_SIZE, plan.lines, flags=flags, name="table"))
            try:
                for _ in range(_SEEDS):
                    if plan.fill(table.memory, records, int.from_bytes(os.urandom(8), "little"), number):
                        for label, policy in policies.items():
                            _sys.table_set_policy(table.memory, label, policy)
                        return table
                    table.memory[:] = bytes(len(table.memory))
            except BaseException:
                table.close()
                raise
            table.close()
            spare = spare * 2 + 1

    def close(self) -> None:
        """Close the map, which the kernel keeps while a program uses it; the memory goes with the last who reads it."""
        self.map.close()

    def get(self, prefix: bytes) -> bytearray:
        """Give the bindings of the prefix, family and protocol that a packed binding has."""
        return _sys.table_get(self.memory, prefix)

    def set(self, group: bytes | bytearray, count: int) -> bool:
        """Let one prefix have these bindings, prepared, in one step; `group` names it where they are none.

        False: there is no room, and nothing has changed.
        """
        return _sys.table_set(self.memory, group, count)

    def scan(self) -> bytearray:
        """Give all bindings, in no order."""
        return _sys.table_scan(self.memory)

    def uses(self, labels: int) -> list[int]:
        """Count the bindings of each number that a label can have: much sooner than they are read."""
        return _sys.table_uses(self.memory, labels)

    def policy(self, label: int) -> int:
        """Give the policy of a label: the word of a struct pyskl_policy, or 0."""
        return _sys.table_policy(self.memory, label)

    def set_policy(self, label: int, policy: int) -> None:
        """Set the policy of a label, in one step."""
        _sys.table_set_policy(self.memory, label, policy)
