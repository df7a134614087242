# SPDX-License-Identifier: BSD-2-Clause
"""Every snippet of the README runs as it stands, says nothing on standard error, and leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyskl

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[-1].strip())
def test_a_snippet_runs(netns: pyskl.NetNS, snippet: str, tmp_path: Path) -> None:
    with netns.entered():
        ran = subprocess.run(
            [sys.executable, "-I", "-W", "error", "-W", "ignore:unclosed <socket:ResourceWarning", "-c", snippet],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr


def test_the_first_snippet_prints_where_the_client_went_to(netns: pyskl.NetNS) -> None:
    with netns.entered():
        printed = subprocess.check_output([sys.executable, "-I", "-c", SNIPPETS[0]], text=True, timeout=30)
    assert printed == "('192.0.2.77', 12345)\n"


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 3


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
