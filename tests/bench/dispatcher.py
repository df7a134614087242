# SPDX-License-Identifier: BSD-2-Clause
"""Measure the dispatcher: python tests/bench/dispatcher.py [PART …] [--quick] [--folder FOLDER], as root, with clang.

Parts, all of them unless some are named, each in a process of its own:
    lookup: what one look-up takes, beside two in an LPM trie, the floor, and the limit of one cache line
    process: a million bindings loaded, replaced, changed one by one and asked for inside a process; memory
    command: the same by the command `pyskl`, beside what tubular takes
    traffic: datagrams and connections end to end
Each prints a table with the goals beside the figures, and writes PART.json into the folder; lookup a plot too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("lookup", "process", "command", "traffic")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="fewer bindings, questions and rounds")
    parser.add_argument("--folder", type=Path, default=Path(".build/bench"))
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part is called {' or '.join(sorted(unknown))}: {', '.join(PARTS)}")
    failed = 0
    for part in options.parts or PARTS:
        print(f"== {part}", flush=True)
        command = [sys.executable, HERE / f"{part}.py", "--json", options.folder / f"{part}.json"]
        command += ["--plot", options.folder / "lookup.svg"] if part == "lookup" else []
        command += ["--quick"] if options.quick else []
        failed |= subprocess.run(command, check=False).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
