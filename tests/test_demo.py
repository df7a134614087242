# SPDX-License-Identifier: BSD-2-Clause
"""The demo, which compares each of its figures with what it must be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import support

DEMO = Path(__file__).parent.parent / "ci/demo.py"


@pytest.mark.portable
def test_each_figure_is_what_it_must_be() -> None:
    ready = {"PYSKL_TEST_OBJECTS": str(support.bpf_object("choose").parent), "PYSKL_TEST_LOAD": "4000"}
    ran = subprocess.run(
        [sys.executable, "-I", DEMO], env=os.environ | ready, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "each figure what it must be" in ran.stdout
