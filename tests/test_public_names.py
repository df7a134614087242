"""The names that the documentation promises: there, with these signatures, documented, of the kernel's numbers."""

from __future__ import annotations

import ctypes
import ctypes.util
import enum
import errno
import inspect
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import pytest

import pyskl

pytestmark = pytest.mark.portable

CLASSES = {
    "Drain",
    "TakeOver",
    "BpfObject",
    "Program",
    "Link",
    "Map",
    "HashMap",
    "LruHashMap",
    "PerCpuCgroupStorage",
    "PerCpuHashMap",
    "LruPerCpuHashMap",
    "ArrayMap",
    "PerCpuArrayMap",
    "LpmTrie",
    "ArrayOfMaps",
    "HashOfMaps",
    "ProgArray",
    "SockMap",
    "SockHash",
    "ReuseportSockArray",
    "NetNS",
    "Feature",
    "TestRun",
    "ProgramInfo",
    "MapInfo",
    "LinkInfo",
    "Verdict",
    "ProgramType",
    "AttachType",
    "MapType",
    "Protocol",
}
FUNCTIONS = {"query", "links", "features", "socket_cookie", "drain"}
CONSTANTS = {"REDIRECT", "BPF_F_MMAPABLE"}
BASES = {
    "PysklError": (Exception,),
    "BpfError": (pyskl.PysklError, OSError),
    "VerifierError": (pyskl.BpfError,),
    "PermissionDenied": (pyskl.BpfError, PermissionError),
    "NotSupported": (pyskl.BpfError,),
    "NoSuchKey": (pyskl.BpfError, KeyError),
    "NoSuchPin": (pyskl.BpfError, FileNotFoundError),
    "PinExists": (pyskl.BpfError, FileExistsError),
    "BadSocket": (pyskl.PysklError, ValueError),
    "SocketRefused": (pyskl.BpfError, pyskl.BadSocket),
    "BindingConflict": (pyskl.PysklError, ValueError),
    "BindingsFileError": (pyskl.PysklError, ValueError),
    "AlreadyLoaded": (pyskl.PysklError,),
    "NotLoaded": (pyskl.PysklError,),
    "Incompatible": (pyskl.PysklError,),
    "Busy": (pyskl.PysklError,),
}


def test_everything_promised_is_exported() -> None:
    promised = CLASSES | FUNCTIONS | CONSTANTS | set(BASES)
    assert promised - set(pyskl.__all__) == set()
    assert {name for name in pyskl.__all__ if not hasattr(pyskl, name)} == set()


def test_all_has_no_duplicates_and_nothing_private() -> None:
    assert len(set(pyskl.__all__)) == len(pyskl.__all__)
    assert [name for name in pyskl.__all__ if name.startswith("_") and name != "__version__"] == []


@pytest.mark.parametrize("name", sorted(CLASSES | set(BASES)))
def test_classes_are_classes_that_say_they_are_pyskls(name: str) -> None:
    """What a traceback and a pickle name is where a user can import it from."""
    cls = getattr(pyskl, name)
    assert isinstance(cls, type)
    assert cls.__module__.partition(".")[0] == "pyskl"
    assert cls.__name__ == cls.__qualname__ == name


@pytest.mark.parametrize("name", BASES)
def test_errors_derive_from_what_a_caller_would_catch(name: str) -> None:
    cls = getattr(pyskl, name)
    assert {base.__name__ for base in BASES[name] if not issubclass(cls, base)} == set()
    assert issubclass(cls, pyskl.PysklError)


def test_errors_that_are_no_denials_are_no_permission_errors() -> None:
    others = [n for n in BASES if n != "PermissionDenied"]
    assert [n for n in others if issubclass(getattr(pyskl, n), PermissionError)] == []


def test_maps_are_mappings() -> None:
    maps = [getattr(pyskl, name) for name in CLASSES if name.endswith(("Map", "Trie", "Maps"))]
    maps += [pyskl.SockHash, pyskl.ProgArray, pyskl.ReuseportSockArray]
    assert [cls for cls in maps if not issubclass(cls, pyskl.Map)] == []
    assert [cls for cls in maps if not issubclass(cls, Mapping)] == []
    assert issubclass(pyskl.SockMap, MutableMapping)
    assert issubclass(pyskl.SockHash, MutableMapping)


# -- signatures ------------------------------------------------------------------------------------


def _load(source, *, programs=None, constants=None, max_entries=None, reuse=None, log_level=0): ...


def _load_program(source, name=None): ...


def _attach(self, netns=None): ...


def _test_run(self, protocol, destination, source, *, repeat=1): ...


def _pin(self, path): ...


def _nothing(self): ...


def _from_pin(path): ...


def _from_id(number): ...


def _from_fd(fd): ...


def _update_link(self, program, *, expected=None): ...


def _create(type, key_size=4, value_size=4, max_entries=1, *, flags=0, name="", inner=None): ...  # noqa: A002


def _create_sockmap(max_entries, *, name=""): ...


def _create_sockhash(max_entries, *, key_size=4, name=""): ...


def _put(self, key, value, *, mode="any"): ...


def _mmap(self, *, readonly=False): ...


def _netns(netns=None): ...


def _socket(sock): ...


def _named(name): ...


def _from_path(path): ...


def _from_pid(pid): ...


SIGNATURES = {
    "BpfObject.load": _load,
    "BpfObject.close": _nothing,
    "Program.load": _load_program,
    "Program.attach": _attach,
    "Program.test_run": _test_run,
    "Link.update": _update_link,
    "Link.detach": _nothing,
    "Map.create": _create,
    "SockMap.create": _create_sockmap,
    "SockHash.create": _create_sockhash,
    "SockMap.put": _put,
    "SockHash.put": _put,
    "HashMap.put": _put,
    "Map.freeze": _nothing,
    "ArrayMap.mmap": _mmap,
    "query": _netns,
    "links": _netns,
    "socket_cookie": _socket,
    "features": lambda: None,
    "NetNS.current": lambda: None,
    "NetNS.named": _named,
    "NetNS.from_path": _from_path,
    "NetNS.from_pid": _from_pid,
    "NetNS.from_fd": _from_fd,
    "NetNS.entered": _nothing,
    **{
        f"{owner}.{name}": shape
        for owner in ("Program", "Link", "Map", "SockMap", "HashMap")
        for name, shape in {
            "pin": _pin,
            "unpin": _nothing,
            "fileno": _nothing,
            "close": _nothing,
            "from_pin": _from_pin,
            "from_id": _from_id,
            "from_fd": _from_fd,
        }.items()
    },
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_take_what_is_documented(name: str) -> None:
    """The same names, order, kinds and defaults; more parameters only where they may be left out."""
    found = pyskl
    for part in name.split("."):
        found = getattr(found, part)
    actual = dict(inspect.signature(found).parameters)
    for parameter in inspect.signature(SIGNATURES[name]).parameters.values():
        got = actual.pop(parameter.name)
        assert (got.kind, got.default) == (parameter.kind, parameter.default), parameter.name
    required = [p for p in actual.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    assert required == []
    assert [p for p in actual.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty] == []


@pytest.mark.parametrize(
    ("name", "fields"),
    {
        "TestRun": ("verdict", "cookie", "duration_ns"),
        "MapInfo": ("id", "type", "name", "key_size", "value_size", "max_entries", "flags"),
        "LinkInfo": ("id", "type", "prog_id", "netns_inode", "attach_type"),
        "ProgramInfo": ("id", "type", "name", "tag", "map_ids", "run_count", "run_time_ns"),
    }.items(),
)
def test_records_have_their_fields(name: str, fields: tuple[str, ...]) -> None:
    cls = getattr(pyskl, name)
    assert issubclass(cls, tuple)
    assert cls._fields[: len(fields)] == fields


# -- documentation ---------------------------------------------------------------------------------


def _public_members() -> dict[str, object]:
    """Everything public that is pyskl's own, by its dotted name."""
    found: dict[str, object] = {}
    for name in pyskl.__all__:
        thing = getattr(pyskl, name)
        if not inspect.isclass(thing) and not inspect.isfunction(thing):
            continue  # constants, and names for unions of types
        found[name] = thing
        if isinstance(thing, type) and not issubclass(thing, (enum.Enum, tuple)):
            for base in thing.__mro__:
                if base.__module__.partition(".")[0] == "pyskl":
                    found |= {
                        f"{name}.{member}": inspect.getattr_static(thing, member)
                        for member in vars(base)
                        if not member.startswith("_")
                    }
    return found


def test_every_public_name_is_documented() -> None:
    bare = []
    for name, thing in _public_members().items():
        function = getattr(thing, "__func__", thing)
        if isinstance(function, (type, property)) or callable(function):
            text = function.__doc__ if not isinstance(function, type) else vars(function)["__doc__"]
            if not (text or "").strip() or (text or "").startswith(f"{name}("):
                bare.append(name)
    assert bare == []


def test_every_public_function_is_annotated() -> None:
    """The package is typed: no parameter and no result without its annotation."""
    bare = []
    for name, thing in _public_members().items():
        function = getattr(thing, "fget", getattr(thing, "__func__", thing))
        function = inspect.unwrap(function) if callable(function) else function
        if inspect.isfunction(function):
            parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
            bare += [
                f"{name}:{missing}" for missing in (*parameters, "return") if missing not in function.__annotations__
            ]
    assert bare == []


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(pyskl.__file__).with_name("py.typed").exists()


def test_redirect_is_a_file_that_is_shipped() -> None:
    assert Path(pyskl.REDIRECT).read_bytes()[:4] == b"\x7fELF"
    assert Path(pyskl.REDIRECT).name == "redirect.bpf.o"


# -- numbers ---------------------------------------------------------------------------------------

HEADER = Path("/usr/include/linux/bpf.h")
ENUMS = {"ProgramType": "bpf_prog_type", "AttachType": "bpf_attach_type", "MapType": "bpf_map_type"}
PREFIXES = {"ProgramType": "BPF_PROG_TYPE_", "AttachType": "BPF_", "MapType": "BPF_MAP_TYPE_"}
LIBBPF = ctypes.util.find_library("bpf")


def _enumerators(header: str, name: str) -> dict[str, int]:
    """The enumerators of a C enum, each the number after the one before it unless it says so."""
    body = re.search(rf"^enum {name} \{{(.*?)^\}};", header, re.DOTALL | re.MULTILINE)
    assert body
    text = re.sub(r"/\*.*?\*/|^\s*#.*?$", "", body[1], flags=re.DOTALL | re.MULTILINE)
    values: dict[str, int] = {}
    following = 0
    for item in filter(None, map(str.strip, text.split(","))):
        enumerator, _, given = map(str.strip, item.partition("="))
        if given:
            following = values[given] if given in values else int(given, 0)
        values[enumerator] = following
        following += 1
    return values


@pytest.mark.skipif(not HEADER.exists(), reason="needs the kernel's headers")
@pytest.mark.parametrize("name", ENUMS)
def test_enums_are_the_headers(name: str) -> None:
    values = _enumerators(HEADER.read_text(), ENUMS[name])
    members = getattr(pyskl, name).__members__
    known = {m: values[PREFIXES[name] + m] for m in members if PREFIXES[name] + m in values}
    assert known == {m: int(members[m]) for m in known}
    last = max(values.values())
    assert [m for m in members if m not in known and members[m] not in {*values.values()}] == [
        m for m in members if members[m] > last
    ]
    assert "SK_LOOKUP" in known or name == "MapType"


@pytest.mark.skipif(not LIBBPF, reason="needs a shared libbpf")
@pytest.mark.parametrize("name", ENUMS)
def test_enums_are_libbpfs(name: str) -> None:
    """libbpf's words for the numbers, the other way round."""
    to_str = getattr(ctypes.CDLL(LIBBPF), f"libbpf_{ENUMS[name]}_str")
    to_str.restype = ctypes.c_char_p
    theirs = {number: text.decode().upper() for number in range(256) if (text := to_str(number))}
    known = {int(member): member.name for member in getattr(pyskl, name) if int(member) in theirs}
    assert known
    assert known == {v: theirs[v].removesuffix("_DEPRECATED") for v in known}


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (pyskl.Verdict, {"DROP": 0, "PASS": 1}),
        (pyskl.Protocol, {"TCP": 6, "UDP": 17}),
    ],
)
def test_small_enums_are_complete(cls: type[enum.IntEnum], values: dict[str, int]) -> None:
    assert {name: int(value) for name, value in cls.__members__.items()} == values


@pytest.mark.parametrize("name", [*ENUMS, "Verdict", "Protocol"])
def test_enums_are_int_enums(name: str) -> None:
    assert issubclass(getattr(pyskl, name), enum.IntEnum)


def test_mmapable_is_the_kernels_flag() -> None:
    assert pyskl.BPF_F_MMAPABLE == 1 << 10


# -- errors ----------------------------------------------------------------------------------------


def test_bpf_errors_survive_pickling() -> None:
    """multiprocessing and logging carry exceptions from one process to another."""
    import copy
    import pickle

    with pytest.raises(pyskl.BpfError) as caught:
        pyskl.BpfObject.load(b"not an object")
    for other in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert type(other) is type(caught.value)
        assert str(other) == str(caught.value)
        assert (other.errno, other.call, other.hint) == (
            errno.ENOEXEC,
            caught.value.call,
            caught.value.hint,
        )
