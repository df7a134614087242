# SPDX-License-Identifier: BSD-2-Clause
"""Run a pytest suite as root on other kernels, in virtual machines. ci/vm prepares what goes in, and starts this.

A machine is a qemu that boots a Debian kernel. Its root is an ext4 image with the interpreter, the environment, the
project and some tools, at the paths that they have here; what it writes there is thrown away. What it gives comes back
as a tar on a second disk. With --vng, virtme-ng starts the machines instead, with this machine's root, read-only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import lzma
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias
from xml.etree import ElementTree as ET

import pyskl

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterable

TOP = Path(__file__).resolve().parent.parent
BUILD = TOP / ".build"
CACHE = Path(os.environ.get("PYSKL_CACHE", BUILD)) / "kernels"
RUN = BUILD / "vm"  # a folder for each kernel; and while they run, the image and the job

# Of pyskl's own tests, these are not run: what takes long and does not depend on the kernel; test_package, which builds
# the package, for there is no compiler in a machine; and test_lacking, which needs kernels built without something.
LEFT_OUT = ["-m", "not slow", "--ignore=tests/test_package.py", "--ignore=tests/test_lacking.py"]
LIMIT = 600  # seconds for the tests on one kernel: twice what they take under emulation, two machines at a time
SLACK = 60  # seconds that starting and ending may add
TRIAL = 8  # seconds for a machine to show that KVM is usable; it takes one

BOOT = "console=ttyS0 panic=-1 oops=panic mitigations=off init_on_alloc=0 random.trust_cpu=on no_timer_check"
# Under emulation: on a busy machine, Linux may take the TSC for ten times slower than it is; and what was translated is
# found again only at the same address, so that without randomisation a process starts in a quarter of the time.
HOW = {"kvm": "", "tcg": " clocksource=hpet norandmaps"}
# Loaded where the kernel has them as files; what they depend on is found in the modules themselves.
MODULES = "virtio_pci virtio_blk ext4 veth dummy inet_diag tcp_diag udp_diag unix_diag vsock vsock_loopback"
TOOLS = """bash cat env id ip kill ldconfig mount nsenter prlimit rm setpriv sh sleep ss sysctl timeout true umount
    uname unshare"""
# Read by the tests, or opened by name, so that ldd does not tell.
FILES = """etc/passwd etc/group etc/nsswitch.conf etc/hosts etc/protocols etc/services etc/ld.so.cache etc/localtime
    usr/include/linux/bpf.h usr/lib/*/libbpf.so* usr/lib/*/libgcc_s.so.1 usr/lib/*/libnss_files.so.2"""
UNUSED = "test idlelib tkinter turtledemo ensurepip lib2to3 config-* site-packages"  # of the standard library

INIT = """#!/busybox sh
b=/busybox
$b mount -t proc proc /proc; $b mount -t devtmpfs dev /dev
for module in /modules/*; do $b insmod "$module"; done
$b mount -t ext4 -o noatime /dev/vda /new || { echo no root; $b reboot -f; }
$b mount -o move /proc /new/proc; $b mount -o move /dev /new/dev
exec $b switch_root /new /vm/init
"""
GUEST = """#!/vm/busybox sh
/vm/busybox mkdir /vm/bin; /vm/busybox --install -s /vm/bin; export PATH=/vm/bin
mkdir -p /sys /run /root /tmp /var/tmp /dev/pts /dev/shm; chmod 1777 /tmp /var/tmp
mount -t sysfs sys /sys; mount -t tmpfs run /run; mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts /dev/pts
mount -t cgroup2 cgroup /sys/fs/cgroup; mount -t tracefs tracing /sys/kernel/tracing
ln -s /proc/self/fd /dev/fd; hostname vm; stty -F /dev/ttyS1 raw -echo; mkdir /run/out
/vm/job /run/out "$required" >/dev/ttyS1 2>&1
tar -C /run/out -cf /dev/vdb . && sync; reboot -f
"""
# What runs in a machine of either kind, with the folder for what it gives, and the features that must be there.
JOB = """#!/bin/bash
exec </dev/null; export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/vm/bin
grep -q ' /sys/fs/bpf ' /proc/mounts || mount -t bpf bpf /sys/fs/bpf
ip link set lo up; cd {project}; uname -r >"$1/release"; cut -d ' ' -f 1 /proc/uptime >"$1/booted"
env -i HOME=/root LANG=C.UTF-8 PATH="{bin}:$PATH" NO_COLOR=1 COLUMNS=110 \\
    PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis \\
    PYSKL_TEST_OBJECTS={objects} PYSKL_TEST_LOAD=2000 PYSKL_REQUIRED_FEATURES="$2" \\
    timeout -s INT -k 20 {limit} python -P -m pytest -p no:cacheprovider --junitxml="$1/junit.xml" {arguments}
echo $? >"$1/exit"; cut -d ' ' -f 1 /proc/uptime >"$1/ended"; dmesg >"$1/dmesg"
"""


class Failure(Exception):
    """Something that whoever started this can act on."""


def say(text: str) -> None:
    print(f"\033[1m== {text}\033[0m", flush=True)


def run(*command: object, **how: Any) -> str:
    """Give what a command prints, or Failure with what it says."""
    words = [*map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **how)
    if done.returncode:
        raise Failure(f"{shlex.join(words)[:200]}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


# -- kernels ---------------------------------------------------------------------------------------

Fields: TypeAlias = dict[str, str]


@dataclasses.dataclass
class Kernel:
    """As kernels.toml has it."""

    name: str
    suite: str
    series: str
    lacks: list[str]
    cloud: list[Fields]
    full: list[Fields]


@functools.cache
def kernels() -> dict[str, Kernel]:
    with (TOP / "ci/kernels.toml").open("rb") as file:
        return {fields["name"]: Kernel(**fields) for fields in tomllib.load(file)["kernel"]}


@functools.cache
def apt() -> list[str]:
    """Give the options of an apt with lists and settings of its own; the machine's say where the archive is."""
    own = CACHE / "apt"
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
    suites = sorted({kernel.suite for kernel in kernels().values()})
    lines = (f"deb {where[suite.endswith('-security')]} {suite} main\n" for suite in suites)
    (own / "sources.list").write_text("".join(lines))
    options = f"""Dir::State::lists={own}/lists Dir::State::status={own}/status Dir::Cache={own}/cache
        Dir::Etc::sourcelist={own}/sources.list Dir::Etc::sourceparts=/dev/null Dir::Etc::preferencesparts=/dev/null
        APT::Architecture=amd64 APT::Sandbox::User=root Acquire::Languages=none Acquire::Retries=3
        Acquire::Check-Valid-Until=false"""  # a closed suite's index is past its date
    given = [f"-o{option}" for option in options.split()]
    run("apt-get", *given, "update", "-qq")
    return given


@functools.cache
def packages() -> dict[tuple[str, str], Fields]:
    """Give the archive's packages of kernels by name and version."""
    blocks = run("apt-cache", *apt(), "dumpavail").split("\n\n")
    fields = (dict(re.findall(r"^([A-Za-z0-9]+): (.*)$", b, re.MULTILINE)) for b in blocks if "Package: linux-" in b)
    return {(each["Package"], each["Version"]): each for each in fields}


def newest(kernel: Kernel, flavour: str) -> list[Fields]:
    """Give the newest packages of a series, in the form of kernels.toml."""
    series = kernel.series.format("-cloud" if flavour == "cloud" else "")
    found = [key for key in packages() if re.fullmatch(series, key[0])]
    if not found:
        raise Failure(f"{kernel.name}: no package like {series} is in {kernel.suite}")
    name, version = max(found, key=lambda key: [int(number) for number in re.findall(r"\d+", key[1])])
    names = [name]
    if "linux-binary-" in packages()[name, version].get("Depends", ""):  # divided in two since 6.19
        names = [name.replace("-image-", f"-{part}-") for part in ("binary", "modules")]
    return [{"name": each, "version": version, "sha256": packages()[each, version]["SHA256"]} for each in names]


def fetch(kernel: Kernel, flavour: str) -> Path:
    """Give the folder of a kernel, made from its packages once: vmlinuz and an initrd."""
    chosen: list[Fields] = getattr(kernel, flavour)
    key = hashlib.sha256(repr((chosen, INIT, MODULES)).encode()).hexdigest()[:8]
    folder = CACHE / f"{kernel.name}-{flavour}-{key}"
    if folder.exists():
        return folder
    if not all((package["name"], package["version"]) in packages() for package in chosen):
        chosen = newest(kernel, flavour)
        say(f"{kernel.name}: what is pinned has left the archive; taking {chosen[0]['version']}")
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        tree, top = Path(name, "tree"), Path(name, "initrd")
        out = tree if flavour == "full" else Path(name, "out")  # vng finds the modules from the place of vmlinuz
        for package in chosen:
            run("apt-get", *apt(), "download", f"{package['name']}={package['version']}", cwd=name)
            (deb,) = Path(name).glob("*.deb")
            if hashlib.sha256(deb.read_bytes()).hexdigest() != package["sha256"]:
                raise Failure(f"{deb.name} has not the sum that kernels.toml says")
            run("dpkg-deb", "-x", deb, tree)
            deb.unlink()
        (modules,) = (d for parent in ("lib/modules", "usr/lib/modules") for d in (tree / parent).glob("*"))
        (vmlinuz,) = [*tree.glob("boot/vmlinuz-*"), *modules.glob("vmlinuz")]
        for each in (out, top / "modules", top / "proc", top / "dev", top / "new"):
            each.mkdir(parents=True, exist_ok=True)
        for position, (stem, data) in enumerate(needed(modules).items()):
            (top / "modules" / f"{position:02}-{stem}.ko").write_bytes(data)
        shutil.copy("/usr/bin/busybox", top / "busybox")
        script(top / "init", INIT)
        run("sh", "-c", f"find . | ./busybox cpio -o -H newc >{out}/initrd", cwd=top)
        vmlinuz.rename(out / "vmlinuz")
        return out.rename(folder)


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


# -- what goes into a machine ----------------------------------------------------------------------


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def image(project: Path, python: Path) -> None:
    """Make the root of the machines."""
    with tempfile.TemporaryDirectory(dir=RUN) as name:
        top = Path(name)
        for folder in ("proc", "dev", "vm", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"):
            (top / folder).mkdir(parents=True)
        for folder in ("bin", "sbin", "lib", "lib64"):
            (top / folder).symlink_to(f"usr/{folder}")
        tools = filter(None, (shutil.which(tool, path="/usr/bin:/usr/sbin") for tool in TOOLS.split()))
        files = (path for pattern in FILES.split() for path in Path("/").glob(pattern))
        library = Path(sysconfig.get_path("stdlib")).iterdir()
        library = (path for path in library if not any(map(path.match, UNUSED.split())))
        sources = (path for path in project.iterdir() if not (path.is_dir() and path.name.startswith(".")))
        environment = (python, python.parent.parent, os.environ["PYSKL_TEST_OBJECTS"])
        copy([*tools, *files, *library, *sources, *environment], top)
        binaries = (p for p in top.rglob("*") if p.is_file() and (".so" in p.name or os.access(p, os.X_OK)))
        needs = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
        copy(re.findall(r"(?:=> |^\t)(/\S+) \(", needs, re.MULTILINE), top)
        shutil.copy("/usr/bin/busybox", top / "vm/busybox")
        shutil.copy(RUN / "job", top / "vm/job")
        script(top / "vm/init", GUEST)
        size = int(run("du", "-sm", top).split()[0]) * 5 // 4 + 256  # MiB, with what a machine may write
        features = "none,extent,filetype,dir_index,sparse_super,large_file"  # what 5.10 knows, without a journal
        run(*f"mke2fs -qF -t ext4 -O {features} -b4096 -i4096 -m0 -d {top} {RUN}/root {size}M".split())


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


# -- machines --------------------------------------------------------------------------------------

machines: set[subprocess.Popen[str]] = set()
leaving = threading.Event()


def start(command: list[object], **how: Any) -> subprocess.Popen[str]:
    """Start a machine. All its processes end with the thread that started it, however that is killed."""
    bound = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", *map(str, command)]
    machine = subprocess.Popen(bound, text=True, errors="replace", stdin=subprocess.DEVNULL, **how)
    machines.add(machine)
    if leaving.is_set():
        machine.kill()
    return machine


def end(machine: subprocess.Popen[str]) -> None:
    machine.kill()
    machine.wait()
    machines.discard(machine)


def leave(*_: object) -> NoReturn:
    """End the machines, for which the threads wait, for which Python waits."""
    leaving.set()
    for machine in list(machines):
        machine.kill()
    sys.exit(143)


def qemu(kernel: Path, accelerator: str, *more: object) -> list[object]:
    how = "tcg,thread=multi,tb-size=256" if accelerator == "tcg" else accelerator
    fixed = "qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -cpu max -smp 1 -m 1024"
    return [*fixed.split(" "), "-accel", how, "-kernel", kernel / "vmlinuz", "-initrd", kernel / "initrd", *more]


def choose(kernel: Path) -> str:
    """Tell whether a kernel boots with KVM: where there is /dev/kvm, a machine may still hang."""
    console = RUN / "trial"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    command = qemu(kernel, "kvm", "-append", BOOT, "-serial", f"file:{console}")
    machine = start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        machine.wait(TRIAL)
    end(machine)
    return "kvm" if console.exists() and "no root" in console.read_text(errors="replace") else "tcg"


def direct(kernel: Path, features: str, out: Path, accelerator: str) -> list[object]:
    """Give the command of a machine whose disks are the image and the place for what it gives."""
    (out / "disk").touch()
    os.truncate(out / "disk", 64 << 20)
    disks = (f"snapshot=on,file.locking=off,file={RUN}/root", f"cache=unsafe,file={out}/disk")
    drives = [word for disk in disks for word in ("-drive", f"if=virtio,format=raw,{disk}")]
    # A parameter that the kernel does not know is in the environment of its first process.
    append = ("-append", f"{BOOT}{HOW[accelerator]} required={features}")
    return qemu(kernel, accelerator, *append, "-serial", f"file:{out}/console", "-serial", "stdio", *drives)


def vng(kernel: Path, features: str, out: Path, accelerator: str) -> list[object]:
    """Give the command of a machine whose root is this one's, and which may write to what it gives alone."""
    how = [] if accelerator == "kvm" else ["--disable-kvm"]
    fixed = ["vng", "-v", "--force-9p", "--cpus", 1, "--memory", "1G", *how]
    boot = [
        "-r",
        kernel / "vmlinuz",
        "-a",
        f"oops=panic init_on_alloc=0 module_blacklist=kvm{HOW[accelerator]}",
    ]
    return [*fixed, *boot, "--rwdir", out, "--", f"{RUN}/job {out} {features}"]


def test(kernel: Kernel, folder: Path, accelerator: str, options: argparse.Namespace) -> Result:
    """Run the job on a kernel, and judge what it gives."""
    out, clock = RUN / kernel.name, time.monotonic()
    out.mkdir()
    features = ",".join(name for name in pyskl.features() if name not in kernel.lacks)
    command = (vng if options.vng else direct)(folder, features, out, accelerator)
    with (out / ("console" if options.vng else "qemu")).open("wb") as errors, (out / "log").open("w") as log:
        machine = start(command, stdout=subprocess.PIPE, stderr=errors)
        timer = threading.Timer(options.limit + SLACK, machine.kill)
        timer.start()
        for line in machine.stdout or ():
            log.write(line)
            print(f"[{kernel.name}] {line}", end="", flush=True)
        timer.cancel()
        end(machine)
    if not options.vng:
        run("tar", "--no-same-owner", "-C", out, "-xf", out / "disk")
        (out / "disk").unlink()
    return judge(kernel, out, time.monotonic() - clock, options)


# -- results ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What the tests gave on a kernel."""

    kernel: str
    release: str = "?"
    passed: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)  # by what the kernel lacks
    failed: list[str] = dataclasses.field(default_factory=list)
    problem: str = ""  # beside tests that failed
    evidence: list[str] = dataclasses.field(default_factory=list)
    boot: float = 0
    tests: float = 0
    whole: float = 0

    def row(self) -> str:
        verdict = self.problem or ("failed" if self.failed else "passed")
        skipped = ", ".join(f"{name} {count}" for name, count in sorted(self.skipped.items())) or 0
        times = (f"{seconds:.0f} s" if seconds else "" for seconds in (self.boot, self.tests, self.whole))
        cells = (self.kernel, self.release, verdict, self.passed, len(self.failed), skipped, *times)
        return f"| {' | '.join(map(str, cells))} |"


def count(junit: Path, result: Result, lacks: list[str] | None) -> None:
    """Count what JUnit tells. With lacks, a test that was skipped for anything else has failed."""
    for case in ET.parse(junit).getroot().iter("testcase"):  # noqa: S314 - it comes from our own pytest
        name, skip = f"{case.get('classname')}::{case.get('name')}", case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed.append(name)
        elif skip is None or skip.get("type") == "pytest.xfail":
            result.passed += 1
        else:
            message = skip.get("message", "")
            reason = message.removeprefix("needs ").partition(":")[0]
            if lacks is None or reason in lacks:
                result.skipped[reason] = result.skipped.get(reason, 0) + 1
            else:
                result.failed.append(f"{name} (skipped: {message})")


def judge(kernel: Kernel, out: Path, whole: float, options: argparse.Namespace) -> Result:
    text = {path.name: path.read_text(errors="replace") for path in out.iterdir()}
    result = Result(kernel.name, text.get("release", "?").strip(), whole=whole)
    console, log = (text.get("console", "") + text.get("qemu", "")).splitlines(), text["log"].splitlines()
    if "junit.xml" in text:
        count(out / "junit.xml", result, None if options.project else kernel.lacks)
    if "ended" in text:
        result.boot = float(text["booted"])
        result.tests = float(text["ended"]) - result.boot
    status = int(text.get("exit", -1))
    if trace := [number for number, line in enumerate(console) if re.search("Kernel panic|BUG: |Oops: ", line)]:
        result.problem = "kernel panic"
        result.evidence = console[max(0, trace[0] - 5) :][:60]
    elif status < 0:
        result.problem = "no result" if whole < options.limit else "no end within the limit"
        result.evidence = [*console[-15:], *log[-10:]]
    elif status > 1 or not (result.passed or result.failed):
        result.problem = "tests over the limit" if status in (124, 137) else f"pytest ended with {status}"
        result.evidence = log[-10:]
    return result


HEAD = """| kernel | release | result | passed | failed | skipped, for want of | boot | tests | in all |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def report(results: list[Result], title: str) -> None:
    table = "\n".join([f"{title}\n", HEAD, *(result.row() for result in results), ""])
    (BUILD / "kernels.md").write_text(table)
    fields = {"title": title, "kernels": [dataclasses.asdict(result) for result in results]}
    (BUILD / "kernels.json").write_text(json.dumps(fields, indent=1) + "\n")
    for result in results:
        for line in (*result.failed, *result.evidence):
            print(f"[{result.kernel}] {line}")
    print("\n" + table)


# -- the command -----------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser("./ci/vm", epilog="What comes after -- is given to pytest.")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"all of: {', '.join(kernels())}")
    parser.add_argument("--vng", action="store_true", help="boot with virtme-ng and kernels of the full flavour")
    parser.add_argument("--project", type=Path, help="run the tests of the project in this folder instead")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds for the tests on one kernel (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many machines at a time (%(default)s)")
    parser.add_argument("--accelerator", choices=("kvm", "tcg"), help="instead of a trial whether KVM is usable")
    parser.add_argument("--native", type=Path, metavar="JUNIT", help="show this result beside, as this machine's")
    parser.add_argument("--newest", action="store_true", help="print what the archive has now, for kernels.toml")
    parser.add_argument("--python", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--from", type=Path, dest="start", help=argparse.SUPPRESS)
    options = parser.parse_args(words[:split])
    options.arguments = words[split + 1 :]
    options.project = options.project and (options.start / options.project).resolve()
    options.native = options.native and options.start / options.native
    if unknown := set(options.kernels) - {*kernels()}:
        parser.error(f"no such kernel: {', '.join(unknown)}")
    return options


def main(options: argparse.Namespace) -> int:
    flavour = "full" if options.vng else "cloud"
    chosen = [kernels()[name] for name in options.kernels or kernels()]
    CACHE.mkdir(parents=True, exist_ok=True)
    if options.newest:
        for kernel in chosen:
            for package in newest(kernel, flavour):
                print(f"\n[[kernel.{flavour}]]", *(f'{key} = "{value}"' for key, value in package.items()), sep="\n")
        return 0
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir()
    times = [time.monotonic()]

    def took() -> str:
        times.append(time.monotonic())
        return f"{times[-1] - times[-2]:.1f} s"

    folders = [fetch(kernel, flavour) for kernel in chosen]
    say(f"kernels: {took()}")
    names = {"project": options.project or TOP, "bin": options.python.parent, "limit": options.limit}
    arguments = shlex.join([*([] if options.project else LEFT_OUT), *options.arguments])
    script(RUN / "job", JOB.format(**names, objects=os.environ["PYSKL_TEST_OBJECTS"], arguments=arguments))
    with ThreadPoolExecutor(options.jobs) as pool, contextlib.ExitStack() as stack:
        stack.callback((RUN / "root").unlink, missing_ok=True)
        trial = pool.submit(lambda: options.accelerator or choose(folders[0]))
        if not options.vng:
            image(names["project"], options.python)
        accelerator = trial.result()
        say(f"image, and whether KVM is usable: {took()}; {'yes' if accelerator == 'kvm' else 'no: emulation'}")
        work = functools.partial(test, accelerator=accelerator, options=options)
        results = list(pool.map(work, chosen, folders))
        say(f"machines: {took()}")
    if options.native:
        results.insert(0, Result("this machine", os.uname().release))
        count(options.native, results[0], None)
    what = shlex.join(options.arguments) or "all tests"
    report(results, f"Tests on kernels: {what}{', by vng' if options.vng else ''} ({accelerator})")
    return int(any(result.failed or result.problem for result in results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    try:
        with (BUILD / "vm.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sys.exit(main(parse()))
    except BlockingIOError:
        sys.exit("ci/vm: another run is under way in this checkout")
    except Failure as failure:
        sys.exit(f"ci/vm: {failure}")
