"""The command as a process: inherited sockets, signals, closed pipes, what goes on until it is ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import pyskl

pytestmark = [support.needs("sk_lookup"), pytest.mark.slow]

COMMAND = [sys.executable, "-I", "-m", "pyskl"]
BESIDE = Path(sys.executable).with_name("pyskl")  # the console script


class Tool:
    """The command for one dispatcher, each time as a process in its namespace."""

    def __init__(self, path: Path, ns: pyskl.NetNS) -> None:
        self.path = str(path)
        self.ns = ns

    def start(self, *arguments: object, how: dict[str, Any] | None = None) -> subprocess.Popen[str]:
        words = [*COMMAND, *map(str, arguments), "--path", self.path]
        return start(self.ns, *words, **(how or {}))

    def run(self, *arguments: object, stdin: str = "", **how: Any) -> subprocess.CompletedProcess[str]:
        with self.ns.entered():
            return subprocess.run(
                [*COMMAND, *map(str, arguments), "--path", self.path],
                input=stdin,
                text=True,
                timeout=60,
                **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
            )

    def ok(self, *arguments: object, stdin: str = "", **how: Any) -> str:
        result = self.run(*arguments, stdin=stdin, **how)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout


def start(ns: pyskl.NetNS, *words: str, **how: Any) -> subprocess.Popen[str]:
    with ns.entered():
        return subprocess.Popen(
            words,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how},
        )


@pytest.fixture
def tool(netns: pyskl.NetNS, bpffs: Path) -> Iterator[Tool]:
    path = bpffs / "it"
    with netns.entered():
        pyskl.Dispatcher.create(path=path).close()
        yield Tool(path, netns)
        with contextlib.suppress(pyskl.NotLoaded):
            pyskl.Dispatcher.remove(path)


@contextlib.contextmanager
def opened(tool: Tool) -> Iterator[pyskl.Dispatcher]:
    with pyskl.Dispatcher.open(tool.path) as dispatcher:
        yield dispatcher


def end(process: subprocess.Popen[str], number: int) -> tuple[int, str, str]:
    """Send a signal, and give what came of it."""
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


# -- how it is called, and how it ends -----------------------------------------------------------------------------


def test_console_script_and_module_are_one(tool: Tool) -> None:
    script = subprocess.run(
        [BESIDE, "status", "--json", "--path", tool.path], capture_output=True, text=True, timeout=60
    )
    assert (script.returncode, script.stderr) == (0, "")
    assert script.stdout == tool.ok("status", "--json")


@pytest.mark.parametrize(
    ("module", "verb", "extra"),
    [("click", "status", "cli"), ("rich", "status", "cli"), ("prometheus_client", "metrics", "metrics")],
)
def test_a_missing_extra_is_named(tool: Tool, module: str, verb: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['pyskl', {verb!r}, '--path', {tool.path!r}]\n"
        "from pyskl.__main__ import main; sys.exit(main())"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert f"pip install 'pyskl[{extra}]'" in result.stderr
    assert module.replace("_", "-") in result.stderr


def test_a_reader_that_has_enough(tool: Tool) -> None:
    with opened(tool) as dispatcher:
        dispatcher.replace([pyskl.Binding("web", "tcp", f"192.0.2.{n % 256}", n + 1) for n in range(20_000)])
    for how in ((), ("--json",)):
        process = tool.start("bindings", *how)
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (-signal.SIGPIPE, "")


def test_a_disk_that_is_full_and_an_output_that_is_closed(tool: Tool) -> None:
    for verb in ("status", "--help"):
        with open("/dev/full", "w") as full:
            result = tool.run(verb, stdout=full)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert "No space left on device" in result.stderr
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "status", "--path", tool.path],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("pyskl status: standard output is closed")


def test_interrupted_while_it_waits(tool: Tool) -> None:
    """Another process has the lock; Ctrl-C ends the waiting as it ends any command."""
    lock = os.open(tool.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = tool.start("bind", "web", "tcp", "192.0.2.0/24")
        assert support.eventually(lambda: _has_open(process.pid, tool.path))
        assert end(process, signal.SIGINT) == (-signal.SIGINT, "", "")
    finally:
        os.close(lock)


def _has_open(pid: int, path: str) -> bool:
    with contextlib.suppress(OSError):
        return any(os.readlink(f"/proc/{pid}/fd/{fd}") == path for fd in os.listdir(f"/proc/{pid}/fd"))
    return False


def test_busy_names_the_holder(tool: Tool) -> None:
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(flush=True); input()"
    holder = support.child(code, tool.path)
    try:
        holder.stdout.readline()
        result = tool.run("bind", "web", "tcp", "192.0.2.0/24")
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert f"process {holder.pid}" in result.stderr
        tool.ok("status")  # which waits for nobody
    finally:
        support.kill(holder)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(tool: Tool, shell: str) -> None:
    environment = {**os.environ, "_PYSKL_COMPLETE": f"{shell}_source"}
    source = subprocess.run([BESIDE], capture_output=True, text=True, timeout=60, env=environment)
    assert "_PYSKL_COMPLETE" in source.stdout
    with opened(tool) as dispatcher:
        dispatcher.bind("web-1", "tcp", "192.0.2.0/24")

    def complete(*words: str) -> set[str]:
        variables = {
            "COMP_WORDS": " ".join(["pyskl", *words]),
            "COMP_CWORD": str(len(words)),
            "_PYSKL_COMPLETE": "bash_complete",
        }
        result = subprocess.run([BESIDE], capture_output=True, text=True, timeout=60, env={**os.environ, **variables})
        return {line.partition(",")[2] for line in result.stdout.splitlines() if line}

    if shell == "bash":
        assert complete("reg") == {"register", "register-pid"}
        assert complete("--path", tool.path, "sockets", "we") == {"web-1"}
        assert complete("--path", "/nowhere", "sockets", "we") == set()
        assert complete("bind", "web", "t") == {"tcp"}


def test_a_terminal_of_80_columns(tool: Tool) -> None:
    """Long labels fold; nothing is wider than the terminal. Progress is shown on it, and leaves nothing."""
    label = "a-label-" * 30
    with opened(tool) as dispatcher:
        dispatcher.bind(label, "tcp", "2001:db8:ffff:ffff:ffff:ffff:ffff:0/112", "10000-65535")
        dispatcher.set_policy(label, on_missing="fallthrough", udp_sticky=1 << 30)
        with support.tcp_listener(tool.ns, "::1") as sock:
            dispatcher.register(label, sock)
            for verb in ("status", "bindings", "sockets", "doctor"):
                text = on_terminal(tool, verb)
                lines = [line for line in text.splitlines() if "$ " not in line and "path " not in line]
                assert all(len(line) <= 80 for line in lines), text
                assert "".join(line[:1] for line in lines)
                assert label[:12] in text or verb == "doctor"


def test_progress_of_long_work(tool: Tool, tmp_path: Path) -> None:
    file = tmp_path / "many.json"
    entries = [{"label": "web", "protocol": "tcp", "prefix": f"10.{n >> 8}.{n & 255}.0/24"} for n in range(30_000)]
    file.write_text(json.dumps({"bindings": entries}))
    text = on_terminal(tool, "load-bindings", file)
    assert "30000 added, 0 removed, 0 unchanged" in text
    assert "replacing" in text
    assert "replacing" not in on_terminal(tool, "load-bindings", file, "--quiet")
    assert "replacing" not in tool.run("load-bindings", file).stderr


def on_terminal(tool: Tool, *arguments: object) -> str:
    """What a terminal of 80 columns gets."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {
        "TERM": "xterm"
    }
    process = tool.start(*arguments, how={"stdout": follower, "stderr": follower, "env": environment})
    os.close(follower)
    data = b""
    with contextlib.suppress(OSError):  # EIO: nobody writes to it any more
        while part := os.read(leader, 4096):
            data += part
    os.close(leader)
    process.wait(30)
    return data.decode().replace("\r\n", "\n")


# -- register ------------------------------------------------------------------------------------------------------


def register(tool: Tool, *arguments: object, socks: list[Any], names: str | None = None, **variables: str) -> Any:
    """`pyskl register` as a service manager starts it."""
    words = [*COMMAND, "register", *map(str, arguments), "--path", tool.path]
    with support.handed_over(socks, names) as (before, how):
        return subprocess.run(
            [*before, *words], capture_output=True, text=True, timeout=60, env={**os.environ, **variables}, **how
        )


def test_register_what_was_inherited(tool: Tool) -> None:
    ns = tool.ns
    with (
        support.tcp_listener(ns, "::", v6only=False) as six,
        support.tcp_listener(ns) as four,
        support.udp_socket(ns) as dns,
        support.tcp_listener(ns) as more,
    ):
        result = register(tool, "web", "--json", "--slot", 2, socks=[six, four, dns, more, four], names="a:b:c:d:b")
        assert (result.returncode, result.stderr) == (0, "")
        made = [
            (each["protocol"], each["family"], each["slot"], each["cookie"])
            for each in json.loads(result.stdout)["sockets"]
        ]
        assert made == [
            ("tcp", "ipv4", 2, support.cookie(four)),
            ("tcp", "ipv4", 3, support.cookie(more)),
            ("tcp", "ipv6", 2, support.cookie(six)),
            ("udp", "ipv4", 2, support.cookie(dns)),
        ]
        with opened(tool) as dispatcher:
            assert [each.cookie for each in dispatcher.sockets("web")] == [cookie for *_, cookie in made]
            dispatcher.bind("web", "udp", "192.0.2.0/24")
        assert support.ask_udp(ns, "192.0.2.1", 53, dns) is dns
        again = register(tool, "web", "--slot", 2, socks=[four])
        assert again.stdout == f"registered web tcp ipv4 slot 2: 127.0.0.1:{four.getsockname()[1]}\n"


def test_register_all_or_none(tool: Tool) -> None:
    ns = tool.ns
    with support.tcp_listener(ns) as good, support.new_socket(ns, socket.AF_INET, socket.SOCK_STREAM) as bad:
        for socks, names, place in (([good, bad], "good:bad", "fd 4 (bad)"), ([bad, good], None, "fd 3 (unknown)")):
            result = register(tool, "web", socks=socks, names=names)
            assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
            assert f"{place}: this socket can't be steered to: it is not bound" in result.stderr
        full = register(tool, "web", "--slot", 63, socks=[good, good])
        assert full.returncode == 0
        with support.tcp_listener(ns) as more:
            full = register(tool, "web", "--slot", 63, socks=[good, more])
            assert (full.returncode, full.stdout, full.stderr.count("\n")) == (2, "", 1)
    with opened(tool) as dispatcher:
        assert len(dispatcher.sockets()) == 1


def test_register_undoes_what_it_had_done(tool: Tool, bpffs: Path) -> None:
    small = Tool(bpffs / "small", tool.ns)
    small.ok("load", "--max-sockets", 2, "--quiet")
    with support.tcp_listener(tool.ns) as a, support.tcp_listener(tool.ns) as b, support.tcp_listener(tool.ns) as c:
        with opened(small) as dispatcher:
            dispatcher.register("web", a)
        result = register(small, "web", socks=[b, c, a])
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert "max_sockets" in result.stderr
        with opened(small) as dispatcher:
            assert [each.cookie for each in dispatcher.sockets()] == [support.cookie(a)]
    small.ok("unload", "--quiet")


def test_register_for_whom_the_sockets_are(tool: Tool) -> None:
    with support.tcp_listener(tool.ns) as sock:
        for variables, status, words in (
            ({"LISTEN_PID": "1"}, 1, "no socket was inherited"),
            ({"LISTEN_PID": "x"}, 2, "LISTEN_PID is no number: 'x'"),
            ({"LISTEN_FDS": "0"}, 1, "no socket was inherited"),
            ({"LISTEN_FDS": "-1"}, 2, "LISTEN_FDS is no number: '-1'"),
            ({"LISTEN_FDS": "99999999"}, 2, "'99999999'"),
            ({"LISTEN_FDS": "9"}, 2, "fd 4 is not open"),
            ({"LISTEN_FDNAMES": "a:b"}, 2, "'a:b'"),
        ):
            result = register(tool, "web", socks=[sock], **variables)
            assert (result.returncode, result.stdout, result.stderr.count("\n")) == (status, "", 1), variables
            assert words in result.stderr
    with opened(tool) as dispatcher:
        assert dispatcher.sockets() == ()


# -- trace, metrics ------------------------------------------------------------------------------------------------


def test_trace(tool: Tool) -> None:
    with support.tcp_listener(tool.ns) as sock, opened(tool) as dispatcher:
        dispatcher.bind("web", "tcp", "192.0.2.0/24")
        dispatcher.bind("idle", "tcp", "198.51.100.0/24")
        dispatcher.register("web", sock)
        every, web = tool.start("trace", "--json"), tool.start("trace", "web")
        tracing = dispatcher.maps["state"].mmap().cast("Q")
        assert support.eventually(lambda: tracing[5].bit_count() == 2)
        with pytest.raises(ConnectionRefusedError):
            support.ask_tcp(tool.ns, "198.51.100.1", 80)
        support.ask_tcp(tool.ns, "192.0.2.1", 80, sock)
        idle = json.loads(every.stdout.readline())
        assert (idle["label"], idle["reason"], idle["slot"]) == ("idle", "reset", None)
        assert idle["destination"] == ["198.51.100.1", 80]
        event = json.loads(every.stdout.readline())
        assert {**event, "time_ns": 0, "source": []} == {
            "time_ns": 0,
            "protocol": "tcp",
            "source": [],
            "destination": ["192.0.2.1", 80],
            "label": "web",
            "slot": 0,
            "reason": "selected",
        }
        host, port = event["source"]
        assert web.stdout.readline() == f"tcp {host}:{port} -> 192.0.2.1:80 web: selected slot 0\n"
        assert end(every, signal.SIGINT) == (0, "", "")
        assert tracing[5].bit_count() == 1
        web.stdout.close()  # and the next event finds nobody
        web.stdout = None
        support.ask_tcp(tool.ns, "192.0.2.1", 80, sock)
        assert web.wait(30) == -signal.SIGPIPE
        web.stderr.close()
        assert support.eventually(lambda: not tracing[5])
        tracing.release()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_each_event_once(tool: Tool) -> None:
    with support.tcp_listener(tool.ns) as sock, support.udp_socket(tool.ns, "::1") as dns, opened(tool) as dispatcher:
        dispatcher.bind("web", "tcp", "192.0.2.0/24")
        dispatcher.bind('i"dle\\', "tcp", "198.51.100.0/24")
        dispatcher.bind("web", "udp", "2001:db8::/32")
        dispatcher.register("web", sock)
        dispatcher.register("web", dns)
        for _ in range(3):
            support.ask_tcp(tool.ns, "192.0.2.1", 80, sock)
        for _ in range(2):
            support.ask_udp(tool.ns, "2001:db8::1", 53, dns)
        with pytest.raises(ConnectionRefusedError):
            support.ask_tcp(tool.ns, "198.51.100.1", 80)
        text = tool.ok("metrics")
        found = samples(text)
        counted = {labels: value for (name, labels), value in found.items() if name == "pyskl_lookups_total" and value}

        def key(**labels: str) -> frozenset[tuple[str, str]]:
            return frozenset(labels.items())

        assert counted == {
            key(label="web", protocol="tcp", family="ipv4", result="selected"): 3,
            key(label="web", protocol="udp", family="ipv6", result="selected"): 2,
            key(label='i"dle\\', protocol="tcp", family="ipv4", result="missed"): 1,
        }
        assert found["pyskl_bindings", key(label="web")] == 2
        assert found["pyskl_sockets", key(label="web", state="alive")] == 2
        assert found["pyskl_unserved", key(label='i"dle\\')] == 1
        assert found["pyskl_unserved", key(label="web")] == 0
        assert found["pyskl_attached", key()] == 1
        assert found["pyskl_keepers", key()] == 1
        in_json = json.loads(tool.ok("metrics", "--json"))["samples"]
        assert {(each["name"], frozenset(each["labels"].items())): each["value"] for each in in_json} == found
        dns.close()
        assert samples(tool.ok("metrics"))["pyskl_sockets", key(label="web", state="dead")] == 1


def test_the_collector_in_a_registry_of_a_daemon(tool: Tool) -> None:
    from prometheus_client import CollectorRegistry

    from pyskl.metrics import Collector

    registry = CollectorRegistry()
    with pyskl.Dispatcher.create(tool.ns) as dispatcher:
        registry.register(Collector(dispatcher))
        dispatcher.bind("web", "tcp", "192.0.2.0/24")
        assert registry.get_sample_value("pyskl_bindings", {"label": "web"}) == 1
        assert registry.get_sample_value("pyskl_attached") == 1


def test_metrics_over_http(tool: Tool, tmp_path: Path) -> None:
    with notifications(tmp_path) as (environment, heard):
        process = tool.start("metrics", "--listen", "127.0.0.1:0", how={"env": environment})
        assert heard()[0] == "READY=1"
    url = process.stderr.readline().split()[-1]
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        body = answer.read().decode()
    assert body == tool.ok("metrics")
    with pytest.raises(urllib.error.HTTPError) as wrong:
        urllib.request.urlopen(url.replace("metrics", "nonsense"), timeout=30)
    with wrong.value:
        assert wrong.value.code == 404
    taken = tool.run("metrics", "--listen", url.split("/")[2])
    assert (taken.returncode, taken.stdout, taken.stderr.count("\n")) == (1, "", 1)
    pyskl.Dispatcher.remove(tool.path)
    with pytest.raises(urllib.error.HTTPError) as gone:
        urllib.request.urlopen(url, timeout=30)
    with gone.value:
        assert gone.value.code == 503
    assert end(process, signal.SIGTERM) == (0, "", "")


@contextlib.contextmanager
def notifications(folder: Path) -> Iterator[tuple[dict[str, str], Any]]:
    """A service manager's socket: the environment of a service, and what it says, with the fds that it sends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(folder / "notify"))
        manager.settimeout(30)

        def heard() -> tuple[str, list[int]]:
            message, fds, *_ = socket.recv_fds(manager, 4096, 16)
            return message.decode(), fds

        yield {**os.environ, "NOTIFY_SOCKET": str(folder / "notify")}, heard


# -- hold ----------------------------------------------------------------------------------------------------------


def test_hold(tool: Tool, tmp_path: Path) -> None:
    with opened(tool) as dispatcher:
        dispatcher.bind("web", "tcp", "192.0.2.0/24")
        dispatcher.set_policy("web", on_missing="hold")
    with pytest.raises(ConnectionRefusedError):
        support.ask_tcp(tool.ns, "192.0.2.1", 80)
    with notifications(tmp_path) as (environment, heard):
        process = tool.start("hold", "--json", how={"env": environment})
        message, kept = heard()
        lines = message.split("\n")
        assert lines[0] == "FDSTORE=1"
        name = lines[1].removeprefix("FDNAME=")
        assert heard() == ("READY=1", [])
    try:
        with pyskl.Dispatcher.open(tool.path, read_only=True) as dispatcher:
            assert dispatcher.status().keepers == 1
            with (
                support.tcp_listener(tool.ns) as sock,
                opened(tool) as writer,
                support.unanswered(tool.ns, "192.0.2.1", 80),
            ):
                writer.register("web", sock)
        assert end(process, signal.SIGTERM) == (0, f'{{\n"path": "{tool.path}",\n"keepers": 1\n}}\n', "")
        with pyskl.Dispatcher.open(tool.path, read_only=True) as dispatcher:
            assert dispatcher.status().keepers == 1  # what the service manager keeps

            # The next process takes over: its own are stored, and those of the one before are not needed any more.
            with notifications_again(tmp_path) as (environment, heard):
                following = hold_with(tool, kept, name, environment)
                message, more = heard()
                assert message.startswith("FDSTORE=1\n")
                assert heard() == (f"FDSTOREREMOVE=1\nFDNAME={name}", [])
                assert heard() == ("READY=1", [])
            for fd in more:
                os.close(fd)
            for fd in kept:
                os.close(fd)
            kept = []
            assert support.eventually(lambda: dispatcher.status().keepers == 1)
            assert end(following, signal.SIGINT)[0] == 0
            assert support.eventually(lambda: dispatcher.status().keepers == 0)
    finally:
        for fd in kept:
            os.close(fd)


def notifications_again(folder: Path) -> Any:
    (folder / "notify").unlink()
    return notifications(folder)


def hold_with(tool: Tool, fds: list[int], name: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    with support.handed_over(fds, ":".join([name] * len(fds))) as (before, how):
        return start(tool.ns, *before, *COMMAND, "hold", "--path", tool.path, env=environment, **how)


# -- run -----------------------------------------------------------------------------------------------------------

RUN = """
import os, signal, socket, sys
assert os.environ["LISTEN_PID"] == str(os.getpid()), os.environ
count = int(os.environ["LISTEN_FDS"])
print(os.environ["LISTEN_FDNAMES"], count, *sys.argv[1:], flush=True)
assert sorted(map(int, os.listdir("/proc/self/fd")))[:3 + count] == list(range(3 + count))
socks = {(s := socket.socket(fileno=3 + place)).type: s for place in range(count)}
while True:
    if socket.SOCK_DGRAM in socks:
        data, client = socks[socket.SOCK_DGRAM].recvfrom(100)
        socks[socket.SOCK_DGRAM].sendto(data, client)
    if socket.SOCK_STREAM in socks:
        connection, client = socks[socket.SOCK_STREAM].accept()
        connection.sendall(connection.getsockname()[0].encode())
        if (word := connection.recv(100)) == b"exit":
            sys.exit(7)
        connection.close()
"""


def running(ns: pyskl.NetNS, *arguments: str, code: str = RUN, words: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-c", code, *words]
    return start(ns, *COMMAND, "run", *arguments, "--", *command)


def ask(ns: pyskl.NetNS, host: str, port: int, word: bytes = b"") -> str:
    with support.tcp_client(ns, host, port) as client:
        answer = client.recv(100).decode()
        client.sendall(word or b"x")
        return answer


def test_run_gives_one_socket_for_both_families(netns: pyskl.NetNS) -> None:
    with running(
        netns,
        "--tcp",
        "192.0.2.0/24",
        "--tcp",
        "2001:db8::/32",
        "--ports",
        "80",
        "--ports",
        "8000-8999",
        words=("--json", "x"),
    ) as process:
        assert process.stdout.readline() == "tcp 1 --json x\n"
        assert ask(netns, "192.0.2.7", 80) == "::ffff:192.0.2.7"
        assert ask(netns, "2001:db8::9", 8500) == "2001:db8::9"
        with pytest.raises(ConnectionRefusedError):
            ask(netns, "192.0.2.7", 81)
        assert ask(netns, "192.0.2.8", 8999, b"exit") == "::ffff:192.0.2.8"
        assert process.wait(30) == 7
        assert (process.stdout.read(), process.stderr.read()) == ("", "")
    assert not pyskl.links(netns)


@pytest.mark.parametrize(("prefix", "host"), [("192.0.2.0/24", "192.0.2.7"), ("2001:db8::/64", "2001:db8::7")])
def test_run_of_one_family_and_both_protocols(netns: pyskl.NetNS, prefix: str, host: str) -> None:
    with running(netns, "--tcp", prefix, "--udp", prefix) as process:
        assert process.stdout.readline() == "tcp:udp 2\n"
        with support.new_socket(netns, support.family_of(host), socket.SOCK_DGRAM) as client:
            client.setsockopt(socket.IPPROTO_IPV6, support.IPV6_FREEBIND, 1) if ":" in host else None
            client.bind(("198.51.100.1" if "." in host else "2001:db8:1::1", 0))  # not steered, as the answer would be
            client.settimeout(support.TIMEOUT)
            client.sendto(b"?", (host, 5353))
            assert client.recv(10) == b"?"
        assert ask(netns, host, 80) == host
        assert end(process, signal.SIGTERM) == (128 + signal.SIGTERM, "", "")
    assert not pyskl.links(netns)


SIGNALS = """
import signal, sys
got = []
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM, signal.SIGWINCH):
    signal.signal(number, lambda number, _: got.append(number))
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
print("ready", flush=True)
while True:
    while not got:
        signal.pause()
    print(signal.Signals(got.pop(0)).name, flush=True)
"""


def test_run_passes_signals_on_and_the_status_back(netns: pyskl.NetNS) -> None:
    with running(netns, "--tcp", "192.0.2.0/24", code=SIGNALS) as process:
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
            assert process.stdout.readline() == f"{number.name}\n"
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert process.wait(30) == 128 + signal.SIGKILL


def test_run_does_not_repeat_what_the_terminal_said(netns: pyskl.NetNS) -> None:
    """Ctrl-C reaches the whole foreground: the program gets it once."""
    leader, follower = pty.openpty()
    code = """if True:
        import fcntl, os, sys, termios
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.execv(sys.argv[1], sys.argv[1:])"""
    inner = [*COMMAND, "run", "--tcp", "192.0.2.0/24", "--", sys.executable, "-I", "-c", SIGNALS]
    with start(netns, sys.executable, "-I", "-c", code, *inner, stdin=follower) as process:
        os.close(follower)
        assert process.stdout.readline() == "ready\n"
        os.write(leader, b"\x03")
        assert process.stdout.readline() == "SIGINT\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "SIGUSR1\n"
        process.send_signal(signal.SIGUSR2)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        process.wait(30)
        assert process.stdout.read() in ("", "SIGUSR2\n")
    os.close(leader)


def test_run_lets_go_of_a_socket_that_the_program_closed(netns: pyskl.NetNS) -> None:
    code = "import socket; socket.socket(fileno=3).close(); print(flush=True); input()"
    command = [*COMMAND, "run", "--tcp", "192.0.2.0/24", sys.executable, "-I", "-c", code]
    with start(netns, *command, stdin=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ConnectionRefusedError):
            ask(netns, "192.0.2.7", 80)
        process.communicate("\n", timeout=30)
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("prefixes", "bound", "hosts"),
    [
        (["192.0.2.0/24"], "0.0.0.0:8080", ["192.0.2.7"]),
        (["192.0.2.0/24"], "[::ffff:127.0.0.1]:8080", ["::ffff:192.0.2.7"]),
        (["2001:db8::/32"], "[::1]:8080", ["2001:db8::7"]),
        (["192.0.2.0/24", "2001:db8::/32"], "[::]:8080", ["::ffff:192.0.2.7", "2001:db8::7"]),
    ],
)
def test_run_of_a_socket_that_is_bound_as_told(
    netns: pyskl.NetNS, prefixes: list[str], bound: str, hosts: list[str]
) -> None:
    code = "import socket; s = socket.socket(fileno=3); print(*s.getsockname()[:2], flush=True); s.detach()\n" + RUN
    how = [word for prefix in prefixes for word in ("--tcp", prefix)]
    with running(netns, *how, "--listen", bound, code=code) as process:
        host, _, port = bound.rpartition(":")
        assert process.stdout.readline().split() == [host.strip("[]"), port]
        for host in hosts:
            assert ask(netns, host.removeprefix("::ffff:"), 80) == host
        assert end(process, signal.SIGTERM)[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("prefixes", "bound", "status", "words"),
    [
        (["192.0.2.0/24"], "[::1]:8080", 2, "::1 takes no IPv4"),
        (["2001:db8::/32"], "127.0.0.1:8080", 2, "127.0.0.1 takes no IPv6"),
        (["192.0.2.0/24", "2001:db8::/32"], "0.0.0.0:8080", 2, "takes no IPv6"),
        (["192.0.2.0/24", "2001:db8::/32"], "[::1]:8080", 2, "takes no IPv4"),
        (["192.0.2.0/24"], "127.0.0.1:80", 1, "Address already in use: '127.0.0.1:80'"),
        (["192.0.2.0/24"], "8.8.8.8:80", 1, "'8.8.8.8:80'"),
    ],
)
def test_run_of_a_socket_that_can_not_be_bound_so(
    netns: pyskl.NetNS, prefixes: list[str], bound: str, status: int, words: str
) -> None:
    how = [word for prefix in prefixes for word in ("--tcp", prefix)]
    with support.tcp_listener(netns, "127.0.0.1", 80), running(netns, *how, "--listen", bound) as process:
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err.count("\n")) == (status, "", 1)
        assert words in err


def test_run_of_what_is_no_program(netns: pyskl.NetNS, tmp_path: Path) -> None:
    with netns.entered():
        for name, status in (("/nonexistent", 2), (str(tmp_path), 2), (str(_broken(tmp_path)), 1)):
            result = subprocess.run(
                [*COMMAND, "run", "--tcp", "192.0.2.0/24", name], capture_output=True, text=True, timeout=60
            )
            assert (result.returncode, result.stdout, result.stderr.count("\n")) == (status, "", 1), result
            assert repr(name) in result.stderr
    assert not pyskl.links(netns)


def _broken(folder: Path) -> Path:
    path = folder / "broken"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o755)
    return path


def test_run_stdio(netns: pyskl.NetNS) -> None:
    code = """if True:
        import os, sys
        peer = os.environ["REMOTE_ADDR"], os.environ["REMOTE_PORT"]
        print(*peer, sys.stdin.readline(), end="", flush=True)
        sys.stdin.readline()"""
    command = [
        *COMMAND,
        "run",
        "--stdio",
        "--tcp",
        "192.0.2.0/24",
        "--tcp",
        "2001:db8::/32",
        "--max-connections",
        "2",
        "--",
    ]
    with start(netns, *command, sys.executable, "-I", "-c", code) as process:
        assert support.eventually(lambda: pyskl.links(netns) and _answers(netns))
        with contextlib.ExitStack() as clients:
            for host in ("192.0.2.7", "2001:db8::7"):
                client = clients.enter_context(support.tcp_client(netns, host, 80))
                client.sendall(b"hello\n")
                name, port, word = client.makefile().readline().split()
                assert (name, int(port), word) == (*client.getsockname()[:2], "hello")
            waiting = clients.enter_context(support.tcp_client(netns, "192.0.2.7", 80))
            waiting.sendall(b"third\n")
            client.sendall(b"bye\n")  # makes room for one more
            assert waiting.makefile().readline().endswith("third\n")
            assert end(process, signal.SIGTERM) == (128 + signal.SIGTERM, "", "")
            assert waiting.recv(1) == b""
    assert not pyskl.links(netns)


def _answers(ns: pyskl.NetNS) -> bool:
    try:
        with support.tcp_client(ns, "192.0.2.7", 80) as client:
            client.sendall(b"a\nb\n")
            return client.recv(100) != b""
    except ConnectionRefusedError:
        return False


def test_run_in_a_namespace_that_is_named(netns: pyskl.NetNS, netns_name: str) -> None:
    command = [*COMMAND, "run", "--netns", netns_name, "--tcp", "192.0.2.0/24", "--", sys.executable, "-I", "-c", RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "tcp 1\n"
        assert os.stat(f"/proc/{process.pid}/ns/net").st_ino == netns.inode
        assert ask(netns, "192.0.2.7", 80, b"exit") == "192.0.2.7"
        assert process.wait(30) == 7
