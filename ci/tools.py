# SPDX-License-Identifier: BSD-2-Clause
"""What ci/vm.py and its parts share: where things are, and how commands are run."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent
BUILD = TOP / ".build"
CACHE = Path(os.environ.get("PYSKL_CACHE", BUILD)) / "kernels"
RUN = BUILD / "vm"  # a folder for each kernel; and while they run, the images and the jobs


class Failure(Exception):
    """Something that whoever started this can act on."""


def say(text: str) -> None:
    print(f"\033[1m== {text}\033[0m", flush=True)


def run(*command: object, **how: Any) -> str:
    """Give what a command prints, or Failure with what it says."""
    words = [*map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **how)
    if done.returncode:
        raise Failure(f"{shlex.join(words)[:200]}: {(done.stderr or done.stdout).strip()[-400:]}")
    return str(done.stdout)


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
