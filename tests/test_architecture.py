# SPDX-License-Identifier: BSD-2-Clause
"""What the import linter can't see: the extension has no source of Python."""

from __future__ import annotations

import ast
import ctypes
from pathlib import Path

import pytest

import pyskl

pytestmark = pytest.mark.portable

PACKAGE = Path(pyskl.__file__).parent


def imported(module: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_sys_alone_touches_the_ffi() -> None:
    ffi = {"cffi", "_cffi_backend", "ctypes", "pyskl._libbpf"}
    assert [path.name for path in sorted(PACKAGE.glob("*.py")) if imported(path) & ffi] == ["_sys.py"]


def test_the_extension_exports_its_init_function_alone() -> None:
    (library,) = PACKAGE.glob("_libbpf*.so")
    loaded = ctypes.CDLL(str(library))
    assert hasattr(loaded, "PyInit__libbpf")
    assert not hasattr(loaded, "pyskl_socket_update")
