"""The command: each verb, in a person's form and in JSON, good and bad, on the kernel's own state."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import support
from hypothesis import given
from hypothesis import strategies as st

import pyskl
from pyskl import cli, cli_output

pytestmark = [support.needs("sk_lookup"), pytest.mark.slow]


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: object, stdin: str = "") -> Result:
    """The command in this process, with streams of its own."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin.encode()))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main([str(argument) for argument in arguments])
    finally:
        sys.stdin = before
    return Result(status, out.getvalue(), err.getvalue())


class Tool:
    """The command for one dispatcher."""

    def __init__(self, path: Path, ns: pyskl.NetNS, name: str) -> None:
        self.path = str(path)
        self.ns = ns
        self.options = ("--path", self.path, "--netns", name)

    def __call__(self, *arguments: object, stdin: str = "") -> Result:
        return run(*self.options, *arguments, stdin=stdin)

    def ok(self, *arguments: object, stdin: str = "") -> str:
        """What a verb prints that works, and says nothing on standard error."""
        result = self(*arguments, stdin=stdin)
        assert (result.status, result.err) == (0, "")
        return result.out

    def json(self, *arguments: object, stdin: str = "") -> Any:
        result = self(*arguments, "--json", stdin=stdin)
        assert result.status == 0, result.err
        return result.json

    def refused(self, status: int, *arguments: object, stdin: str = "") -> str:
        """The one line that a verb says that does not work."""
        result = self(*arguments, stdin=stdin)
        assert (result.status, result.out) == (status, "")
        assert result.err.count("\n") == 1
        assert result.err.endswith("\n")
        return result.err


@pytest.fixture
def unloaded(netns: pyskl.NetNS, netns_name: str, bpffs: Path) -> Tool:
    return Tool(bpffs / "it", netns, netns_name)


@pytest.fixture
def tool(unloaded: Tool) -> Iterator[Tool]:
    unloaded.ok("load", "--quiet")
    yield unloaded
    with contextlib.suppress(pyskl.NotLoaded):
        pyskl.Dispatcher.remove(unloaded.path)


@pytest.fixture
def listener(tool: Tool) -> Iterator[socket.socket]:
    """A socket that is registered under "web"."""
    with support.tcp_listener(tool.ns) as sock:
        with pyskl.Dispatcher.open(tool.path) as dispatcher:
            dispatcher.register("web", sock)
        yield sock


def serve(tool: Tool, label: str, sock: socket.socket) -> None:
    with pyskl.Dispatcher.open(tool.path) as dispatcher:
        dispatcher.register(label, sock)


# -- the dispatcher ------------------------------------------------------------------------------------------------


def test_load_status_unload(unloaded: Tool) -> None:
    assert unloaded.ok("load") == f"loaded {unloaded.path}\n"
    assert pyskl.links(unloaded.ns)
    status = unloaded.json("status")
    assert status["path"] == unloaded.path
    assert status["netns_inode"] == unloaded.ns.inode
    assert status["attached"] is True
    assert status["unserved"] == status["labels"] == []
    with pyskl.Dispatcher.open(unloaded.path, read_only=True) as dispatcher:
        assert list(status) == list(dispatcher.status()._asdict())
    text = unloaded.ok("status")
    assert f"path       {unloaded.path}\n" in text
    assert f"program {status['program_id']}, link {status['link_id']}" in text
    assert unloaded.json("unload") == {"path": unloaded.path}
    assert not os.path.exists(unloaded.path)
    assert not pyskl.links(unloaded.ns)


def test_load_json_and_sizes(unloaded: Tool) -> None:
    status = unloaded.json("load", "--max-labels", 10, "--max-sockets", 20, "--group", 0, "--group-sockets")
    assert (status["max_labels"], status["max_sockets"]) == (10, 20)
    assert os.stat(f"{unloaded.path}/sockets").st_mode & 0o777 == 0o660
    assert "'pyskl unload'" in unloaded.refused(1, "load")
    assert "--group-sockets needs --group" in unloaded.refused(2, "load", "--group-sockets")
    assert "'no-such-group'" in unloaded.refused(2, "load", "--group", "no-such-group")
    assert unloaded.ok("unload") == f"unloaded {unloaded.path}\n"


def test_the_well_known_folder(netns: pyskl.NetNS, netns_name: str) -> None:
    where = ("--netns", f"/run/netns/{netns_name}")
    folder = f"/sys/fs/bpf/pyskl/{netns.inode}"
    assert run("load", *where) == (0, f"loaded {folder}\n", "")
    assert run(*where, "status", "--json").json["path"] == folder
    with netns.entered():
        assert run("status", "--json").json["path"] == folder
        assert run("unload") == (0, f"unloaded {folder}\n", "")
    assert not os.path.exists(folder)


def test_upgrade_changes_the_program_and_nothing_else(tool: Tool, listener: socket.socket) -> None:
    tool.ok("bind", "web", "tcp", "192.0.2.0/24")
    before = tool.json("status")
    after = tool.json("upgrade")
    assert after["program_id"] != before["program_id"]
    assert {**after, "program_id": 0} == {**before, "program_id": 0} | {"keepers": after["keepers"]}
    assert "program" in tool.ok("upgrade")
    assert support.ask_tcp(tool.ns, "192.0.2.9", 99, listener) is listener


def test_status_of_labels(tool: Tool, listener: socket.socket) -> None:
    tool("bind", "web", "tcp", "192.0.2.0/24")
    assert tool("bind", "idle", "udp", "192.0.2.0/24", 53).err.startswith("warning: label 'idle' has no live socket")
    tool.ok("policy", "idle", "hold", "--udp-sticky", 30)
    support.ask_tcp(tool.ns, "192.0.2.9", 99, listener)
    status = tool.json("status")
    assert status["labels"] == [
        {"label": "idle", "bindings": 1, "sockets": 0, "dead": 0, "on_missing": "hold", "udp_sticky": 30},
        {"label": "web", "bindings": 1, "sockets": 1, "dead": 0, "on_missing": "reset", "udp_sticky": 0},
    ]
    assert status["unserved"] == ["idle"]
    assert [each["label"] for each in tool.json("status", "web")["labels"]] == ["web"]
    assert tool.json("status", "web")["unserved"] == []
    text = tool.ok("status")
    assert re.search(r"^web +1 +1 +0 +reset +0 +1 +0$", text, re.MULTILINE)
    assert re.search(r"^idle +1 +0 +0 +hold +30 +0 +0$", text, re.MULTILINE)
    assert "unserved   1 with bindings and no live socket: idle" in text
    assert "hold       NOT in force" in text
    with pyskl.Dispatcher.open(tool.path):
        assert "hold       in force: 1 process keeps parking sockets" in tool.ok("status")


# -- what is refused -----------------------------------------------------------------------------------------------

STATE = ("unload", "upgrade", "status", "sockets", "bindings", "metrics", "hold")


NEED_A_DISPATCHER = (
    *((verb,) for verb in STATE),
    ("bind", "web", "tcp", "192.0.2.0/24"),
    ("unbind", "web", "tcp", "192.0.2.0/24"),
    ("policy", "web"),
    ("policy", "web", "hold"),
    ("register-pid", "1", "web", "tcp", "127.0.0.1", "80"),
    ("unregister", "web"),
    ("explain", "tcp", "192.0.2.1:80"),
    ("trace",),
    ("load-bindings", "-"),
    ("load-bindings", "-", "--dry-run"),
    ("doctor", "--repair"),
)


def test_nothing_loaded(unloaded: Tool) -> None:
    for arguments in NEED_A_DISPATCHER:
        for json_too in ((), ("--json",)):
            line = unloaded.refused(1, *arguments, *json_too, stdin='{"bindings": []}')
            assert line.startswith(f"pyskl {arguments[0]}: no dispatcher is at {unloaded.path!r}")
            assert "'pyskl load'" in line


BAD_VALUES = (
    (("nonsense",), "nonsense"),
    (("status", "web", "more"), "more"),
    (("status", "--nonsense"), "--nonsense"),
    (("bind", "web", "tcp"), "PREFIX"),
    (("bind", "web", "sctp", "192.0.2.0/24"), "'sctp'"),
    (("bind", "web", "tcp", "192.0.2.1/24"), "'192.0.2.1/24'"),
    (("bind", "web", "tcp", "nowhere"), "'nowhere'"),
    (("bind", "web", "tcp", "192.0.2.0/24", "70000"), "'70000'"),
    (("bind", "web", "tcp", "192.0.2.0/24", "80-70"), "'80-70'"),
    (("bind", "web", "tcp", "192.0.2.0/24", "0", "80"), "'0'"),
    (("bind", "a\tb", "tcp", "192.0.2.0/24"), r"'a\tb'"),
    (("bind", "", "tcp", "192.0.2.0/24"), "''"),
    (("bind", "x" * 256, "tcp", "192.0.2.0/24"), "255 bytes"),
    (("unbind", "web", "tcp", "nowhere"), "'nowhere'"),
    (("policy", "web", "drop"), "'drop'"),
    (("policy", "web", "--udp-sticky", "-1"), "-1"),
    (("policy", "web", "--udp-sticky", "soon"), "'soon'"),
    (("register-pid", "0", "web", "tcp", "127.0.0.1", "80"), "0"),
    (("register-pid", "1", "web", "tcp", "localhost", "80"), "'localhost'"),
    (("register-pid", "1", "web", "tcp", "127.0.0.1", "65536"), "65536"),
    (("unregister", "web", "--family", "ipv5"), "'ipv5'"),
    (("unregister", "web", "--slot", "64"), "64"),
    (("explain", "tcp", "192.0.2.1"), "'192.0.2.1'"),
    (("explain", "tcp", "2001:db8::1:80"), "'2001:db8::1:80'"),
    (("explain", "tcp", "[192.0.2.1]:80"), "'[192.0.2.1]:80'"),
    (("explain", "tcp", "[nowhere:]:80"), "'[nowhere:]:80'"),
    (("explain", "tcp", "192.0.2.1:70000"), "'192.0.2.1:70000'"),
    (("explain", "tcp", "192.0.2.1:80", "[2001:db8::1]:80"), "'2001:db8::1'"),
    (("metrics", "--listen", "80"), "'80'"),
    (("metrics", "--listen", "127.0.0.1:0", "--json"), "--json"),
    (("load", "--max-labels", "0"), "0"),
    (("load", "--max-labels", "99999999"), "99999999"),
    (("load-bindings", "/nonexistent"), "'/nonexistent'"),
    (("load-bindings", "/"), "'/'"),
    (("bindings", "--export", "xml"), "'xml'"),
    (("run", "--tcp", "192.0.2.0/24"), "CMD"),
    (("run", "--", "true"), "--tcp"),
    (("run", "--tcp", "nowhere", "true"), "'nowhere'"),
    (("run", "--tcp", "192.0.2.0/24", "--ports", "x", "true"), "'x'"),
    (("run", "--tcp", "192.0.2.0/24", "--udp", "192.0.2.0/24", "--stdio", "true"), "--udp"),
    (("run", "--tcp", "192.0.2.0/24", "true"), "--path"),
    (("run", "--tcp", "192.0.2.0/24", "--listen", "8080", "true"), "'8080'"),
)


def test_bad_values_are_quoted(unloaded: Tool) -> None:
    for arguments, quoted in BAD_VALUES:
        assert quoted in unloaded.refused(2, *arguments), arguments
    assert not os.path.exists(unloaded.path)


BAD_FILES = (
    ("", "bindings are missing"),
    ("{", "JSON"),
    ("bindings = 3", "3"),
    ("nonsense = [", "TOML"),
    ('{"bindings": []} x', "Extra data"),
    ('{"bindings": null}', "None"),
    ('{"bindings": [], "more": 1}', "'more'"),
    ('{"bindings": [{"label": "a", "prefix": "192.0.2.0/24"}, {"label": "a"}]}', "entry 2"),
    ('{"bindings": [{"label": "a", "prefix": "192.0.2.0/24"}, {"prefix": "192.0.2.0/24"}]}', "entry 2"),
    ('{"bindings": [{"label": "a", "prefix": "192.0.2.1/24"}]}', "'192.0.2.1/24'"),
    ('{"bindings": [{"label": "a", "prefix": "192.0.2.0/24", "port": "x"}]}', "'x'"),
    ('{"bindings": [{"label": "a", "prefix": "192.0.2.0/24", "port": 1, "ports": [1]}]}', "entry 1"),
    ('{"bindings": [], "labels": {"a": {"on_missing": "x"}}}', "'x'"),
)


def test_bad_files_change_nothing(tool: Tool) -> None:
    tool("bind", "old", "tcp", "198.51.100.0/24")
    for text, quoted in BAD_FILES:
        for how in ((), ("--dry-run",), ("--json",)):
            assert quoted in tool.refused(2, "load-bindings", "-", *how, stdin=text), (text, how)
    assert [each["label"] for each in tool.json("bindings")["bindings"]] == ["old"]


def test_a_file_that_contradicts_itself_changes_nothing(tool: Tool) -> None:
    tool("bind", "old", "tcp", "198.51.100.0/24")
    entry = '{"label": "%s", "protocol": "tcp", "prefix": "192.0.2.0/24", "port": 80}'
    text = f'{{"bindings": [{entry % "a"}, {entry % "b"}]}}'
    for how in ((), ("--dry-run",)):
        line = tool.refused(1, "load-bindings", "-", *how, stdin=text)
        assert "a tcp 192.0.2.0/24 80" in line
        assert "b tcp 192.0.2.0/24 80" in line
    assert [each["label"] for each in tool.json("bindings")["bindings"]] == ["old"]


def test_what_the_state_refuses(tool: Tool) -> None:
    tool("bind", "web", "tcp", "192.0.2.0/24", "80-90")
    for arguments, words in (
        (("bind", "other", "tcp", "192.0.2.0/24", "80-90"), "'pyskl bind --replace'"),
        (("bind", "other", "tcp", "192.0.2.0/24", "85-95"), "overlap in part"),
        (("unbind", "web", "tcp", "192.0.2.0/24", "80"), "is not bound"),
        (("unbind", "other", "tcp", "192.0.2.0/24", "80-90"), "'web'"),
        (("unregister", "web"), "no socket is registered"),
        (("register", "web"), "LISTEN_FDS"),
        (("register-pid", os.getpid(), "web", "tcp", "127.0.0.1", 1), "has no TCP socket"),
        (("register-pid", 1 << 30, "web", "tcp", "127.0.0.1", 1), str(1 << 30)),
        (("trace", "nobody"), "'nobody'"),
    ):
        assert words in tool.refused(1, *arguments), arguments
    assert len(tool.json("bindings")["bindings"]) == 1


def test_a_namespace_that_is_not_there() -> None:
    for name in ("pyskl-nowhere", "/nowhere/net"):
        status, out, err = run("status", "--netns", name)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert repr(name) in err


# -- bindings ------------------------------------------------------------------------------------------------------


def test_bind_list_unbind(tool: Tool, listener: socket.socket) -> None:
    out = tool.ok("bind", "web", "tcp", "192.0.2.0/24", 443, "80", "8000-8999")
    assert (
        out == "bound web tcp 192.0.2.0/24 80\nbound web tcp 192.0.2.0/24 443\nbound web tcp 192.0.2.0/24 8000-8999\n"
    )
    assert tool.ok("bind", "web", "TCP", "2001:db8::1", "0") == "bound web tcp 2001:db8::1/128\n"
    assert tool.ok("bindings").splitlines() == [
        "LABEL  PROTOCOL  PREFIX           PORTS",
        "web    tcp       2001:db8::1/128  all",
        "web    tcp       192.0.2.0/24     80",
        "web    tcp       192.0.2.0/24     443",
        "web    tcp       192.0.2.0/24     8000-8999",
    ]
    assert tool.json("bindings", "web")["bindings"] == [
        {"label": "web", "protocol": "tcp", "prefix": "2001:db8::1/128", "ports": None},
        {"label": "web", "protocol": "tcp", "prefix": "192.0.2.0/24", "ports": 80},
        {"label": "web", "protocol": "tcp", "prefix": "192.0.2.0/24", "ports": 443},
        {"label": "web", "protocol": "tcp", "prefix": "192.0.2.0/24", "ports": "8000-8999"},
    ]
    assert tool.json("bindings", "nobody") == {"bindings": []}
    assert tool.json("unbind", "web", "tcp", "192.0.2.0/24", 80, 443)["bindings"] == [
        {"label": "web", "protocol": "tcp", "prefix": "192.0.2.0/24", "ports": 80},
        {"label": "web", "protocol": "tcp", "prefix": "192.0.2.0/24", "ports": 443},
    ]
    assert tool.ok("unbind", "web", "tcp", "2001:db8::1") == "unbound web tcp 2001:db8::1/128\n"
    assert tool.ok("unbind", "web", "tcp", "192.0.2.0/24", "8000-8999", "--quiet") == ""
    assert tool.json("bindings") == {"bindings": []}
    assert tool.ok("bindings") == ""


def test_bind_replace_moves_over(tool: Tool) -> None:
    tool("bind", "a", "udp", "192.0.2.0/24", 53)
    moved = tool("bind", "b", "udp", "192.0.2.0/24", 53, "--replace", "--json")
    assert moved.json == {"bindings": [{"label": "b", "protocol": "udp", "prefix": "192.0.2.0/24", "ports": 53}]}
    assert tool.json("bindings") == moved.json


FILE = """
[[bindings]]
label = "web"
protocol = "tcp"
prefix = "192.0.2.0/24"
ports = [80, "8000-8999"]

[[bindings]]
label = "dns"
prefix = "2001:db8::/32"
port = 53

[labels.web]
on_missing = "hold"
udp_sticky = 30
"""


def test_load_bindings(tool: Tool, listener: socket.socket, tmp_path: Path) -> None:
    tool("bind", "old", "tcp", "198.51.100.0/24")
    tool("bind", "web", "tcp", "192.0.2.0/24", 80)
    tool.ok("policy", "old", "fallthrough")
    file = tmp_path / "bindings.toml"
    file.write_text(FILE)
    warning = "warning: label 'dns' has no live socket: 'pyskl register' gives it one\n"
    added = [
        {"label": "dns", "protocol": "tcp", "prefix": "2001:db8::/32", "ports": 53},
        {"label": "dns", "protocol": "udp", "prefix": "2001:db8::/32", "ports": 53},
        {"label": "web", "protocol": "tcp", "prefix": "192.0.2.0/24", "ports": "8000-8999"},
    ]
    removed = [{"label": "old", "protocol": "tcp", "prefix": "198.51.100.0/24", "ports": None}]
    before = tool.json("bindings")

    dry = tool("load-bindings", "--dry-run", file)
    assert (dry.status, dry.err) == (0, warning)
    assert dry.out.splitlines() == [
        "- old tcp 198.51.100.0/24",
        "+ dns tcp 2001:db8::/32 53",
        "+ dns udp 2001:db8::/32 53",
        "+ web tcp 192.0.2.0/24 8000-8999",
        "3 would be added, 1 would be removed, 1 unchanged",
    ]
    dry = tool("load-bindings", file, "--dry-run", "--json")
    assert (dry.json, dry.err) == ({"added": added, "removed": removed, "unchanged": 1}, warning)
    assert tool.json("bindings") == before

    done = tool("load-bindings", file, "--json")
    assert (done.status, done.json, done.err) == (0, {"added": added, "removed": removed, "unchanged": 1}, warning)
    assert tool.json("policy", "web") == {"label": "web", "on_missing": "hold", "udp_sticky": 30}
    assert tool.json("policy", "old") == {"label": "old", "on_missing": "reset", "udp_sticky": 0}
    again = tool("load-bindings", file)
    assert (again.out, again.err) == ("0 added, 0 removed, 4 unchanged\n", warning)
    assert tool("load-bindings", file, "--quiet") == (0, "", "")


def test_what_is_printed_is_taken_back(tool: Tool) -> None:
    label = 'a "b" \\ ü 日本'
    tool("bind", label, "udp", "192.0.2.0/24", "80", "90-99")
    tool("bind", "c", "tcp", "2001:db8::/32")
    tool("policy", label, "fallthrough", "--udp-sticky", 7)
    texts = [
        tool.ok("bindings", "--export", "toml"),
        tool.ok("bindings", "--export", "json"),
        tool.ok("bindings", "--json"),
    ]
    policies = {label: {"on_missing": "fallthrough", "udp_sticky": 7}}
    assert json.loads(texts[1])["labels"] == policies
    assert "labels" not in json.loads(texts[2])
    assert json.loads(tool.ok("bindings", "c", "--export", "json"))["labels"] == {}
    assert json.loads(tool.ok("bindings", label, "--export", "json"))["labels"] == policies
    for text in texts:
        assert tool.json("load-bindings", "-", stdin=text) == {"added": [], "removed": [], "unchanged": 3}
        assert tool.json("policy", label) == {"label": label, **policies[label]}


def test_a_file_without_a_table_of_labels_leaves_the_policies(tool: Tool) -> None:
    tool.ok("policy", "web", "hold")
    tool.ok("load-bindings", "-", stdin="bindings = []")
    assert tool.json("policy", "web")["on_missing"] == "hold"
    tool.ok("load-bindings", "-", stdin="bindings = []\n[labels]\n")
    assert tool.json("policy", "web")["on_missing"] == "reset"


def test_policy(tool: Tool) -> None:
    assert tool.ok("policy", "web") == "web: on_missing reset, udp_sticky 0\n"
    assert tool.ok("policy", "web", "hold") == "web: on_missing hold, udp_sticky 0\n"
    assert tool.json("policy", "web", "--udp-sticky", 60) == {"label": "web", "on_missing": "hold", "udp_sticky": 60}
    assert tool.ok("policy", "web", "fallthrough", "--quiet") == ""
    assert tool.ok("policy", "web", "--quiet") == "web: on_missing fallthrough, udp_sticky 60\n"


# -- sockets -------------------------------------------------------------------------------------------------------


def test_sockets(tool: Tool) -> None:
    with support.tcp_listener(tool.ns, "::", v6only=False) as six, support.udp_socket(tool.ns) as four:
        serve(tool, "web", six)
        serve(tool, "dns", four)
        port = four.getsockname()[1]
        assert tool.json("sockets") == {
            "sockets": [
                {
                    "label": "dns",
                    "protocol": "udp",
                    "family": "ipv4",
                    "slot": 0,
                    "cookie": support.cookie(four),
                    "address": ["127.0.0.1", port],
                    "alive": True,
                },
                {
                    "label": "web",
                    "protocol": "tcp",
                    "family": "ipv6",
                    "slot": 0,
                    "cookie": support.cookie(six),
                    "address": ["::", six.getsockname()[1], 0, 0],
                    "alive": True,
                },
            ]
        }
        assert [each["label"] for each in tool.json("sockets", "web")["sockets"]] == ["web"]
        lines = tool.ok("sockets").splitlines()
        assert lines[0].split() == ["LABEL", "PROTOCOL", "FAMILY", "SLOT", "ADDRESS", "COOKIE", "STATE"]
        assert lines[1].split() == ["dns", "udp", "ipv4", "0", f"127.0.0.1:{port}", str(support.cookie(four)), "alive"]
        assert f"[::]:{six.getsockname()[1]}" in lines[2]
    assert [each["alive"] for each in tool.json("sockets")["sockets"]] == [False, False]
    assert tool.ok("sockets", "dns").splitlines()[1].endswith("dead")
    assert tool.json("unregister", "dns")["sockets"][0]["label"] == "dns"
    assert tool.ok("unregister", "web", "tcp", "--family", "ipv6", "--slot", 0).startswith(
        "unregistered web tcp ipv6 slot 0"
    )
    assert tool.json("sockets") == {"sockets": []}


def test_register_pid(tool: Tool) -> None:
    for protocol, host in (("tcp", "127.0.0.1"), ("udp", "::1")):
        with support.server(tool.ns, protocol, host) as sock, support.answering(sock, "it") as process:
            port = sock.getsockname()[1]
            made = tool.json("register-pid", process.pid, "web", protocol, host, port, "--slot", 3)["sockets"]
            assert [(each["protocol"], each["slot"], each["cookie"]) for each in made] == [
                (protocol, 3, support.cookie(sock))
            ]
            assert tool.json("sockets")["sockets"] == made
            assert "slot 3" in tool.ok("register-pid", process.pid, "web", protocol, host, port, "--slot", 3)
        tool.ok("unregister", "web", "--quiet")


# -- explain -------------------------------------------------------------------------------------------------------


def test_explain(tool: Tool, listener: socket.socket) -> None:
    tool.ok("bind", "web", "tcp", "192.0.2.0/24", 80)
    decision = tool.json("explain", "tcp", "192.0.2.4:80")
    assert decision == {
        "verdict": "pass",
        "binding": {"label": "web", "protocol": "tcp", "prefix": "192.0.2.0/24", "ports": 80},
        "label": "web",
        "slot": 0,
        "cookie": support.cookie(listener),
        "reason": "selected",
    }
    assert tool.json("explain", "tcp", "192.0.2.4:80", "198.51.100.1:4000") == decision
    text = tool.ok("explain", "tcp", "192.0.2.4:80")
    assert f"namespace  {tool.ns.inode}\n" in text
    assert re.search(r"^program    1 of 1: \d+ dispatch \(this dispatcher\)$", text, re.MULTILINE)
    assert "binding    web tcp 192.0.2.0/24 80\n" in text
    assert "slot       0\n" in text
    assert f"socket     cookie {support.cookie(listener)}\n" in text
    assert f"address    127.0.0.1:{listener.getsockname()[1]}\n" in text
    assert f"process    {os.getpid()} " in text
    for destination in ("192.0.2.4:81", "[2001:db8::1]:80"):
        unbound = tool.json("explain", "tcp", destination)
        assert (unbound["binding"], unbound["label"], unbound["reason"]) == (None, None, "unbound")
    assert "no binding matches" in tool.ok("explain", "tcp", "192.0.2.4:81")


def test_explain_counts_all_programs_in_order(tool: Tool, listener: socket.socket) -> None:
    tool.ok("bind", "web", "tcp", "192.0.2.0/24", 80)
    with support.choosing(tool.ns):
        assert re.search(r"^program    2 of 2: \d+ choose$", tool.ok("explain", "tcp", "192.0.2.4:80"), re.MULTILINE)


# -- what a person sees --------------------------------------------------------------------------------------------

CELLS = st.one_of(
    st.integers(0, 1 << 40), st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z", "M")), max_size=90)
)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=8), st.integers(45, 200))
def test_tables_fit_and_lose_nothing(rows: list[tuple[object, ...]], columns: int) -> None:
    lines = list(cli_output.table(("ONE", "TWO", "THREE"), rows, columns))
    assert lines[0].split() == ["ONE", "TWO", "THREE"]
    assert all(cli_output.cell_len(line) <= columns for line in lines)
    shown = sorted("".join(lines[1:]).replace(" ", ""))
    assert shown == sorted("".join(str(cell) for row in rows for cell in row))


def test_tables_of_many_rows_are_made_as_they_are_read() -> None:
    endless = cli_output.table(("N",), ((number,) for number in iter(int, 1)))
    assert next(endless).strip() == "N"
    assert next(endless).strip() == "0"


def test_each_verb_has_help() -> None:
    assert run("--help").out.count("\n") > 20
    for verb in cli.commands.commands:
        status, out, err = run(verb, "--help")
        assert (status, err) == (0, "")
        assert out.startswith(f"Usage: pyskl {verb} ")
        assert all(len(line) <= 80 for line in out.splitlines())
        assert all(option in out for option in ("--path", "--netns", "--json", "--quiet"))
    assert run("--version").out.startswith("pyskl ")


def test_global_options_stand_anywhere(tool: Tool) -> None:
    path, netns = tool.options[:2], tool.options[2:]
    for words in (
        (*path, *netns, "--json", "status"),
        ("status", "--json", *netns, *path),
        (*netns, "status", *path, "--json"),
        ("--path", "/elsewhere", *netns, "status", *path, "--json"),
    ):
        assert run(*words).json["path"] == tool.path
