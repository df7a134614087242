"""The units under docs/systemd, as systemd itself reads them."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.portable
UNITS = sorted((Path(__file__).parent.parent / "docs/systemd").glob("*.service"))


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
