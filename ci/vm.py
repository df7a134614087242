# SPDX-License-Identifier: BSD-2-Clause
"""Run a pytest suite as root on other kernels, in virtual machines. ci/vm prepares what goes in, and starts this.

A machine is a qemu that boots a Debian kernel. Its root is an ext4 image; what it writes there is thrown away. What it
gives comes back as a tar on a second disk. With --vng, virtme-ng starts the machines instead, with this machine's root,
read-only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from xml.etree import ElementTree as ET

from kernels import Kernel, fetch, kernels, newest
from roots import Project, image
from tools import BUILD, CACHE, RUN, TOP, Failure, run, say, script

import pyskl

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of pyskl's own tests, these are not run where nothing else is said: what does not depend on the kernel; and
# test_package, which builds the package, for there is no compiler in a machine.
LEFT_OUT = ["-m", "not slow and not portable", "--ignore=tests/test_package.py"]
LIMIT = 900  # seconds for the tests on one kernel: several times what they take under emulation, two machines at a time
SLACK = 60  # seconds that starting and ending may add
TRIAL = 8  # seconds for a machine to show that KVM is usable; it takes one

# What runs in a machine of either kind, with the folder for what it gives.
JOB = """#!/bin/bash
exec </dev/null; export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/vm/bin
grep -q ' /sys/fs/bpf ' /proc/mounts || mount -t bpf bpf /sys/fs/bpf
ip link set lo up; cd {project}; uname -r >"$1/release"; cut -d ' ' -f 1 /proc/uptime >"$1/booted"
env -i HOME=/root LANG=C.UTF-8 PATH="{bin}:$PATH" NO_COLOR=1 COLUMNS=110 \\
    PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis \\
    PYSKL_TEST_OBJECTS={objects} PYSKL_TEST_LOAD=1000 PYSKL_REQUIRED_FEATURES={features} {lacking} \\
    timeout -s INT -k 20 {limit} python -P -m pytest -p no:cacheprovider --junitxml="$1/junit.xml" \\
    --durations=8 --durations-min=3 {arguments}
echo $? >"$1/exit"; cut -d ' ' -f 1 /proc/uptime >"$1/ended"; dmesg >"$1/dmesg"
"""


def job(kernel: Kernel, project: Project, options: argparse.Namespace) -> None:
    """Write what a machine runs."""
    fixed, chosen = [] if options.project else LEFT_OUT, options.arguments or kernel.tests.split()
    text = JOB.format(
        project=project.folder,
        bin=project.python.parent if kernel.arch == "amd64" else "/usr/local/bin",
        objects=project.objects,
        features=",".join(name for name in pyskl.features() if name not in kernel.lacks),
        lacking=f"PYSKL_LACKS={kernel.without}" if kernel.without else "",
        limit=options.limit,
        arguments=shlex.join([*fixed, *chosen]),
    )
    script(RUN / f"job-{kernel.name}", text)


# -- machines --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A machine of an architecture: how qemu makes it, and what its two consoles are to the kernel."""

    qemu: str
    console: str
    output: str  # of the tests
    serial: str  # options that connect these two
    emulated: str = "norandmaps"  # for the kernel, where it is


# What was translated is found again only at the same address, so that without randomisation a process starts in a
# quarter of the time. Where the machine that emulates an x86 is busy, Linux may take the TSC for ten times slower than
# it is. With -cpu max each pointer of arm64 is signed, which takes ten times as long to boot.
PIPE = "-chardev stdio,id=out"
HARDWARE = {
    "amd64": Hardware(
        "qemu-system-x86_64 -cpu max", "ttyS0", "ttyS1", "-serial file:{0} -serial stdio", "clocksource=hpet norandmaps"
    ),
    "arm64": Hardware(
        "qemu-system-aarch64 -machine virt -cpu cortex-a72",
        "ttyAMA0",
        "ttyS0",
        f"-serial file:{{0}} {PIPE} -device pci-serial,chardev=out",
    ),
    "s390x": Hardware(
        "qemu-system-s390x -cpu max",
        "ttyS0",
        "hvc0",
        f"-serial file:{{0}} -device virtio-serial-ccw {PIPE} -device virtconsole,chardev=out",
    ),
}
BOOT = "panic=-1 oops=panic mitigations=off init_on_alloc=0 random.trust_cpu=on no_timer_check"

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


def leave(number: int, _: object) -> NoReturn:
    """End the machines, for which the threads wait, for which Python waits."""
    leaving.set()
    for machine in list(machines):
        machine.kill()
    sys.exit(f"ci/vm: ended by {signal.Signals(number).name}")


def qemu(kernel: Path, arch: str, accelerator: str, *more: object) -> list[object]:
    how = "tcg,thread=multi,tb-size=256" if accelerator == "tcg" else accelerator
    fixed = f"{HARDWARE[arch].qemu} -nodefaults -no-user-config -display none -no-reboot -smp 1 -m 1024"
    return [*fixed.split(" "), "-accel", how, "-kernel", kernel / "vmlinuz", "-initrd", kernel / "initrd", *more]


def choose(kernel: Path) -> str:
    """Tell whether a kernel boots with KVM: where there is /dev/kvm, a machine may still hang."""
    console = RUN / "trial"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    command = qemu(kernel, "amd64", "kvm", "-append", f"console=ttyS0 {BOOT}", "-serial", f"file:{console}")
    machine = start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        machine.wait(TRIAL)
    end(machine)
    return "kvm" if console.exists() and "no root" in console.read_text(errors="replace") else "tcg"


def direct(kernel: Kernel, folder: Path, out: Path, accelerator: str) -> list[object]:
    """Give the command of a machine whose disks are the image and the place for what it gives."""
    (out / "disk").touch()
    os.truncate(out / "disk", 64 << 20)
    disks = (f"snapshot=on,file.locking=off,file={RUN}/root-{kernel.arch}", f"cache=unsafe,file={out}/disk")
    drives = [word for disk in disks for word in ("-drive", f"if=virtio,format=raw,{disk}")]
    hardware = HARDWARE[kernel.arch]
    emulated = hardware.emulated if accelerator == "tcg" else ""
    # A parameter that the kernel does not know is in the environment of its first process.
    append = f"console={hardware.console} {BOOT} {emulated} tty={hardware.output} job=job-{kernel.name}"
    serial = hardware.serial.format(out / "console").split()
    return qemu(folder, kernel.arch, accelerator, "-append", append, *serial, *drives)


def vng(kernel: Kernel, folder: Path, out: Path, accelerator: str) -> list[object]:
    """Give the command of a machine whose root is this one's, and which may write to what it gives alone."""
    how, emulated = ([], "") if accelerator == "kvm" else (["--disable-kvm"], HARDWARE[kernel.arch].emulated)
    fixed = ["vng", "-v", "--force-9p", "--cpus", 1, "--memory", "1G", *how]
    append = f"oops=panic init_on_alloc=0 module_blacklist=kvm {emulated}"
    folders = ["--rodir", TOP, f"--rwdir=/run/out={out}"]  # the first for a checkout in /tmp, which is another there
    return [*fixed, "-r", folder / "vmlinuz", "-a", append, *folders, "--", f"{RUN}/job-{kernel.name} /run/out"]


def test(kernel: Kernel, folder: Path, accelerator: str, options: argparse.Namespace) -> Result:
    """Run the job on a kernel, and judge what it gives."""
    out, clock = RUN / kernel.name, time.monotonic()
    out.mkdir()
    command = (vng if options.vng else direct)(kernel, folder, out, accelerator if kernel.arch == "amd64" else "tcg")
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


def report(results: list[Result], title: str, to: Path) -> None:
    table = "\n".join([f"{title}\n", HEAD, *(result.row() for result in results), ""])
    to.with_suffix(".md").write_text(table)
    fields = {"title": title, "kernels": [dataclasses.asdict(result) for result in results]}
    to.with_suffix(".json").write_text(json.dumps(fields, indent=1) + "\n")
    for result in results:
        for line in (*result.failed, *result.evidence):
            print(f"[{result.kernel}] {line}")
    print("\n" + table)


# -- the command -----------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    default = [name for name, kernel in kernels().items() if not kernel.tests]
    parser = argparse.ArgumentParser("./ci/vm", epilog="What comes after -- is given to pytest.")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"by default: {' '.join(default)}")
    parser.add_argument("--vng", action="store_true", help="boot with virtme-ng and kernels of the full flavour")
    parser.add_argument("--project", type=Path, help="run the tests of the project in this folder instead")
    parser.add_argument("--wheel", type=Path, help="install this into the machines of another architecture")
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
    options.wheel = options.wheel and (options.start / options.wheel).resolve()
    options.native = options.native and options.start / options.native
    options.kernels = options.kernels or default
    if unknown := set(options.kernels) - {*kernels()}:
        parser.error(f"no such kernel: {', '.join(unknown)}; there are: {', '.join(kernels())}")
    if options.vng and not all(kernels()[name].full for name in options.kernels):
        parser.error("--vng: one of these has no package of the full flavour in kernels.toml")
    return options


def fetched(chosen: list[Kernel], flavour: str) -> Iterator[tuple[Kernel, Path | Result]]:
    """Give each kernel's folder, or that it is not to be had."""
    for kernel in chosen:
        try:
            yield kernel, fetch(kernel, flavour)
        except Failure as failure:
            say(f"{kernel.name}: not fetched")
            yield kernel, Result(kernel.name, problem="not fetched", evidence=[str(failure)])


def main(options: argparse.Namespace) -> int:
    flavour = "full" if options.vng else "cloud"
    chosen = [kernels()[name] for name in options.kernels]
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

    given = [*fetched(chosen, flavour)]
    there = {kernel.name: folder for kernel, folder in given if isinstance(folder, Path)}
    say(f"kernels: {took()}")
    objects = Path(os.environ["PYSKL_TEST_OBJECTS"])
    project = Project(options.project or TOP, options.python, objects, options.wheel)
    for kernel in chosen:
        job(kernel, project, options)
    with ThreadPoolExecutor(options.jobs) as pool, contextlib.ExitStack() as stack:
        for arch in HARDWARE:
            stack.callback((RUN / f"root-{arch}").unlink, missing_ok=True)
        here = [there[kernel.name] for kernel in chosen if kernel.name in there and kernel.arch == "amd64"]
        trial = pool.submit(lambda: options.accelerator or (choose(here[0]) if here else "tcg"))
        for arch in {kernel.arch for kernel in chosen if kernel.name in there and not options.vng}:
            image(project, arch)
        accelerator = trial.result()
        say(f"image, and whether KVM is usable: {took()}; {'yes' if accelerator == 'kvm' else 'no: emulation'}")

        def work(each: tuple[Kernel, Path | Result]) -> Result:
            kernel, folder = each
            return test(kernel, folder, accelerator, options) if isinstance(folder, Path) else folder

        results = list(pool.map(work, given))
        say(f"machines: {took()}")
    if options.native:
        results.insert(0, Result("this machine", os.uname().release))
        count(options.native, results[0], None)
    own = "; ".join({" ".join(kernel.tests.split()): None for kernel in chosen})
    default = "all tests" if options.project else own or "what depends on the kernel"
    what = shlex.join(options.arguments) or default
    title = f"Tests on kernels: {what}{', by vng' if options.vng else ''} ({accelerator})"
    report(results, title, BUILD / ("kernels-vng" if options.vng else "kernels"))
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
