"""Fixtures of every test: what it may use, and that it leaves nothing behind."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

# The tests are of the installed package, never of the source tree, which `python -m pytest` would
# put first; and test modules find `support` whatever pytest's import mode is.
_TESTS = Path(__file__).resolve().parent
sys.path[:] = [
    str(_TESTS),
    *(p for p in sys.path if Path(p).resolve() not in (_TESTS, _TESTS.parent)),
]

pytest.register_assert_rewrite("pyskl.pytest_plugin")  # before support imports it

import support

import pyskl

pytest_plugins = ["pyskl.pytest_plugin"]  # netns, and @needs(…)
collect_ignore = ["sample"]  # a project of its own: test_plugin.py runs it
if "PYSKL_LACKS" not in os.environ:
    collect_ignore += ["test_lacking.py"]  # for kernels that were built without something

ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to us, and are seen


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what is there by now stays: a collection after each test need not walk it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


_failed = pytest.StashKey[bool]()


@functools.cache
def _turn() -> int:
    path = Path(tempfile.gettempdir(), "pyskl-tests.lock")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _held() -> dict[str, set[object]]:
    return {
        "file descriptors": support.fds(),
        "BPF objects": support.bpf_ids(),
        "network namespaces": support.namespaces(),
        "child processes": support.children(),
        "pins": support.pins(),
    }


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: no fd, BPF object, namespace, child process or pin more than before.

    BPF objects are the whole machine's, so tests of several sessions take turns.
    """
    fcntl.flock(_turn(), fcntl.LOCK_EX)
    try:
        before = _held()
        yield
        if request.node.stash.get(_failed, False):
            return  # its traceback holds what it held
        gc.collect()
        gc.freeze()  # what this test left, the next collection need not walk: pytest keeps reports

        def left() -> dict[str, set[object]]:
            now = {kind: held - before[kind] for kind, held in _held().items()}
            if now["BPF objects"]:
                now["BPF objects"] -= support.strangers()
            return {kind: more for kind, more in now.items() if more}

        assert support.eventually(lambda: not left()), f"left behind: {left()}"
    finally:
        fcntl.flock(_turn(), fcntl.LOCK_UN)


@pytest.fixture
def netns_name(netns: pyskl.NetNS) -> Iterator[str]:
    """A name of the test's namespace, as ip-netns(8) gives it."""
    with support.named(netns) as name:
        yield name


@pytest.fixture
def bpffs() -> Iterator[Path]:
    """A fresh folder on bpffs, removed with all that it holds."""
    if not os.path.ismount(support.BPFFS):
        subprocess.run(["mount", "-t", "bpf", "bpf", support.BPFFS], check=True)
    folder = Path(tempfile.mkdtemp(prefix="pyskl-test-", dir=support.BPFFS))
    yield folder
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(parent, name))
        for name in folders:
            os.rmdir(os.path.join(parent, name))
    folder.rmdir()


@pytest.fixture(scope="session")
def bpf_object() -> Callable[[str], Path]:
    """support.bpf_object: the path of an object of tests/bpf by its name."""
    return support.bpf_object
