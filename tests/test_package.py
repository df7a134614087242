# SPDX-License-Identifier: BSD-2-Clause
"""The build: what it needs, what it says when that is missing, and what it makes."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyskl

TOP = Path(__file__).parent.parent
# What a build runs, beside the tools under test: found by setuptools, the compiler driver or the shell.
TOOLS = ("cc", "clang", "llvm-objcopy")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what git would clone, so that the build leaves nothing in the tree."""
    copy = tmp_path / "checkout"
    for name in ("pyproject.toml", "build_ffi.py", "README.md", "LICENSE", "bpf", "pyskl"):
        source, target = TOP / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.o", "*.so"))
        else:
            shutil.copy(source, target)
    return copy


def build(checkout: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command that makes the extension and the objects, with the tools of this interpreter alone."""
    return subprocess.run(
        [sys.executable, "-c", f"{before}from setuptools import setup; setup()", "build_ext", "--inplace"],
        cwd=checkout,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("missing", TOOLS)
def test_a_missing_tool_ends_the_build_with_its_name_and_the_command(
    checkout: Path, tmp_path: Path, missing: str
) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        if tool != missing:
            (path / tool).symlink_to(shutil.which(tool))
    ran = build(checkout, PATH=str(path))
    assert ran.returncode != 0
    last = ran.stderr.splitlines()[-1]
    assert missing in last
    assert "apt-get install" in last
    assert not list(checkout.rglob("*.so"))


@pytest.mark.slow
@pytest.mark.parametrize(("header", "package"), [("bpf/libbpf.h", "libbpf-dev"), ("Python.h", "python3-dev")])
def test_a_missing_header_ends_the_build_likewise(checkout: Path, tmp_path: Path, header: str, package: str) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\ngrep -q "{header}" && exit 1\nexec cc "$@"\n')
    compiler.chmod(0o755)
    ran = build(checkout, CC=str(compiler))
    assert ran.returncode != 0
    last = ran.stderr.splitlines()[-1]
    assert header in last
    assert f" {package} " in last


@pytest.mark.slow
def test_a_free_threaded_interpreter_is_refused(checkout: Path) -> None:
    ran = build(checkout, before="import sysconfig; sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1; ")
    assert ran.returncode != 0
    assert ran.stderr.splitlines()[-1].startswith("error: pyskl is not for a free-threaded CPython")


@pytest.mark.slow
def test_the_objects_are_the_same_bytes_wherever_they_are_built(checkout: Path) -> None:
    assert build(checkout).returncode == 0
    built = sorted(checkout.glob("pyskl/bpf/*.bpf.o"))
    assert [path.name for path in built] == [f"{path.stem}.o" for path in sorted((TOP / "bpf").glob("*.bpf.c"))]
    for path in built:
        shipped = Path(pyskl.__file__).parent / "bpf" / path.name
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(shipped.read_bytes()).digest()


def test_the_extension_is_of_the_stable_abi() -> None:
    assert [path.name for path in Path(pyskl.__file__).parent.glob("_libbpf*.so")] == ["_libbpf.abi3.so"]


def test_the_package_ships_what_it_needs_and_no_source_of_c() -> None:
    package = Path(pyskl.__file__).parent
    names = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    assert {"py.typed", "_libbpf.pyi", "bpf/redirect.bpf.o"} <= names
    assert not [name for name in names if name.endswith((".c", ".h"))]


def test_of_the_source_an_object_has_the_first_line_of_each_function(caplog: pytest.LogCaptureFixture) -> None:
    """So the verifier's log tells where it is, and the kernel, which takes all or one of each, takes them."""
    caplog.set_level(logging.DEBUG, "pyskl.libbpf")
    with pyskl.Program.load(pyskl.REDIRECT, log_level=2):
        assert re.findall(r"(?m)^; (.*?)(?: @ .*)?$", caplog.text) == ["int redirect(struct bpf_sk_lookup *ctx)"]


def test_what_to_install_is_said_where_libbpf_is_missing(tmp_path: Path) -> None:
    """An import that asks for a libbpf that no machine has."""
    package = tmp_path / "pyskl"
    shutil.copytree(Path(pyskl.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (library,) = package.glob("_libbpf*.so")
    if b"libbpf.so.1" not in (image := library.read_bytes()):
        pytest.skip("libbpf is inside the extension")
    library.write_bytes(image.replace(b"libbpf.so.1", b"libbpf.so.0"))
    ran = subprocess.run(
        [sys.executable, "-c", "from pyskl import Program"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("ImportError: libbpf.so.0: ")
    assert "apt-get install libbpf1" in last
