# SPDX-License-Identifier: BSD-2-Clause
"""Labels and their numbers: the map ``names`` of a dispatcher.

A number that was given to a label stays with it while anything can still hold it: a binding, a socket, a policy. Only
when all numbers are given are those of labels that have nothing any more taken back.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

from pyskl.errors import LimitReached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyskl.maps import HashMap

_ORDER = sys.byteorder
_CHANGES = 3  # the word of struct pyskl_state that counts the changes of names
_NAME_SIZE = 256  # struct pyskl_name: the length, then the text


class Labels:
    """The labels of a dispatcher; what is changed here is changed for all who have it open."""

    def __init__(self, names: HashMap, state: memoryview) -> None:
        self._map: Any = names  # by int
        self._state = state.cast("Q")
        self._seen = -1
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}
        self._names: dict[int, str] = {}

    @property
    def limit(self) -> int:
        """How many labels there can be; number 0 is of none."""
        return int(self._map.info.max_entries) - 1

    def numbers(self) -> dict[str, int]:
        """Give the number of each label."""
        self._refresh()
        return self._numbers

    def names(self) -> dict[int, str]:
        """Give the label of each number."""
        self._refresh()
        return self._names

    def _refresh(self) -> None:
        with self._lock:
            while self._seen != (changes := self._state[_CHANGES]):
                names = {
                    int.from_bytes(key, _ORDER): value[1 : 1 + value[0]].decode() for key, value in self._map.items()
                }
                self._names, self._numbers = names, {name: number for number, name in names.items()}
                self._seen = changes

    def assign(self, labels: Iterable[str], unused: Callable[[], set[int]]) -> dict[str, int]:
        """Give a number to each label that has none, and tell all numbers.

        Args:
            labels: the labels.
            unused: takes back and tells the numbers that nothing holds any more; asked only when there are none left.

        Raises:
            LimitReached: there are not enough; nothing has changed.
        """
        known = self.numbers()
        new = [label for label in dict.fromkeys(labels) if label not in known]
        if not new:
            return known
        free = [number for number in range(1, self.limit + 1) if number not in self._names]
        if len(free) < len(new):
            dropped = unused() - set(free)
            if len(free) + len(dropped) < len(new):
                raise LimitReached(
                    f"no room for {len(new)} more labels: {len(known) - len(dropped)} of {self.limit} are in use; "
                    "create the dispatcher with more max_labels"
                )
            for number in dropped:
                del self._map[number]
            free += dropped
        for label, number in zip(new, free, strict=False):
            text = label.encode()
            self._map[number] = bytes([len(text)]) + text.ljust(_NAME_SIZE - 1, b"\0")
        self._state[_CHANGES] += 1
        return self.numbers()
