# SPDX-License-Identifier: BSD-2-Clause
"""The bindings files that process.py and command.py load: python workload.py ENTRIES FOLDER writes them.

Entries are of lookup.py's realistic mixture and of 64 labels, without a protocol, so that each makes two bindings. The
second file has every hundredth entry under another label.
"""

from __future__ import annotations

import ipaddress
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

LABELS = 64
FIRST, CHANGED = "bindings.json", "changed.json"


def label(number: int) -> str:
    return f"service-{number % LABELS}"


def entries(count: int) -> Iterator[dict[str, object]]:
    from lookup import BITS, FAMILIES, realistic

    made = realistic(random.Random(count), count, FAMILIES["both"])
    seen = set()
    while len(seen) < count:
        entry = next(made)._replace(udp=0)
        if entry not in seen:
            seen.add(entry)
            kind = ipaddress.IPv6Network if entry.v6 else ipaddress.IPv4Network
            prefix = kind((entry.prefix << (BITS[entry.v6] - entry.length), entry.length))
            yield {"label": label(len(seen)), "prefix": str(prefix), "port": entry.port or 0}


def write(count: int, folder: Path) -> tuple[Path, Path]:
    """Write both files, in a process of its own: who measures others' memory has little itself."""
    subprocess.run([sys.executable, __file__, str(count), folder], check=True)
    return folder / FIRST, folder / CHANGED


def _write(path: Path, lines: Iterable[dict[str, object]]) -> None:
    path.write_text('{"bindings": [\n' + ",\n".join(map(json.dumps, lines)) + "\n]}\n")


if __name__ == "__main__":
    made = list(entries(int(sys.argv[1])))
    folder = Path(sys.argv[2])
    _write(folder / FIRST, made)
    for place in range(0, len(made), 100):
        made[place]["label"] = label(place)
    _write(folder / CHANGED, made)
