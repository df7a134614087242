# SPDX-License-Identifier: BSD-2-Clause
"""The roots of machines: images with an interpreter, an environment, a project, and what starts its tests."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels import FOREIGN_PYTHON, busybox, system
from tools import RUN, TOP, Failure, run, script

if TYPE_CHECKING:
    from collections.abc import Iterable

TOOLS = """bash cat env id ip kill ldconfig mount nsenter prlimit rm setpriv sh sleep ss sysctl timeout true umount
    uname unshare"""
SETTINGS = "etc/passwd etc/group etc/nsswitch.conf etc/hosts etc/protocols etc/services"
# Read by the tests, or opened by name, so that ldd does not tell.
FILES = f"""{SETTINGS} etc/ld.so.cache etc/localtime usr/include/linux/bpf.h usr/lib/*/libbpf.so*
    usr/lib/*/libgcc_s.so.1 usr/lib/*/libnss_files.so.2"""
UNUSED = "test idlelib tkinter turtledemo ensurepip lib2to3 config-* site-packages"  # of the standard library
FOREIGN_UNUSED = "usr/include usr/share/doc usr/share/man usr/share/locale usr/share/i18n usr/lib/*/gconv var boot"

GUEST = """#!/vm/busybox sh
/vm/busybox mkdir /vm/bin; /vm/busybox --install -s /vm/bin; export PATH=/vm/bin
mkdir -p /sys /run /root /tmp /var/tmp /dev/pts /dev/shm; chmod 1777 /tmp /var/tmp
mount -t sysfs sys /sys; mount -t tmpfs run /run; mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts /dev/pts
mount -t cgroup2 cgroup /sys/fs/cgroup; mount -t tracefs tracing /sys/kernel/tracing
ln -s /proc/self/fd /dev/fd; hostname vm; stty -F "/dev/$tty" raw -echo; mkdir /run/out
"/vm/$job" /run/out >"/dev/$tty" 2>&1
for disk in /dev/vda /dev/vdb; do
    grep -q "^$disk " /proc/mounts || tar -C /run/out -cf "$disk" . && sync
done
reboot -f
"""


@dataclasses.dataclass(frozen=True)
class Project:
    """What is tested: its folder, the interpreter of its environment, and the compiled BPF objects of its tests."""

    folder: Path
    python: Path
    objects: Path
    wheel: Path | None = None  # for the machines of another architecture, in place of one that is built for them

    def sources(self) -> Iterable[Path]:
        return (path for path in self.folder.iterdir() if not (path.is_dir() and path.name.startswith(".")))


def image(project: Project, arch: str) -> None:
    """Make the root of the machines of an architecture."""
    with tempfile.TemporaryDirectory(dir=RUN) as name:
        top = Path(name, "root")
        (local if arch == "amd64" else foreign)(project, arch, top)
        for folder in ("vm", "proc", "dev"):
            (top / folder).mkdir(exist_ok=True)
        shutil.copy(busybox(arch), top / "vm/busybox")
        for job in RUN.glob("job-*"):
            shutil.copy(job, top / "vm" / job.name)
        script(top / "vm/init", GUEST)
        size = int(run("du", "-sm", top).split()[0]) * 5 // 4 + 256  # MiB, with what a machine may write
        features = "none,extent,filetype,dir_index,sparse_super,large_file"  # what 5.10 knows, without a journal
        run(*f"mke2fs -qF -t ext4 -O {features} -b4096 -i4096 -m0 -d {top} {RUN}/root-{arch} {size}M".split())


def copy(paths: Iterable[object], top: Path) -> None:
    """Copy as it is, and what links lead to; with its times, to which compiled Python is bound."""
    found = set()
    for path in map(str, paths):
        here = path
        while here not in found:
            here = os.path.join(os.path.realpath(os.path.dirname(here)), os.path.basename(here))
            found.add(here)
            if os.path.islink(here):
                here = os.path.join(os.path.dirname(here), os.readlink(here))
    run("cp", "-a", "--parents", *(path[1:] for path in sorted(found)), top, cwd="/")


# -- of this architecture --------------------------------------------------------------------------


def local(project: Project, _: str, top: Path) -> None:
    """Fill a root with what this machine has, at the paths that it has here."""
    for folder in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64"):
        (top / folder).mkdir(parents=True)
    for folder in ("bin", "sbin", "lib", "lib64"):
        (top / folder).symlink_to(f"usr/{folder}")
    tools = filter(None, (shutil.which(tool, path="/usr/bin:/usr/sbin") for tool in TOOLS.split()))
    files = (path for pattern in FILES.split() for path in Path("/").glob(pattern))
    library = Path(sysconfig.get_path("stdlib")).iterdir()
    library = (path for path in library if not any(map(path.match, UNUSED.split())))
    environment = (project.python, project.python.parent.parent, project.objects)
    copy([*tools, *files, *library, *project.sources(), *environment], top)
    binaries = (p for p in top.rglob("*") if p.is_file() and (".so" in p.name or os.access(p, os.X_OK)))
    needs = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    copy(re.findall(r"(?:=> |^\t)(/\S+) \(", needs, re.MULTILINE), top)


# -- of another ------------------------------------------------------------------------------------

TRIPLETS = {"arm64": "aarch64-linux-gnu", "s390x": "s390x-linux-gnu"}  # as compilers and Debian's folders have it
BIG = {"s390x"}  # of the other byte order


def foreign(project: Project, arch: str, top: Path) -> None:
    """Fill a root with Debian's packages, those from PyPI that the tests need, and the package, built for it."""
    run("cp", "-al", system(arch), top)
    for pattern in FOREIGN_UNUSED.split():
        for path in top.glob(pattern):
            shutil.rmtree(path)
    for path in top.glob("usr/lib/**/*.a"):
        path.unlink()
    site, machine = top / f"usr/local/lib/python{FOREIGN_PYTHON}/dist-packages", TRIPLETS[arch].partition("-")[0]
    tags = ("linux", "manylinux2014", "manylinux_2_28", "manylinux_2_34")
    interpreter = ("--python-version", FOREIGN_PYTHON, "--implementation=cp", "--only-binary=:all:")
    platforms = (f"--platform={tag}_{machine}" for tag in tags)
    # Of the versions that compiled the tests.
    versions = (f"{each}=={version(each, project.python)}" for each in ("pytest", "hypothesis"))
    pip(
        "install",
        "--target",
        site,
        *interpreter,
        *platforms,
        project.wheel or cross_wheel(arch, top.parent / "wheel"),
        *versions,
    )
    (top / "usr/local/bin").mkdir(parents=True, exist_ok=True)
    (top / "usr/local/bin/python").symlink_to(f"../../bin/python{FOREIGN_PYTHON}")
    settings = (path for name in SETTINGS.split() for path in Path("/").glob(name))
    copy([*settings, *project.sources(), project.objects], top)
    if arch in BIG:
        for source in (project.folder / "tests/bpf").glob("*.bpf.c"):
            to = f"{top}{project.objects}/{source.stem}.o"
            run("clang", *["-O2", "-g", "-target", "bpfeb", "-I/usr/include/x86_64-linux-gnu", "-c"], source, "-o", to)
    if "{}.{}".format(*sys.version_info) == FOREIGN_PYTHON:
        how = ("-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", top, "-p", "/")
        run(sys.executable, *how, top / f"usr/lib/python{FOREIGN_PYTHON}", site)


def cross_wheel(arch: str, to: Path) -> Path:
    """Build the package for another architecture; its BPF objects must be those that are built here."""
    triplet, root = TRIPLETS[arch], system(arch)
    flags = {
        "CC": f"{triplet}-gcc",
        "LDSHARED": f"{triplet}-gcc -shared",
        "LDFLAGS": f"--sysroot={root}",
        "CFLAGS": f"--sysroot={root} -I{root}/usr/include/python{FOREIGN_PYTHON}",
        "_PYTHON_HOST_PLATFORM": f"linux-{triplet.partition('-')[0]}",
    }
    source = to / "source"  # of its own, so that nothing is left in the checkout
    source.mkdir(parents=True)
    run("cp", "-a", *["pyproject.toml", "build_ffi.py", "LICENSE", "README.md", "bpf", "pyskl"], source, cwd=TOP)
    pip("install", "setuptools>=77", "cffi>=1.17")  # an environment that pip makes would be for the other architecture
    pip("wheel", "--no-build-isolation", "--no-deps", "-w", to, source, env=os.environ | flags)
    (wheel,) = to.glob("*.whl")
    with zipfile.ZipFile(wheel) as cross, zipfile.ZipFile(os.environ["WHEEL"]) as ours:
        for name in ours.namelist():
            if name.endswith(".bpf.o") and arch not in BIG and ours.read(name) != cross.read(name):
                raise Failure(f"{name} of {arch} is not the one that is built here")
    return wheel


def version(package: str, python: Path) -> str:
    """Give the version of a package in the environment of an interpreter."""
    (found,) = python.parent.parent.glob(f"lib/python3*/site-packages/{package}-*.dist-info")
    return found.name.removeprefix(f"{package}-").removesuffix(".dist-info")


def pip(*words: object, **how: Any) -> str:
    return run(sys.executable, "-m", "pip", "-q", *words, **how)
