"""Each verb for those who may not: what is missing is named, and nothing changes."""

from __future__ import annotations

import codecs
import importlib
import os
import pkgutil
import re
import sys
from pathlib import Path

import privileges
import pytest
import support
from test_cli import Result, run

import pyskl

pytestmark = [support.needs("sk_lookup"), pytest.mark.slow]

GROUP, NOBODY = 54321, 65534
ONLY_OWNER = "Permission denied.*as root or as its owner"
BY_MODE = "Permission denied.*mode keeps this user from the map"
CHANGES = [
    "bind web tcp 192.0.2.0/24 81",
    "unbind web tcp 192.0.2.0/24 80",
    "load-bindings -",
    "policy web hold",
]
READS = ["status", "sockets", "bindings", "load-bindings - --dry-run", "policy web", "metrics"]
OF_OWNER = ["explain tcp 192.0.2.1:80", "doctor --repair", "upgrade", "unload"]


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Whoever has given up its rights may not read its interpreter's folder any more."""
    for module in pkgutil.iter_modules(pyskl.__path__):
        if module.name not in {"__main__", "pytest_plugin"}:
            importlib.import_module(f"pyskl.{module.name}")
    toml = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    for name in (toml, "mmap", "fcntl", "asyncio", "rich.console", "concurrent.futures.thread"):
        importlib.import_module(name)
    for encoding in ("utf-8-sig", "ascii", "latin-1", "idna"):
        codecs.lookup(encoding)


def as_user(group: int, *words: str) -> Result:
    """The command as a user without capabilities."""

    def call() -> Result:
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return run(*words, stdin='{"bindings": []}')

    result = privileges.run(call, keep=("CAP_SETUID", "CAP_SETGID"))
    assert isinstance(result, tuple)
    return Result(*result)


def refused(result: Result, pattern: str) -> None:
    assert (result.status, result.out) == (1, ""), result
    assert re.fullmatch(f"pyskl [a-z-]+: [^\n]*{pattern}[^\n]*\n", result.err), result.err


@pytest.mark.parametrize("role", ["stranger", "member", "granted"])
def test_each_verb(netns: pyskl.NetNS, bpffs: Path, role: str) -> None:
    path = bpffs / "it"
    bpffs.chmod(0o755)
    user = NOBODY if role == "stranger" else GROUP
    with netns.entered(), support.tcp_listener(netns) as sock:
        with pyskl.Dispatcher.create(path=path, group=GROUP, group_sockets=role == "granted") as d:
            d.bind("web", "tcp", "192.0.2.0/24", 80)
            d.register("web", sock)
            before = d.bindings(), d.policies(), d.sockets(), d.status(), sorted(os.listdir(path))
            if role == "member":
                first = as_user(user, "--path", str(path), "status")
                if first.status:
                    d.unload()
                    pytest.skip("unprivileged_bpf: this kernel lets nobody without capabilities open a pin")

            def verb(words: str) -> Result:
                return as_user(user, "--path", str(path), *words.split())

            for words in READS:
                if role == "stranger":
                    refused(verb(words), ONLY_OWNER)
                else:
                    result = verb(words)
                    assert (result.status, result.err) == (0, ""), result
            for words in CHANGES:
                refused(verb(words), ONLY_OWNER if role == "stranger" else BY_MODE)
            for words in OF_OWNER:
                refused(verb(words), "(Permission denied|Operation not permitted).*(owner|mode|CAP_SYS_ADMIN)")
            refused(verb("trace"), ONLY_OWNER if role == "stranger" else BY_MODE)
            refused(verb("load"), "already")
            refused(as_user(user, "--path", f"{path}2", "load"), "Permission denied")
            refused(as_user(user, *"run --tcp 192.0.2.0/24 --ports 80 -- true".split()), "CAP_")
            own = f"register-pid {os.getpid()} web tcp 127.0.0.1 {sock.getsockname()[1]}"
            refused(verb(own), ONLY_OWNER if role == "stranger" else "CAP_SYS_PTRACE")
            result = verb("doctor")
            assert result.status == 1, result
            assert "CAP_BPF" in result.out
            assert before == (d.bindings(), d.policies(), d.sockets(), d.status(), sorted(os.listdir(path)))
            if role == "granted":
                result = verb("unregister web")
                assert (result.status, result.err, d.sockets()) == (0, "", ())
            else:
                refused(verb("unregister web"), ONLY_OWNER if role == "stranger" else BY_MODE)
            d.unload()
