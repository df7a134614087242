# SPDX-License-Identifier: BSD-2-Clause
"""The process of the command: ``pyskl`` and ``python -m pyskl``."""

from __future__ import annotations

import gc
import os
import signal
import sys

_EXTRAS = {"click": "cli", "rich": "cli"}


def main() -> int:
    """Run the command, and end as it ended.

    Returns:
        The exit status.
    """
    gc.disable()  # nothing of what is imported is garbage
    try:
        from pyskl import cli  # noqa: PLC0415 - what it needs may be missing
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        extra = _EXTRAS[package]
        print(f"pyskl: the command needs {package}: pip install 'pyskl[{extra}]'", file=sys.stderr)  # noqa: T201
        return 1
    gc.freeze()  # nor is it walked at the end, which takes as long as a short verb does
    gc.enable()
    status = cli.main()
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:  # which was told; once more, at exit, would be a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if status < 0:  # as an ordinary command, so that the shell knows
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main())
