# SPDX-License-Identifier: BSD-2-Clause
"""The command: all its verbs, and how it ends (docs/command.md)."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Final

import click

from pyskl import cli_bindings, cli_errors, cli_processes, cli_questions, cli_sockets, cli_state
from pyskl.cli_request import Ended, commands

if TYPE_CHECKING:
    from collections.abc import Sequence

VERBS: Final = (cli_state, cli_bindings, cli_sockets, cli_questions, cli_processes)  # each adds its own to `commands`
_SILENT: Final = logging.NullHandler()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; those of this process where None.

    Returns:
        The exit status; a negative number where a signal ended it, as in `subprocess`.
    """
    logging.getLogger("pyskl").addHandler(_SILENT)  # what is to be said is said in one line, below
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return int(commands.main(words, prog_name="pyskl", standalone_mode=False) or 0)
    except Ended as ended:
        return -ended.number
    except cli_errors.EXPECTED as error:
        verb = next((word for word in words if word in commands.commands), None)
        click.echo(cli_errors.line_of(error, verb), err=True)
        return cli_errors.status_of(error)
