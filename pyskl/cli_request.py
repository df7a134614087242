# SPDX-License-Identifier: BSD-2-Clause
"""What every verb of the command has: the options, the arguments that several take, and how it is called."""

from __future__ import annotations

import contextlib
import functools
import grp
import shlex
import signal
import sys
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from pyskl import cli_errors, cli_output
from pyskl.address import parse_host_port
from pyskl.binding import check_label
from pyskl.cli_output import write_json
from pyskl.dispatcher import Dispatcher
from pyskl.netns import NetNS
from pyskl.paths import default_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pyskl.binding import PortsLike

    Verb = TypeVar("Verb", bound=Callable[..., int | None])


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any, Any]
else:
    _ParamType = click.ParamType  # which older versions have without parameters


def count(number: int, one: str, several: str) -> str:
    """Say how many."""
    return f"{number} {one if number == 1 else several}"


class Request:
    """What the options that every verb has say, wherever they stand."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._path: str | None = options.get("path")
        self._netns: str | None = options.get("netns")
        self.json: bool = bool(options.get("json"))
        self.quiet: bool = bool(options.get("quiet"))

    @property
    def has_path(self) -> bool:
        """Whether a folder was named."""
        return self._path is not None

    @contextlib.contextmanager
    def netns(self) -> Iterator[NetNS]:
        """Open the namespace that is meant."""
        with self._open_netns() as opened:
            yield opened

    def _open_netns(self) -> NetNS:
        if self._netns is None:
            return NetNS.current()
        try:
            return NetNS.from_path(self._netns) if "/" in self._netns else NetNS.named(self._netns)
        except FileNotFoundError:
            raise ValueError(f"--netns: there is no network namespace {self._netns!r}: 'ip netns list'") from None

    @property
    def inside(self) -> str:
        """What runs another command in the namespace that is meant, for commands that are shown."""
        if self._netns is None:
            return ""
        path = self._netns if "/" in self._netns else f"/run/netns/{self._netns}"
        return f"nsenter --net={shlex.quote(path)} "

    @property
    def path(self) -> str:
        """The dispatcher's folder."""
        if self._path is not None:
            return self._path
        with self.netns() as netns:
            return default_path(netns)

    def read(self) -> Dispatcher:
        """Open the dispatcher to ask it something."""
        return Dispatcher.open(self.path, read_only=True)

    def write(self) -> Dispatcher:
        """Open the dispatcher to change something."""
        return Dispatcher.open(self.path)

    def answer(self, members: dict[str, Any], lines: Iterable[str]) -> None:
        """Print what was asked for."""
        if self.json:
            write_json(members)
        else:
            print_lines(lines)

    def confirm(self, members: dict[str, Any], lines: Iterable[str]) -> None:
        """Print what was done, to who wants to read it."""
        if self.json or not self.quiet:
            self.answer(members, lines)

    def warn(self, text: str) -> None:
        """Say on standard error what is not as it should be."""
        if not self.quiet:
            click.echo(f"warning: {text}", err=True)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on standard output."""
    file = cli_output.out()
    for line in lines:
        file.write(f"{line}\n")


def _keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value:
        ctx.ensure_object(dict)[parameter.name] = value


_GLOBAL: Final = (
    click.option("--path", metavar="FOLDER", type=click.Path(readable=False), help="The dispatcher's folder on bpffs."),
    click.option("--netns", metavar="NAME|PATH", help="The network namespace, by ip-netns's name or by a path."),
    click.option("--json", is_flag=True, help="Print one JSON document."),
    click.option("--quiet", is_flag=True, help="Print neither confirmations nor warnings."),
)


def _with_global_options(function: Any) -> Any:
    for option in reversed(_GLOBAL):
        function = option(function)
    for parameter in function.__click_params__[-len(_GLOBAL) :]:
        parameter.expose_value, parameter.callback = False, _keep
    return function


_ORDER: Final = [
    "load",
    "unload",
    "upgrade",
    "status",
    "sockets",
    "bindings",
    "bind",
    "unbind",
    "load-bindings",
    "policy",
    "register",
    "register-pid",
    "unregister",
    "explain",
    "trace",
    "metrics",
    "doctor",
    "hold",
    "run",
]


class Ended(BaseException):
    """A signal ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Commands(click.Group):
    """The verbs, in an order that makes sense."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as it is called
        """List the verbs."""
        return [name for name in _ORDER if name in self.commands]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; here the signals' exceptions are caught, which click would make its own thing of."""
        try:
            status = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
        except KeyboardInterrupt:
            raise Ended(signal.SIGINT) from None
        except BrokenPipeError:  # whoever read standard output has read enough
            raise Ended(signal.SIGPIPE) from None
        return status


@click.group(cls=_Commands, no_args_is_help=False, invoke_without_command=False)
@click.version_option(package_name="pyskl", message="pyskl %(version)s")
@_with_global_options
def commands() -> None:
    """Steer connections to sockets: which addresses and ports lead to which label, and which sockets serve it."""


def verb(name: str, **how: Any) -> Callable[[Verb], Verb]:
    """Make a function a verb: it gets a `Request` before its own arguments."""

    def decorate(function: Verb) -> Verb:
        @functools.wraps(function)
        def run(**arguments: Any) -> int | None:
            return function(Request(click.get_current_context().ensure_object(dict)), **arguments)

        commands.command(name, **how)(_with_global_options(run))
        return function

    return decorate


class Checked(_ParamType):
    """An argument that one of pyskl's own functions checks."""

    def __init__(
        self, name: str, check: Callable[[str], Any], complete: Callable[[Request], Iterable[str]] = lambda _: ()
    ) -> None:
        self.name = name
        self._check = check
        self._complete = complete

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check a word of the command line."""
        try:
            return self._check(value)
        except (ValueError, UnicodeError) as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:  # noqa: ARG002
        """Tell a shell which words there can be."""
        from click.shell_completion import CompletionItem  # noqa: PLC0415 - for a shell alone

        with contextlib.suppress(*cli_errors.EXPECTED):
            words = self._complete(Request(ctx.ensure_object(dict)))
            return [CompletionItem(word) for word in words if word.startswith(incomplete)]
        return []


def _known_labels(request: Request) -> list[str]:
    with request.read() as dispatcher:
        return [each.label for each in dispatcher.status().labels]


def _group(name: str) -> int:
    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ValueError(f"there is no group {name!r}") from None


GROUP: Final = Checked("group", _group)
LABEL: Final = Checked("label", check_label, _known_labels)
ADDRESS: Final = Checked("address", parse_host_port)
PROTOCOL: Final = click.Choice(["tcp", "udp"], case_sensitive=False)
FAMILY: Final = click.Choice(["ipv4", "ipv6"], case_sensitive=False)
SLOT: Final = click.IntRange(0, 63)
PORT: Final = click.IntRange(0, 65535)

label_argument: Final = click.argument("label", type=LABEL)
label_filter: Final = click.argument("label", type=LABEL, required=False)


def ports_of(ports: Sequence[str]) -> PortsLike | list[PortsLike]:
    """Take the PORTS of a command line: none of them, or 0, are all."""
    return None if not ports or list(ports) == ["0"] else [*ports]
