"""The units under docs/systemd, as systemd itself reads them."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import support

import pyskl

UNITS = sorted((Path(__file__).parent.parent / "docs/systemd").glob("*.service"))


@pytest.mark.portable
def test_systemd_finds_nothing_wrong_with_them(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is missing")
    assert len(UNITS) == 3
    (tmp_path / "web.socket").write_text("[Socket]\nListenStream=127.0.0.1:8080\nService=web.service\n")
    (tmp_path / "web.service").write_text("[Service]\nExecStart=/bin/true\n")
    for unit in UNITS:
        text = unit.read_text().replace("/usr/bin/pyskl", "/bin/true")  # which need not be installed there
        (tmp_path / unit.name.replace("@", "@web")).write_text(text.replace("man:pyskl(1)", "https://example.org"))
    for unit in tmp_path.glob("pyskl*.service"):
        told = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        mine = [line for line in (told.stdout + told.stderr).splitlines() if "pyskl" in line or "web" in line]
        assert not mine, mine
        assert told.returncode == 0, told.stderr


def limited(unit):
    """What runs a command with no more capabilities than a unit has."""
    names = re.search(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)[1].split()
    words = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names)])
    return ["setpriv", "--bounding-set", words, "--inh-caps", words, sys.executable, "-I", "-m"]


@support.needs("sk_lookup")
@pytest.mark.slow  # on an emulated Linux 5.10 one of its services was not ready within 30 seconds
def test_each_has_the_privileges_that_it_needs(netns, tmp_path):
    (tmp_path / "bindings.toml").write_text('bindings = [{label = "web", protocol = "tcp", prefix = "192.0.2.0/24"}]\n')
    texts = {unit.name: unit.read_text() for unit in UNITS}

    def commands(name, key):
        for line in re.findall(rf"^{key}=-?/usr/bin/(.+)$", texts[name], re.MULTILINE):
            words = line.replace("/etc/pyskl", str(tmp_path)).replace("%i", "web").split()
            yield [*limited(texts[name]), *words]

    def ok(name, key, **how):
        for words in commands(name, key):
            done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, **how)
            assert done.returncode == 0, (words, done.stderr)

    with netns.entered(), contextlib.ExitStack() as undo:
        path = f"/sys/fs/bpf/pyskl/{netns.inode}"
        undo.callback(lambda: os.path.exists(path) and pyskl.Dispatcher.remove(path))
        ok("pyskl.service", "ExecStart")
        ok("pyskl.service", "ExecReload")
        (words,) = commands("pyskl-hold.service", "ExecStart")
        with subprocess.Popen(words) as hold, pyskl.Dispatcher.open(path, read_only=True) as dispatcher:
            assert support.eventually(lambda: dispatcher.status().keepers == 1, 30)
            hold.send_signal(signal.SIGTERM)
        assert hold.returncode == 0
        (words,) = commands("pyskl-register@.service", "ExecStart")
        with support.tcp_listener(netns) as sock:
            script = 'exec 3<&0; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
            given = ["sh", "-c", script, "sh", *words]
            done = subprocess.run(given, stdin=sock, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            ok("pyskl-register@.service", "ExecStop")
        ok("pyskl.service", "ExecStop")
        assert not os.path.exists(path)
