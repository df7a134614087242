# SPDX-License-Identifier: BSD-2-Clause
"""Build wheels with libbpf, libelf and zlib inside, byte for byte the same wherever and whenever.

The libraries are compiled from what ci/wheels.toml pins. The wheel is then made from the sdist by the project's own
build, which is only given another C compiler and another clang: those of ci/wheels.txt. ci/wheels starts this.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import ziglang
import zopfli.gzip
import zopfli.zlib

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOP = Path(__file__).resolve().parent.parent
WORK = TOP / ".build" / "wheels"
CACHE = Path(os.environ.get("PYSKL_CACHE", TOP / ".build")) / "sources"
PINS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
ZIG = Path(ziglang.__file__).parent
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.17"  # manylinux2014's
POLICY = "manylinux2014"
# Bytes that a wheel should have, and no wheel has yet; and what it must not grow beyond meanwhile. 109 KB are the
# extension, 16 KB BPF, 148 KB Python, and 32 KB what goes along.
GOAL, SIZE = 250_000, 320_000
# Unused functions are left out by the linker. The compiler's driver makes -Os of -Oz. "-w": the libraries' warnings are
# their authors' business.
UNWIND = ["-fno-asynchronous-unwind-tables", "-fno-unwind-tables"]
SMALL = ["-Os", "-Xclang", "-Oz", "-ffunction-sections", "-fdata-sections", "-flto", *UNWIND]
COMPILE = ["-g0", "-fPIC", "-fvisibility=hidden", "-w", *SMALL]
LINK = "-lelf -lz -flto -Os -Wl,--gc-sections -Wl,--hash-style=gnu -s"


@dataclasses.dataclass(frozen=True)
class Library:
    """A library of wheels.toml: its Debian source package, and how libNAME.a is made of it."""

    name: str
    version: str
    dsc: str
    license: str
    texts: list[str]
    archive: str
    sources: list[str]
    headers: dict[str, list[str]]
    flags: list[str]
    config: str = ""
    cut: dict[str, str] = dataclasses.field(default_factory=dict)


LIBRARIES = [Library(**each) for each in PINS["library"]]


def say(text: str) -> None:
    print(f"\033[1m== {text}\033[0m", flush=True)


def fail(text: str) -> NoReturn:
    sys.exit(f"error: {text}")


def run(*words: str | Path, cwd: Path = TOP, env: dict[str, str] | None = None) -> str:
    """Run a command, give what it prints to its standard output; all of it is shown where the command fails."""
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{' '.join(map(str, words))} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- what goes in ---------------------------------------------------------------------------------------------------


@functools.cache
def apt() -> list[str]:
    """Give the options of an apt with lists of its own; the machine's settings say where the archive is."""
    own = CACHE / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (own / folder).mkdir(parents=True, exist_ok=True)
    (own / "status").touch()
    for line in run("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)").splitlines():
        archive, release = line.split()
        if re.fullmatch(r"[a-z]+", release) and "debian" in archive:
            break
    else:
        fail("apt's sources have no Debian archive")
    (own / "sources.list").write_text(f"deb-src {archive} {PINS['suite']} main\n")
    options = f"""Dir::State::lists={own}/lists Dir::State::status={own}/status Dir::Cache={own}/cache
        Dir::Etc::sourcelist={own}/sources.list Dir::Etc::sourceparts=/dev/null Dir::Etc::preferencesparts=/dev/null
        APT::Sandbox::User=root Acquire::Languages=none Acquire::Retries=3 Acquire::Check-Valid-Until=false"""
    given = [f"-o{option}" for option in options.split()]
    run("apt-get", *given, "update", "-qq")
    return given


def fetch(library: Library) -> Path:
    """Give the folder with a library's unpacked source, fetched once."""
    key = hashlib.sha256(f"{library.dsc}{library.cut}".encode()).hexdigest()
    folder = CACHE / f"{library.name}-{key[:16]}"
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    run("apt-get", *apt(), "source", "-qq", "--download-only", f"{library.name}={library.version}", cwd=part)
    (dsc,) = part.glob("*.dsc")
    if sha256(dsc) != library.dsc:
        fail(f"{dsc.name} has not the sum that wheels.toml says")
    run("dpkg-source", "--no-check", "-x", dsc.name, "source", cwd=part)  # the signature; the sums are checked
    for name, text in library.cut.items():
        file = part / "source" / name
        before, found, after = file.read_text().partition(text)
        if not found or text in after:
            fail(f"{name} of {library.name} is not as wheels.toml has it: {text!r}")
        file.write_text(before + after)
    (part / "source").rename(folder)
    shutil.rmtree(part)
    return folder


# --- what is compiled -----------------------------------------------------------------------------------------------


def compile_library(library: Library, zig: list[str | Path], prefix: Path) -> None:
    """Put libNAME.a and the headers of a library into the folder `prefix`."""
    source, built = fetch(library), prefix / "obj" / library.name
    built.mkdir(parents=True)
    (built / "config.h").write_text(library.config)
    flags = [*COMPILE, *library.flags, f"-I{prefix}/include", f"-I{built}", f"-ffile-prefix-map={source}=."]
    files = sorted(path for pattern in library.sources for path in source.glob(pattern))
    objects = [built / f"{path.stem}.o" for path in files]

    def compile_one(file: Path, out: Path) -> None:
        run(*zig, "cc", *target(prefix), *flags, "-c", file.relative_to(source), "-o", out, cwd=source)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, files, objects))
    archive = prefix / "lib" / f"lib{library.archive}.a"
    archive.parent.mkdir(exist_ok=True)
    run(*zig, "ar", "rcsD", archive, *objects)
    for folder, patterns in library.headers.items():
        (prefix / "include" / folder).mkdir(parents=True, exist_ok=True)
        for header in (path for pattern in patterns for path in source.glob(pattern)):
            shutil.copy(header, prefix / "include" / folder)


def target(prefix: Path) -> list[str]:
    return ["-target", f"{prefix.name}-linux-gnu.{GLIBC}"]


def tools(prefix: Path, *headers: Path) -> Path:
    """Make a folder for PATH with `zig`, and a `clang` that compiles BPF with these folders of headers."""
    folder = prefix / "bin"
    folder.mkdir()
    (folder / "zig").symlink_to(ZIG / "zig")
    found = " ".join(f"-isystem '{each}'" for each in headers)
    (folder / "clang").write_text(f"""#!/bin/sh
exec '{ZIG}/zig' clang -resource-dir '{ZIG}/lib' -nostdlibinc "$@" {found}
""")
    (folder / "clang").chmod(0o755)
    return folder


def python_headers(prefix: Path) -> None:
    """Let Debian's pyconfig.h, which knows its own architecture alone, be found for the other: both are alike."""
    here = sysconfig.get_config_var("MULTIARCH") or ""
    own = Path("/usr/include", here, f"python3.{sys.version_info.minor}")
    if here and own.is_dir():
        for machine in MACHINES:
            shim = prefix / "include" / f"{machine}-linux-gnu" / own.name
            shim.parent.mkdir()
            shim.symlink_to(own)


def epoch() -> str:
    """Give the time that the wheels' members have: the commit's."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return given
    asked = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=TOP, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "315532800"  # 1980, where a zip's calendar begins


def sdist(folder: Path) -> Path:
    """Give the archive of the sources, which the wheels are built from; its bytes depend on these and the time."""
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, TOP)
    shutil.rmtree(TOP / f"{PROJECT['name']}.egg-info", ignore_errors=True)
    (made,) = folder.glob("*.tar.gz")
    memory = io.BytesIO()
    with tarfile.open(made) as tar, tarfile.open(fileobj=memory, mode="w") as out:
        for member in sorted(tar.getmembers(), key=lambda each: each.name):
            member.mtime, member.pax_headers = int(epoch()), {}
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.mode & stat.S_IXUSR else 0o644
            out.addfile(member, tar.extractfile(member) if member.isfile() else None)
    made.write_bytes(zopfli.gzip.compress(memory.getvalue()))
    return made


def unpacked(archive: Path, folder: Path) -> Path:
    """Give the top of the sources, in a new folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder)  # noqa: S202 - our own, of a moment ago
    (source,) = folder.iterdir()
    return source


def build_wheel(source: Path, out: Path, environment: dict[str, str], *options: str) -> Path:
    """Give the wheel that the project's own build makes."""
    command = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, *options, source)
    run(*command, env=os.environ | environment)
    (wheel,) = out.glob("*.whl")
    return wheel


def build(archive: Path, machine: str) -> Path:
    """Give the wheel for a machine, built from the sdist."""
    prefix = WORK / machine
    shutil.rmtree(prefix, ignore_errors=True)
    (prefix / "include").mkdir(parents=True)
    os.environ["ZIG_LOCAL_CACHE_DIR"] = os.environ["ZIG_GLOBAL_CACHE_DIR"] = str(WORK / "cache")
    for library in LIBRARIES:
        compile_library(library, [ZIG / "zig"], prefix)
    python_headers(prefix)
    source = unpacked(archive, prefix / "source")
    linux = (ZIG / f"lib/libc/include/{name}-linux-any" for name in ("any", "x86"))
    environment = {
        "PATH": f"{tools(prefix, prefix / 'include', *linux)}:{os.environ['PATH']}",
        "CC": " ".join(["zig", "cc", *target(prefix)]),
        "CFLAGS": " ".join([f"-I{os.path.relpath(prefix / 'include', source)}", *SMALL]),
        "LDFLAGS": f"-L{os.path.relpath(prefix / 'lib', source)} {LINK}",
        "SOURCE_DATE_EPOCH": epoch(),
    }
    return build_wheel(
        source, prefix / "wheel", environment, f"--config-setting=--build-option=--plat-name={POLICY}_{machine}"
    )


def objects(wheel: Path) -> dict[str, str]:
    """Give the sums of the objects of BPF in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".bpf.o")]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def check_objects(archive: Path, wheels: list[Path]) -> None:
    """Fail where a wheel's objects are not those of a build for this system, with its headers and libbpf."""
    prefix = WORK / "system"
    shutil.rmtree(prefix, ignore_errors=True)
    source = unpacked(archive, prefix / "source")
    environment = {"PATH": f"{tools(prefix, Path('/usr/include'))}:{os.environ['PATH']}"}
    built = objects(build_wheel(source, prefix / "wheel", environment))
    for wheel in wheels:
        if objects(wheel) != built:
            fail(f"the objects of {wheel.name} are not those that the system's build makes with the same clang")
    print(f"the same in all, and in a build for this system: {', '.join(built)}")


# --- what it is accompanied by --------------------------------------------------------------------------------------


def bill_of_materials() -> str:
    """Tell in the form of CycloneDX what is in each wheel."""

    def component(name: str, number: str, terms: str, purl: str, **more: Any) -> dict[str, Any]:
        fixed = {"type": "library", "bom-ref": purl, "name": name, "version": number}
        return fixed | {"licenses": [{"expression": terms}], "purl": purl} | more

    inside = [
        component(
            each.name,
            each.version,
            each.license,
            f"pkg:deb/debian/{each.name}@{each.version.replace(':', '%3A').replace('+', '%2B')}?arch=source",
            hashes=[{"alg": "SHA-256", "content": each.dsc}],
            **({"pedigree": {"notes": f"cut: {each.cut}"}} if each.cut else {}),
        )
        for each in LIBRARIES
    ]
    own = component(
        PROJECT["name"], PROJECT["version"], PROJECT["license"], f"pkg:pypi/{PROJECT['name']}@{PROJECT['version']}"
    )
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": inside,
        "dependencies": [{"ref": own["purl"], "dependsOn": [each["purl"] for each in inside]}],
    }
    return json.dumps(bom, indent=1) + "\n"


class Zopfli:
    """A compressor for zipfile: smaller, and the same bytes whichever zlib the interpreter has."""

    def __init__(self) -> None:
        self.data = b""

    def compress(self, data: bytes) -> bytes:
        self.data += data
        return b""

    def flush(self) -> bytes:
        return zopfli.zlib.compress(self.data)[2:-4]  # without zlib's header and sum


def pack(members: dict[str, bytes], record: str, path: Path) -> None:
    """Write a wheel whose bytes depend on its members and the time alone."""
    lines = []
    for name, data in sorted(members.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    date = time.gmtime(max(int(epoch()), 315532800))[:6]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in [*sorted(members.items()), (record, "".join([*lines, f"{record},,\n"]).encode())]:
            info = zipfile.ZipInfo(name, date)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (stat.S_IFREG | (0o755 if name.endswith(".so") else 0o644)) << 16
            with archive.open(info, "w") as member:
                member._compressor = Zopfli()  # type: ignore[attr-defined]
                member.write(data)


def complete(wheel: Path, out: Path) -> Path:
    """Add what a wheel with other people's libraries must have: their licences, and which they are."""
    with zipfile.ZipFile(wheel) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    info = f"{PROJECT['name']}-{PROJECT['version']}.dist-info"
    record = f"{info}/RECORD"
    del members[record]
    metadata = members[f"{info}/METADATA"].decode()
    expression = " AND ".join([PROJECT["license"], *dict.fromkeys(each.license for each in LIBRARIES)])
    metadata = re.sub(r"(?m)^(License-Expression: ).*$", rf"\g<1>{expression}", metadata, count=1)
    for library in LIBRARIES:
        for text in library.texts:
            name = f"{library.name}/{text}"
            members[f"{info}/licenses/{name}"] = (fetch(library) / text).read_bytes()
            metadata = metadata.replace("License-File: LICENSE\n", f"License-File: LICENSE\nLicense-File: {name}\n", 1)
    members[f"{info}/METADATA"] = metadata.encode()
    members[f"{info}/sboms/{PROJECT['name']}.cdx.json"] = bill_of_materials().encode()
    pack(members, record, out / wheel.name)
    return out / wheel.name


def check(wheel: Path, machine: str) -> None:
    """Fail where a wheel is too large, or needs more of a machine than its name says."""
    size = wheel.stat().st_size
    if size > SIZE:
        fail(f"{wheel.name} has {size:,} bytes; {SIZE:,} may be")
    say(f"{wheel.name}: {size:,} bytes" + (f", which misses the goal of {GOAL:,}" if size > GOAL else ""))
    tool = Path(sys.executable).parent
    run(tool / "abi3audit", "--strict", wheel)
    shown = run(tool / "auditwheel", "show", wheel)  # of the objects of BPF it says that it ignores them
    if f'platform tag: "manylinux_{GLIBC.replace(".", "_")}_{machine}"' not in " ".join(shown.split()):
        fail(shown)


def make(machines: list[str], out: Path) -> dict[str, str]:
    """Build the sdist and the wheels from nothing but what was fetched; give their sums."""
    shutil.rmtree(WORK / "cache", ignore_errors=True)
    archive = sdist(out)
    sums = {archive.name: sha256(archive)}
    for machine in machines:
        say(f"building for {machine}")
        made = complete(build(archive, machine), out)
        check(made, machine)
        sums[made.name] = sha256(made)
        print(f"{made.name}: {made.stat().st_size:,} bytes, sha256 {sums[made.name]}")
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(prog="ci/wheels", description=__doc__.partition("\n")[0])
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help=f"{' or '.join(MACHINES)}; without any, both")
    parser.add_argument("-o", "--out", type=Path, default=TOP / "dist", help="the folder to put them into (dist/)")
    parser.add_argument(
        "--twice",
        action="store_true",
        help="build all twice, and compare; and the objects of BPF with a build for this system",
    )
    given = parser.parse_args()
    machines = given.machines or list(MACHINES)
    unknown = sorted(set(machines) - set(MACHINES))
    if unknown:
        parser.error(f"no such machine: {', '.join(unknown)}; there are {' and '.join(MACHINES)}")
    os.umask(0o022)
    begun = time.monotonic()
    out = given.out.resolve()
    for old in out.glob(f"{PROJECT['name']}-*"):
        old.unlink()
    out.mkdir(parents=True, exist_ok=True)
    sums = make(machines, out)
    if given.twice:
        again = WORK / "again"
        shutil.rmtree(again, ignore_errors=True)
        again.mkdir()
        if make(machines, again) != sums:
            fail(f"what is in {again} is not what is in {out}")
        check_objects(next(out.glob("*.tar.gz")), [*out.glob("*.whl")])
    (out / f"{PROJECT['name']}-{PROJECT['version']}.cdx.json").write_text(bill_of_materials())
    say(f"done in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
