# SPDX-License-Identifier: BSD-2-Clause
"""Measure look-ups: python -P tests/bench/lookup.py [--quick] [--json FILE] [--plot FILE.svg], as root, with clang.

What a question costs the dispatcher's own code (bpf/dispatcher.bpf.c, included by lookup.bpf.c), in nanoseconds of
BPF_PROG_TEST_RUN, beside: nothing asked; a socket selected and counted without a search; the same after one line of
memory that is in no cache, the least that any table can take; and the reference, two look-ups in an LPM trie. All run
in turns, once loaded with every capability (the goals are for that) and once with CAP_BPF and CAP_NET_ADMIN alone,
where the verifier adds its barriers. Each figure is the median of the rounds, with the quartiles in the JSON.

Mixtures, each of both families, of IPv4 and of IPv6 alone:
    realistic: 7/10 IPv4 addresses with one port, 2/10 IPv4 /24, 1/20 IPv6 addresses, 1/20 IPv6 /64
    nested: IPv4 prefixes of 25 lengths and IPv6 prefixes of 64, made so that many lie within others
    scattered: the same lengths, anywhere
Questions:
    hit: a binding has it
    near: none has it, but its neighbour's prefix or another port of it is bound
    far: nothing is bound near
each *hot*, the same one again and again, and *random*, a new one each time.

--sizes, --mixtures and --families choose; --other FOLDER measures a second bpf/ beside the first.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import platform
import random
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyskl
from pyskl import _sys
from pyskl.table import Table

HERE = Path(__file__).resolve().parent
BPF = HERE.parent.parent / "bpf"
SIZES = (1, 100, 10_000, 100_000, 1_000_000)
FAMILIES = {"both": (0, 1), "ipv4": (0,), "ipv6": (1,)}
BITS = (32, 128)
BLOCK = (16, 32)  # bits of an address by which what is far is told from what is near
LABELS = 64
SLOTS = 64
PROGRAMS = ("nothing", "socket_alone", "one_line", "reference", "dispatcher")
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_BPF": 39}

RECORD = struct.Struct("=QQIHHBBBBI")  # struct pyskl_binding
TRIE_KEY = struct.Struct("=IBH")  # struct prefix of lookup.bpf.c, before the address
QUESTION = struct.Struct("=QQIIII")
DRAWS = struct.Struct("=III")

ALL = (0, 65535)


class Entry(NamedTuple):
    """A binding; one port, or ALL."""

    v6: int
    length: int
    prefix: int  # the first `length` bits
    udp: int
    port: int | None


class Question(NamedTuple):
    v6: int
    address: int
    udp: int
    port: int


# -- what is bound, and what is asked --------------------------------------------------------------------------------


def realistic(rnd: random.Random, count: int, families: Sequence[int]) -> Iterator[Entry]:
    """Addresses in blocks of a few hundred bindings each, as an operator has them."""
    blocks = [[rnd.getrandbits(bits) for _ in range(count // 500 + 1)] for bits in BLOCK]
    kinds = [(0, 32)] * 14 + [(0, 24)] * 4 + [(1, 128), (1, 64)]
    kinds = [kind for kind in kinds if kind[0] in families]
    while True:
        v6, length = rnd.choice(kinds)
        address = rnd.choice(blocks[v6]) << (BITS[v6] - BLOCK[v6])
        address |= rnd.getrandbits(16) if not v6 else rnd.getrandbits(16) << 64 | rnd.getrandbits(16)
        port = None if length in {24, 64} else rnd.choice((53, 80, 443, 8080))
        yield Entry(v6, length, address >> (BITS[v6] - length), rnd.getrandbits(1), port)


def lengths_of(v6: int) -> Sequence[int]:
    return (*range(4, 128, 2), 127, 128) if v6 else range(8, 33)


def address(rnd: random.Random, v6: int) -> int:
    """Draw a global one; of IPv6, in 2000::/3, for a prefix of v4-mapped ones would have all IPv4 in the reference."""
    return 1 << 125 | rnd.getrandbits(125) if v6 else rnd.getrandbits(32)


def nested(rnd: random.Random, count: int, families: Sequence[int]) -> Iterator[Entry]:
    """Prefixes of addresses that have long beginnings in common."""
    roots = [[address(rnd, v6) for _ in range(16)] for v6 in (0, 1)]
    while True:
        v6 = rnd.choice(families)
        where = rnd.choice(roots[v6]) ^ rnd.getrandbits(rnd.choice((1, 2, 3)) * BITS[v6] // 4)
        length = rnd.choice(lengths_of(v6))
        yield Entry(v6, length, where >> (BITS[v6] - length), rnd.getrandbits(1), rnd.choice((53, 80, 443, 8080)))


def scattered(rnd: random.Random, count: int, families: Sequence[int]) -> Iterator[Entry]:
    """Prefixes of no relation."""
    while True:
        v6 = rnd.choice(families)
        length = rnd.choice(lengths_of(v6))
        yield Entry(
            v6, length, address(rnd, v6) >> (BITS[v6] - length), rnd.getrandbits(1), rnd.choice((53, 80, 443, 8080))
        )


MIXTURES = {each.__name__: each for each in (realistic, nested, scattered)}


class Bindings:
    """Bindings, and a way to tell whether one of them has a question that is no table's."""

    def __init__(self, mixture: str, size: int, families: Sequence[int]) -> None:
        self.random = random.Random(f"{mixture} {size} {families}")
        made = MIXTURES[mixture](self.random, size, families)
        self.entries: dict[Entry, None] = {}
        while len(self.entries) < size:
            self.entries[next(made)] = None
        self.list = list(self.entries)
        self.kinds = sorted({(each.v6, each.length, each.udp) for each in self.list})
        self.blocks = [self._blocks(v6) for v6 in (0, 1)]

    def _blocks(self, v6: int) -> set[int]:
        """Name the blocks that have bindings."""
        blocks: set[int] = set()
        for each in self.list:
            if each.v6 == v6:
                spare = BLOCK[v6] - each.length
                if spare <= 0:
                    blocks.add(each.prefix >> -spare)
                else:
                    blocks.update(range(each.prefix << spare, (each.prefix + 1) << spare) if spare < 17 else ())
        return blocks

    def has(self, q: Question) -> bool:
        entries = self.entries
        for v6, length, udp in self.kinds:
            if v6 == q.v6 and udp == q.udp:
                prefix = q.address >> (BITS[v6] - length)
                if (v6, length, prefix, udp, q.port) in entries or (v6, length, prefix, udp, None) in entries:
                    return True
        return False

    def hit(self) -> Question:
        rnd, entry = self.random, self.random.choice(self.list)
        spare = BITS[entry.v6] - entry.length
        address = entry.prefix << spare | rnd.getrandbits(spare)
        return Question(entry.v6, address, entry.udp, rnd.randrange(1, 65536) if entry.port is None else entry.port)

    def near(self) -> Question:
        rnd, entry = self.random, self.random.choice(self.list)
        spare = BITS[entry.v6] - entry.length
        port = rnd.randrange(1, 65536) if entry.port is None else entry.port
        if rnd.getrandbits(1) and entry.port is not None:
            port = rnd.choice((22, 53, 80, 443, 8080, 51820))
            prefix = entry.prefix
        else:
            prefix = entry.prefix ^ 1 << rnd.randrange(min(8, entry.length))
        return Question(entry.v6, prefix << spare | rnd.getrandbits(spare), entry.udp, port)

    def far(self) -> Question:
        rnd, entry = self.random, self.random.choice(self.list)
        address = rnd.getrandbits(BITS[entry.v6])
        while address >> (BITS[entry.v6] - BLOCK[entry.v6]) in self.blocks[entry.v6]:
            address = rnd.getrandbits(BITS[entry.v6])
        return Question(entry.v6, address, entry.udp, rnd.choice((53, 80, 443, 8080)))

    def questions(self, kind: str, count: int) -> list[Question] | None:
        """Draw questions of a kind; None where there are hardly any."""
        if kind == "hit":
            return [self.hit() for _ in range(count)]
        draw: Callable[[], Question] = getattr(self, kind)
        found: list[Question] = []
        for _ in range(4 * count):
            q = draw()
            if not self.has(q):
                found.append(q)
                if len(found) == count:
                    return found
        return [found[i % len(found)] for i in range(count)] if found else None

    def label(self, entry: Entry) -> int:
        return hash(entry) % LABELS + 1

    def records(self) -> bytearray:
        """Give what the table is built from."""
        packed = bytearray()
        for entry in self.list:
            address = entry.prefix << (BITS[entry.v6] - entry.length)
            hi, lo = (address >> 64, address & 2**64 - 1) if entry.v6 else (address << 32, 0)
            ports = ALL if entry.port is None else (entry.port, entry.port)
            packed += RECORD.pack(hi, lo, self.label(entry), *ports, entry.length, entry.v6, entry.udp, 0, 0)
        return packed

    def trie(self) -> dict[bytes, bytes]:
        """Give what the reference's trie has."""
        found = {}
        for entry in self.list:
            address = entry.prefix << (BITS[entry.v6] - entry.length)
            length = entry.length + 24 + (0 if entry.v6 else 96)
            key = TRIE_KEY.pack(length, 17 if entry.udp else 6, entry.port or 0)
            key += (address if entry.v6 else 0xFFFF << 32 | address).to_bytes(16, "big")
            group = self.label(entry) * 4 + entry.v6 * 2 + entry.udp
            found[key] = struct.pack("=II", length, group * SLOTS)
        return found


# -- the kernel's side -------------------------------------------------------------------------------------------------


def compile_object(bpf: Path, folder: Path) -> Path:
    target = folder / f"{len(list(folder.iterdir()))}.o"
    include = (f"-I{bpf}", f"-I/usr/include/{platform.machine()}-linux-gnu")
    layout = ("-mcpu=v3", "-mllvm", "-disable-block-placement")  # as build_ffi.py has it
    command = ["clang", "-O2", "-g", *layout, "-Wall", "-Werror", "-target", "bpf", *include]
    subprocess.run([*command, "-c", HERE / "lookup.bpf.c", "-o", target], check=True)
    return target


@contextlib.contextmanager
def capabilities(names: Sequence[str]) -> Iterator[None]:
    """Make no others effective meanwhile (capset(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), "capset")

    check(libc.capget(header, data))
    wanted = sum(1 << CAPABILITIES[name] for name in names)
    fewer = list(struct.unpack("=6I", data.raw))
    fewer[0], fewer[3] = wanted & 0xFFFFFFFF, wanted >> 32
    check(libc.capset(header, struct.pack("=6I", *fewer)))
    try:
        yield
    finally:
        check(libc.capset(header, data.raw))


class Kernel:
    """The programs, and the maps that they share."""

    def __init__(self, opened: contextlib.ExitStack, others: Mapping[str, Path]) -> None:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        groups = 4 * (LABELS + 1)
        sizes = {
            "labels": LABELS + 1,
            "alone": LABELS + 1,
            "groups": groups,
            "counters": groups,
            "sockets": groups * SLOTS,
        }
        self.room = 1 << 18
        source = compile_object(BPF, folder)
        self.trie: pyskl.Map | None = None
        self.sizes = {**sizes, "siblings": groups, "names": 1, "stayers": 1, "registered": 1, "questions": self.room}
        self.source, self._others = source, {name: compile_object(path, folder) for name, path in others.items()}
        sock = opened.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", 0))
        self._sock = sock

    @contextlib.contextmanager
    def bound(self, bindings: Bindings) -> Iterator[Subject]:
        """Load the programs over these bindings."""
        with contextlib.ExitStack() as opened:
            sizes = {**self.sizes, "trie": len(bindings.list)}
            main = opened.enter_context(pyskl.BpfObject.load(self.source, programs=PROGRAMS, max_entries=sizes))
            maps = main.maps
            records = bindings.records()
            conflict = _sys.bindings_prepare(records)
            assert conflict is None, [records[i * 40 : i * 40 + 40].hex() for i in conflict]
            table = Table.build(records, LABELS + 1, {})
            opened.callback(table.close)
            maps["tables"][0] = table.map
            for label in range(1, LABELS + 1):
                numbers = range(label * 4, label * 4 + 4)
                maps["labels"][label] = struct.pack("=4I", *numbers)
                maps["alone"][label] = struct.pack("=4I", *(number * SLOTS for number in numbers))
                for number in numbers:
                    maps["groups"][number] = struct.pack("=QQ", 1, 0)
                    maps["sockets"][number * SLOTS] = self._sock
            maps["trie"].update(bindings.trie())
            programs = {("full", name): program for name, program in main.programs.items()}
            draws = [maps[".bss"]]

            def more(build: str, source: Path, names: Sequence[str], rename: str = "") -> None:
                reuse = {name: each for name, each in maps.items() if not name.startswith(".")}
                loaded = opened.enter_context(pyskl.BpfObject.load(source, programs=names, reuse=reuse))
                draws.append(loaded.maps[".bss"])
                programs.update({(build, rename or name): each for name, each in loaded.programs.items()})

            with capabilities(tuple(CAPABILITIES)):
                more("less", self.source, PROGRAMS)
            for name, source in self._others.items():
                more("full", source, ("dispatcher",), name)
                with capabilities(tuple(CAPABILITIES)), contextlib.suppress(pyskl.VerifierError):
                    more("less", source, ("dispatcher",), name)
            yield Subject(programs, maps, draws, table.map.info.max_entries * _sys.LINE_SIZE)


class Subject:
    """Programs over one set of bindings."""

    def __init__(
        self,
        programs: Mapping[tuple[str, str], pyskl.Program],
        maps: Mapping[str, pyskl.Map],
        draws: Sequence[pyskl.Map],
        memory: int,
    ) -> None:
        self.programs, self.maps, self.draws, self.memory = programs, maps, draws, memory
        self.count = 0

    def ask(self, questions: Sequence[Question]) -> None:
        """Put questions where the programs draw them; as many as a power of two."""
        self.count = len(questions)
        memory = self.maps["questions"].mmap()
        for i, q in enumerate(questions):
            hi, lo = q.address >> 64, q.address & 2**64 - 1
            QUESTION.pack_into(memory, i * QUESTION.size, hi, lo, q.v6, q.udp, q.port, 0)

    def draw(self, first: int, count: int) -> None:
        for each in self.draws:
            each[0] = DRAWS.pack(first, count - 1, 0)

    def run(self, program: pyskl.Program, repeat: int) -> float:
        """Measure nanoseconds a run, of this thread's time."""
        before = time.thread_time_ns()
        program.test_run("udp", ("192.0.2.1", 1), ("192.0.2.2", 2), repeat=repeat)
        return (time.thread_time_ns() - before) / repeat

    def selected(self) -> int:
        """Count the sockets that were selected."""
        counters = self.maps["counters"].items()
        return sum(sum(struct.unpack("=4Q", cpu[:32])) for _, cpus in counters for cpu in cpus)

    def check(self, hit: bool) -> None:
        """The dispatcher and the reference find what there is, and nothing else."""
        for (build, name), program in self.programs.items():
            if name != "nothing":
                self.draw(0, self.count)
                before = self.selected()
                self.run(program, self.count)
                found = self.selected() - before
                expected = self.count if hit or name in {"socket_alone", "one_line"} else 0
                assert found == expected, (build, name, found, self.count)

    def measure(self, rounds: int, hot: bool) -> dict[tuple[str, str], list[float]]:
        """Let all programs take turns."""
        rnd = random.Random(1)
        figures: dict[tuple[str, str], list[float]] = {key: [] for key in self.programs}
        for _ in range(rounds):
            self.draw(rnd.randrange(self.count) if hot else 0, 1 if hot else self.count)
            for key, program in self.programs.items():
                repeat = 20_000 if key[1] == "reference" else 50_000
                figures[key].append(self.run(program, repeat))
        return figures


# -- figures -----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    mixture: str
    size: int
    families: str
    kind: str
    way: str


Figures = dict[tuple[str, str], list[float]]


def measure(options: argparse.Namespace) -> Iterator[tuple[Case, Figures, float]]:
    others = {"dispatcher (other)": options.other} if options.other else {}
    with contextlib.ExitStack() as opened:
        kernel = Kernel(opened, others)
        for mixture in options.mixtures:
            for families in options.families:
                for size in options.sizes:
                    bindings = Bindings(mixture, size, FAMILIES[families])
                    with kernel.bound(bindings) as subject:
                        for kind in options.kinds:
                            questions = bindings.questions(kind, options.questions)
                            if questions is None:
                                continue
                            subject.ask(questions)
                            subject.check(kind == "hit")
                            for way in options.ways:
                                figures = subject.measure(options.rounds, way == "hot")
                                yield Case(mixture, size, families, kind, way), figures, subject.memory / size


def median(figures: Figures, build: str, name: str) -> float:
    return statistics.median(figures[build, name])


def ratio(figures: Figures, build: str, one: str, other: str) -> float:
    """Compare round by round."""
    pairs = zip(figures[build, one], figures[build, other], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def line(case: Case, figures: Figures, build: str) -> str:
    names = [name for of, name in figures if of == build]
    text = "".join(f"{median(figures, build, name):12.0f}" for name in names)
    times = ratio(figures, build, "reference", "dispatcher")
    where = f"{case.mixture:10}{case.size:>9,} {case.families:5}{case.kind:5}{case.way:7}{build:5}"
    return f"{where}{text}{times:8.1f}{'  SLOWER' if times < 1 else ''}"


class Result(NamedTuple):
    case: Case
    figures: Figures
    memory: float  # bytes for a binding

    def as_dict(self) -> dict[str, object]:
        return {
            **self.case._asdict(),
            "bytes_per_binding": self.memory,
            "nanoseconds": {
                f"{name}, {build}": statistics.quantiles(rounds, n=4, method="inclusive")
                for (build, name), rounds in self.figures.items()
            },
        }


def goals(results: Sequence[Result]) -> Iterator[str]:
    """Say of each goal what was measured; where a goal is of all of many cases, the worst."""
    found = {each.case: each.figures for each in results}

    def worst(build: str, one: str, other: str, least: bool, **of: object) -> float | None:
        ratios = [
            ratio(figures, build, one, other)
            for case, figures in found.items()
            if all(getattr(case, name) == value for name, value in of.items())
        ]
        return (min if least else max)(ratios) if ratios else None

    million = {"size": 1_000_000, "families": "both"}
    usual, deep = {"mixture": "realistic", **million}, {"mixture": "nested", **million}
    for build, part in (("full", 1.0), ("less", 0.8)):
        faster = [
            ("hit, 1M realistic, random", 12, usual | {"kind": "hit", "way": "random"}),
            ("near miss, 1M realistic, random", 15, usual | {"kind": "near", "way": "random"}),
            ("far miss, 1M realistic, random", 15, usual | {"kind": "far", "way": "random"}),
            ("hit, 1M nested, random", 6, deep | {"kind": "hit", "way": "random"}),
            ("near miss, 1M nested, random", 4, deep | {"kind": "near", "way": "random"}),
        ]
        rows = [
            (
                f"times faster than the reference: {name}",
                goal * part,
                True,
                worst(build, "reference", "dispatcher", True, **of),
            )
            for name, goal, of in faster
        ]
        rows.append(
            ("times faster than the reference: any case", 1, True, worst(build, "reference", "dispatcher", True))
        )
        if build == "full":
            rows += [
                (
                    "of the one-line limit: hit, 1M realistic, random",
                    1.3,
                    False,
                    worst(build, "dispatcher", "one_line", False, **usual, kind="hit", way="random"),
                ),
                (
                    "of the floor: hit, hot, any size",
                    1.35,
                    False,
                    worst(build, "dispatcher", "socket_alone", False, mixture="realistic", kind="hit", way="hot"),
                ),
            ]
            sizes = [Case("realistic", size, "both", "hit", "random") for size in (1_000_000, 1)]
            if all(case in found for case in sizes):
                large, small = (median(found[case], build, "dispatcher") for case in sizes)
                rows.append(("cost at 1M over cost at one binding, hit, random", 4, False, large / small))
        for name, goal, least, figure in rows:
            if figure is not None:
                missed = figure < goal if least else figure > goal
                sign = "at least" if least else "at most"
                yield f"{build:5}{name:58}{figure:8.2f}   {sign} {goal:.3g}{' *' if missed else ''}"
    memories = [each.memory for each in results if each.case.size == SIZES[-1] and each.case.mixture == "realistic"]
    if memories:
        missed = " *" if max(memories) > 64 else ""
        yield f"{'':5}{'bytes for a binding, 1M realistic':58}{max(memories):8.2f}   at most 64{missed}"
    yield "* missed"


COLOURS = {"nothing": "#bbb", "socket_alone": "#888", "one_line": "#48a", "reference": "#c44", "dispatcher": "#282"}


def plot(results: Sequence[Result]) -> str:
    """Draw nanoseconds by the number of bindings, both to a logarithmic scale, one panel for each other choice."""
    panels = list(dict.fromkeys(each.case._replace(size=0) for each in results))
    width, height, across = 240, 160, 6
    parts = []
    for number, panel in enumerate(panels):
        left, top = number % across * (width + 30) + 40, number // across * (height + 50) + 40
        parts.append(f'<text x="{left}" y="{top - 6}">{", ".join(str(each) for each in panel if each)}</text>')
        parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#ccc"/>')
        for level in (10, 100, 1000):
            y = top + height - math.log10(level / 10) / 3 * height
            parts.append(f'<text x="{left - 4}" y="{y + 3:.0f}" text-anchor="end">{level}</text>')
        for name, colour in COLOURS.items():
            points = [
                f"{left + math.log10(each.case.size) / 6 * width:.0f},"
                f"{top + height - math.log10(max(median(each.figures, 'full', name), 10) / 10) / 3 * height:.0f}"
                for each in results
                if each.case._replace(size=0) == panel
            ]
            parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for number, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{40 + 130 * number}" y="16" fill="{colour}">{name}</text>')
    size = f'width="{across * (width + 30) + 50}" height="{-(-len(panels) // across) * (height + 50) + 60}"'
    style = 'font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes, questions and rounds")
    parser.add_argument("--json", type=Path, default=Path(".build/lookup.json"), metavar="FILE")
    parser.add_argument("--plot", type=Path, default=Path(".build/lookup.svg"), metavar="FILE")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--mixtures", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--kinds", nargs="+", default=["hit", "near", "far"])
    parser.add_argument("--ways", nargs="+", default=["hot", "random"])
    parser.add_argument("--other", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    options.sizes = options.sizes or ((1, 10_000) if options.quick else SIZES)
    options.rounds = options.rounds or (3 if options.quick else 7)
    options.questions = 1 << (13 if options.quick else 17)

    results: list[Result] = []
    for case, figures, memory in measure(options):
        if not results:
            names = [name for of, name in figures if of == "full"]
            print(" " * 44 + "".join(f"{name[:11]:>12}" for name in names) + "   ratio")
        results.append(Result(case, figures, memory))
        for build in ("full", "less"):
            print(line(case, figures, build), flush=True)
    print("", *goals(results), sep="\n")
    report = {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "figures": [each.as_dict() for each in results],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    options.plot.write_text(plot(results))


if __name__ == "__main__":
    main()
