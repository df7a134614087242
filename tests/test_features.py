"""What this kernel and this process can do: said in advance, true when tried, and with a reason where it is not so."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import privileges
import pytest
from support import BPFFS, bpf_object

import pyskl
from pyskl import ArrayMap, ArrayOfMaps, BpfObject, HashMap, LpmTrie, MapType, Program

NAMES = {
    "sk_lookup",
    "sk_lookup_ingress_ifindex",
    "netns_link",
    "sockmap",
    "sockhash",
    "map_batch",
    "lpm_trie_batch",
    "map_in_map_batch",
    "map_in_map",
    "mmapable",
    "ringbuf",
    "bpf_loop",
    "user_ringbuf",
    "btf",
    "bpffs",
    "perfmon",
    "object_ids",
}
FEATURES = pyskl.features()


def test_the_names() -> None:
    assert isinstance(FEATURES, Mapping)
    assert set(FEATURES) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_says_its_name_since_when_and_why_not(name: str) -> None:
    feature = FEATURES[name]
    assert isinstance(feature, pyskl.Feature)
    assert feature.name == name
    assert bool(feature) is feature.available
    assert bool(feature.reason) is not feature.available  # a reason exactly where it is not there
    assert feature.since is None or [int(n) for n in feature.since.split(".")] >= [3, 8]


def test_asking_again_gives_the_same() -> None:
    assert dict(pyskl.features()) == dict(FEATURES)


def test_the_answer_can_not_be_changed() -> None:
    with pytest.raises(TypeError):
        FEATURES["sk_lookup"] = FEATURES["btf"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        FEATURES["sk_lookup"].available = False  # type: ignore[misc]


@contextlib.contextmanager
def _nested() -> object:
    with pyskl.SockMap.create(1) as inner, ArrayOfMaps.create(max_entries=1, inner=inner) as outer:
        yield outer


TRIALS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "sk_lookup": lambda: Program.load(bpf_object("obj_globals")),
    "sockmap": lambda: pyskl.SockMap.create(1),
    "sockhash": lambda: pyskl.SockHash.create(1),
    "map_in_map": _nested,
    "mmapable": lambda: ArrayMap.create(max_entries=1, flags=pyskl.BPF_F_MMAPABLE),
    "ringbuf": lambda: pyskl.Map.create(MapType.RINGBUF, 0, 0, 4096),
    "user_ringbuf": lambda: pyskl.Map.create(MapType.USER_RINGBUF, 0, 0, 4096),
    "btf": lambda: Path("/sys/kernel/btf/vmlinux").open("rb"),
    "object_ids": lambda: _by_id(),
}


@contextlib.contextmanager
def _by_id() -> object:
    with HashMap.create(max_entries=1) as m, HashMap.from_id(m.info.id) as again:
        yield again


@pytest.mark.parametrize("name", TRIALS)
def test_what_is_said_is_so(name: str) -> None:
    """Available: it works. Not available: it does not."""
    if FEATURES[name]:
        with TRIALS[name]():
            pass
    else:
        with pytest.raises((pyskl.BpfError, OSError)), TRIALS[name]():
            pass


def test_bpffs_is_where_it_is_mounted() -> None:
    mounted = any(line.split()[2] == "bpf" for line in Path("/proc/mounts").read_text().splitlines())
    assert bool(FEATURES["bpffs"]) == (mounted and BPFFS.is_dir())


def test_this_process_can_run_the_tests() -> None:
    """A probe that says no where the rest of this suite works would be wrong."""
    assert all(FEATURES[name] for name in ("sk_lookup", "netns_link", "sockmap", "sockhash"))


WITHOUT = {
    "no capability": (set(), {"sk_lookup", "sockmap", "sockhash", "perfmon", "object_ids"}),
    "bpf alone": ({"CAP_BPF"}, {"sockmap", "sockhash", "perfmon", "object_ids"}),
    "bpf and net_admin": ({"CAP_BPF", "CAP_NET_ADMIN"}, {"perfmon", "object_ids"}),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_without_a_capability_the_reason_is_its_absence(case: str) -> None:
    """Asked of the process as it is now, whatever it could do before."""
    keep, missing = WITHOUT[case]
    found = privileges.run(_available, keep=keep)
    lost = {name for name in NAMES if FEATURES[name] and not found[name][0]}
    assert {name for name in missing if FEATURES[name]} <= lost
    assert [name for name in missing & lost if "CAP_" not in found[name][1]] == []
    if "CAP_NET_ADMIN" in keep:
        assert all(found[name][0] for name in ("sk_lookup", "sockmap", "sockhash", "map_batch"))


def _available() -> dict[str, tuple[bool, str]]:
    return {name: (bool(f), f.reason) for name, f in pyskl.features().items()}


def test_objects_use_what_there_is() -> None:
    """Nothing that the shipped object needs is optional where sk_lookup is there."""
    if FEATURES["sk_lookup"]:
        with BpfObject.load(pyskl.REDIRECT) as obj:
            assert set(obj.programs) == {"redirect"}


def test_tries_are_there_whether_batched_or_not() -> None:
    with LpmTrie.create(key_size=8, max_entries=4) as m:
        m.update({(8).to_bytes(4, sys.byteorder) + bytes([n, 0, 0, 0]): b"abcd" for n in range(4)})
        assert len(dict(m.items())) == 4
