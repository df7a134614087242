# SPDX-License-Identifier: BSD-2-Clause
"""A project that imports pyskl tests itself by the plugin for pytest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.portable

SAMPLE = Path(__file__).parent / "sample"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return shutil.copytree(SAMPLE, tmp_path / "project", ignore=shutil.ignore_patterns("__pycache__"))


def run(project: Path, *wrapper: str, tests: str, required: str = "") -> subprocess.CompletedProcess[str]:
    command = [*wrapper, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "-k", tests]
    environment = {**os.environ, "PYSKL_REQUIRED_FEATURES": required}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=60)


def test_the_sample_project_passes(project: Path) -> None:
    ran = run(project, tests="address")
    assert ran.returncode == 0, ran.stdout
    assert "1 passed" in ran.stdout


def test_a_name_that_is_no_feature_is_an_error(project: Path) -> None:
    """Misspelt, it must not skip for ever."""
    ran = run(project, tests="kernel")
    assert ran.returncode == 1
    assert "KeyError: 'time_travel'" in ran.stdout


@pytest.mark.parametrize(("required", "outcome"), [("", "skipped"), ("btf,perfmon", "error")])
def test_what_is_lacking_skips_and_fails_where_it_is_required(project: Path, required: str, outcome: str) -> None:
    without = ("setpriv", "--bounding-set", "-perfmon,-sys_admin")
    ran = run(project, *without, tests="speed", required=required)
    assert f"1 {outcome}" in ran.stdout
    assert "perfmon" in ran.stdout
    assert "the process lacks CAP_PERFMON" in ran.stdout
