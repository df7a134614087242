# SPDX-License-Identifier: BSD-2-Clause
"""The kernels of kernels.toml, and Debian's archive, where they come from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import lzma
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TypeAlias

from tools import CACHE, TOP, Failure, run, say, script

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

# Loaded where the kernel has them as files; what they depend on is found in the modules themselves.
MODULES = """virtio_pci virtio_console virtio_blk crc32c_generic ext4 veth dummy inet_diag tcp_diag udp_diag unix_diag
    vsock vsock_loopback"""
INIT = """#!/busybox sh
b=/busybox
$b mount -t proc proc /proc; $b mount -t devtmpfs dev /dev
for module in /modules/*; do $b insmod "$module"; done
for disk in /dev/vda /dev/vdb; do  # some machines number them as they are found; the other is empty
    $b mount -t ext4 -o noatime $disk /new 2>/dev/null && break
done
[ -e /new/vm ] || { echo no root; $b reboot -f; }
$b mount -o move /proc /new/proc; $b mount -o move /dev /new/dev
exec $b switch_root /new /vm/init
"""

# The root of a machine of another architecture is made of Debian's packages of that architecture, and so is what the
# package is built with for it. One suite has them all, and kernels.
FOREIGN_SUITE, FOREIGN_PYTHON = "bookworm", "3.11"
FOREIGN = f"""python{FOREIGN_PYTHON} libpython{FOREIGN_PYTHON}-dev libbpf-dev iproute2 util-linux mount bash coreutils
    busybox-static procps"""

Fields: TypeAlias = dict[str, str]


@dataclasses.dataclass
class Kernel:
    """As kernels.toml has it."""

    name: str
    suite: str
    series: str
    lacks: list[str]
    cloud: list[Fields]
    full: list[Fields] = dataclasses.field(default_factory=list)
    arch: str = "amd64"
    without: str = ""
    tests: str = ""


@functools.cache
def kernels() -> dict[str, Kernel]:
    with (TOP / "ci/kernels.toml").open("rb") as file:
        return {fields["name"]: Kernel(**fields) for fields in tomllib.load(file)["kernel"]}


# -- the archive -----------------------------------------------------------------------------------


@functools.cache
def apt(arch: str) -> list[str]:
    """Give the options of an apt with lists and settings of its own; the machine's say where the archive is."""
    own = CACHE / f"apt-{arch}"
    for folder in ("lists/partial", "cache/archives/partial"):
        (own / folder).mkdir(parents=True, exist_ok=True)
    (own / "status").touch()
    where = {}
    for line in run("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)").splitlines():
        address, release = line.split()
        if re.fullmatch(r"[a-z]+(-security)?", release) and "debian" in address:
            where[release.endswith("-security")] = address
    if len(where) < 2:
        raise Failure("apt's sources have no Debian archive, or not its security updates")
    suites = {FOREIGN_SUITE, f"{FOREIGN_SUITE}-security"}  # of one release alone, or apt finds no solution
    if arch == "amd64":
        suites = {kernel.suite for kernel in kernels().values() if kernel.arch == arch}
    lines = (f"deb {where[suite.endswith('-security')]} {suite} main\n" for suite in sorted(suites))
    (own / "sources.list").write_text("".join(lines))
    options = f"""Dir::State::lists={own}/lists Dir::State::status={own}/status Dir::Cache={own}/cache
        Dir::Etc::sourcelist={own}/sources.list Dir::Etc::sourceparts=/dev/null Dir::Etc::preferencesparts=/dev/null
        APT::Architecture={arch} APT::Architectures::={arch} APT::Install-Recommends=false APT::Sandbox::User=root
        Acquire::Languages=none Acquire::Retries=3
        Acquire::Check-Valid-Until=false"""  # a closed suite's index is past its date
    given = [f"-o{option}" for option in options.split()]
    try:
        run("apt-get", *given, "--error-on=any", "update", "-qq")
    except Failure as failure:
        said = re.findall(r"^E: (.*)", str(failure), re.MULTILINE) or [failure]
        raise Failure(f"{CACHE} has not all that is needed, and the archive can't be read: {said[0]}") from None
    return given


@functools.cache
def packages(arch: str) -> dict[tuple[str, str], Fields]:
    """Give the archive's packages of kernels by name and version."""
    blocks = run("apt-cache", *apt(arch), "dumpavail").split("\n\n")
    fields = (dict(re.findall(r"^([A-Za-z0-9]+): (.*)$", b, re.MULTILINE)) for b in blocks if "Package: linux-" in b)
    return {(each["Package"], each["Version"]): each for each in fields}


def newest(kernel: Kernel, flavour: str) -> list[Fields]:
    """Give the newest packages of a series, in the form of kernels.toml."""
    series, known = kernel.series.format("-cloud" if flavour == "cloud" else ""), packages(kernel.arch)
    found = [key for key in known if re.fullmatch(series, key[0])]
    if not found:
        raise Failure(f"{kernel.name}: no package like {series} is in {kernel.suite}")
    name, version = max(found, key=lambda key: [int(number) for number in re.findall(r"\d+", key[1])])
    names = [name]
    if "linux-binary-" in known[name, version].get("Depends", ""):  # divided in two since 6.19
        names = [name.replace("-image-", f"-{part}-") for part in ("binary", "modules")]
    return [{"name": each, "version": version, "sha256": known[each, version]["SHA256"]} for each in names]


def unpack(kernel: Kernel, flavour: str, to: Path) -> None:
    """Fetch the packages of a kernel, and unpack them into a folder."""
    chosen: list[Fields] = getattr(kernel, flavour)
    if not all((package["name"], package["version"]) in packages(kernel.arch) for package in chosen):
        chosen = newest(kernel, flavour)
        say(f"{kernel.name}: what is pinned has left the archive; taking {chosen[0]['version']}")
    for package in chosen:
        run("apt-get", *apt(kernel.arch), "download", f"{package['name']}={package['version']}", cwd=to.parent)
        (deb,) = to.parent.glob("*.deb")
        if hashlib.sha256(deb.read_bytes()).hexdigest() != package["sha256"]:
            raise Failure(f"{deb.name} has not the sum that kernels.toml says")
        run("dpkg-deb", "-x", deb, to)
        deb.unlink()


@functools.cache
def system(arch: str) -> Path:
    """Give the folder with Debian's packages of another architecture, unpacked once: a root, and what to build with."""
    folder = CACHE / f"system-{arch}-{hashlib.sha256(FOREIGN.encode()).hexdigest()[:8]}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        tree, archives = Path(name, "tree"), Path(name, "archives")
        (archives / "partial").mkdir(parents=True)
        run("apt-get", *apt(arch), f"-oDir::Cache::archives={archives}", "-yqq", "-d", "install", *FOREIGN.split())
        for deb in sorted(archives.glob("*.deb")):
            run("dpkg-deb", "-x", deb, tree)
        for part in ("bin", "sbin", "lib"):  # links, on every Debian that is installed
            if not (tree / part).is_symlink():
                run("cp", "-a", f"{tree / part}/.", tree / "usr" / part)
                shutil.rmtree(tree / part)
                (tree / part).symlink_to(f"usr/{part}")
        return tree.rename(folder)


def busybox(arch: str) -> Path:
    return Path("/" if arch == "amd64" else system(arch), "usr/bin/busybox")


# -- what a machine boots --------------------------------------------------------------------------


def fetch(kernel: Kernel, flavour: str) -> Path:
    """Give the folder of a kernel, made from its packages once: vmlinuz and an initrd."""
    built = sorted(path.read_text() for path in (TOP / "ci/lacking").iterdir()) if kernel.without else ()
    key = hashlib.sha256(repr((getattr(kernel, flavour), INIT, MODULES, *built)).encode()).hexdigest()[:8]
    folder = CACHE / f"{kernel.name}-{flavour}-{key}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        tree = Path(name, "tree")
        out = tree if flavour == "full" else Path(name, "out")  # vng finds the modules from the place of vmlinuz
        out.mkdir()
        unpack(kernel, flavour, tree)
        if kernel.without:
            say(f"{kernel.name}: building it, which takes minutes")
            run("nice", TOP / "ci/lacking/build", kernel.without, tree, out / "vmlinuz")
            loaded = {}
        else:
            (modules,) = (d for parent in ("lib/modules", "usr/lib/modules") for d in (tree / parent).glob("*"))
            (vmlinuz,) = [*tree.glob("boot/vmlinuz-*"), *modules.glob("vmlinuz")]
            vmlinuz.rename(out / "vmlinuz")
            loaded = needed(modules)
        initrd(loaded, busybox(kernel.arch), out / "initrd")
        return out.rename(folder)


def initrd(modules: dict[str, bytes], box: Path, to: Path) -> None:
    """Make the archive that a kernel boots from until it has found its disk."""
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        top = Path(name)
        for folder in ("modules", "proc", "dev", "new"):
            (top / folder).mkdir()
        for position, (stem, data) in enumerate(modules.items()):
            (top / "modules" / f"{position:02}-{stem}.ko").write_bytes(data)
        shutil.copy(box, top / "busybox")
        script(top / "init", INIT)
        run("sh", "-c", f"find . | busybox cpio -o -H newc >{to}", cwd=top)


def needed(tree: Path) -> dict[str, bytes]:
    """MODULES and what they depend on, in the order of loading, unpacked; what is no file is built in."""
    files = {path.name.partition(".")[0].replace("-", "_"): path for path in tree.rglob("*.ko*")}
    found: dict[str, bytes] = {}

    def visit(stem: str) -> None:
        if stem in files and stem not in found:
            data = files[stem].read_bytes()
            data = lzma.decompress(data) if files[stem].suffix == ".xz" else data
            for names in re.findall(rb"\0depends=([^\0]*)", data):
                for name in names.decode().replace("-", "_").split(","):
                    visit(name)
            found[stem] = data

    for stem in MODULES.split():
        visit(stem)
    return found
