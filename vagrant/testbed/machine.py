"""One job in one guest: a kernel booted directly by qemu, on an overlay that is thrown away."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import cache, host
from .errors import BedError

# Of the guest's results; the disk is sparse.
_ANSWER_BYTES = 256 << 20
_BOOT_SECONDS = {"kvm": 20.0, "tcg": 120.0}
_MEMORY_MIB = 2048
_CPUS = 2
# cryptomgr.notests: its self tests hung one emulated boot of fifteen. panic=-1: a panic ends qemu.
_KERNEL_LINE = (
    "root=/dev/vda rw init=/sbin/pyambient-init console=ttyS0 quiet net.ifnames=0 "
    "cryptomgr.notests mitigations=off panic=-1"
)


class _NotUp(Exception):
    """The guest did not reach its job; the text says how that showed."""


class TimedOut(BedError):
    """The job was still running when its time was over."""


@dataclass(frozen=True)
class Boot:
    """What qemu boots: `initrd` is None where the kernel has all it needs built in."""

    name: str
    kernel: Path
    initrd: Path | None
    image: Path


def run(
    boot: Boot,
    write_job: Callable[[Path], None],
    results: Path,
    timeout: float,
    output: Callable[[bytes], object],
) -> int:
    """Run the job; its exit code. What it left in $RESULTS is copied into `results`.

    A boot that hangs is tried once more; without KVM the guest's CPU is emulated.
    """
    host.require("qemu-system-x86_64", "qemu-system-x86")
    host.require("qemu-img", "qemu-utils")
    with tempfile.TemporaryDirectory(prefix="pyambient-guest-") as folder:
        work = Path(folder)
        write_job(work / "job.tar")
        for accelerator, last in _attempts():
            try:
                return _attempt(boot, accelerator, work, results, timeout, output)
            except _NotUp as reason:
                if last:
                    raise _no_boot(boot, reason, work, results) from reason
                _forgo(accelerator, boot, reason, work)
    raise AssertionError("the last attempt either returned or raised")


def _attempts() -> list[tuple[str, bool]]:
    """(accelerator, is it the last try), in order."""
    driver = os.environ.get("PYAMBIENT_DRIVER", "")
    if driver not in ("", "kvm", "qemu"):
        raise BedError(f"PYAMBIENT_DRIVER={driver} is unknown", "set it to kvm or qemu")
    tcg = [("tcg", False), ("tcg", True)]
    if driver == "kvm":
        return [("kvm", False), ("kvm", True)]
    if driver == "qemu" or _kvm_failed().exists() or not _has_kvm():
        return tcg
    return [("kvm", False), *tcg]


def _has_kvm() -> bool:
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def _kvm_failed() -> Path:
    """Exists when this kernel's KVM did not boot a guest; other kernels are tried anew."""
    return cache.root() / f"kvm-fails-on-{os.uname().release}"


def _forgo(accelerator: str, boot: Boot, reason: _NotUp, work: Path) -> None:
    """Tell why this attempt is given up."""
    if accelerator == "kvm" and os.environ.get("PYAMBIENT_DRIVER") != "kvm":
        # In a cache that another user has filled, each run tries KVM again.
        with contextlib.suppress(OSError):
            _kvm_failed().touch()
        note = f"KVM does not work here: {reason} ({_said(work)}); emulating the CPU"
    else:
        note = f"kernel {boot.name} under {accelerator}: {reason} ({_said(work)}); trying again"
    sys.stderr.write(f"test bed: {note}\n")


def _no_boot(boot: Boot, reason: _NotUp, work: Path, results: Path) -> BedError:
    """Keep what was said, beside where the job's results would be."""
    results.mkdir(parents=True, exist_ok=True)
    kept = results / f"console-{boot.name}.log"
    kept.write_text("".join(text for _, text in _words(work)))
    return BedError(f"kernel {boot.name} does not boot: {reason} ({_said(work)})", f"read {kept}")


def _said(work: Path) -> str:
    """In a line: the last that came on the console, and what qemu complained of first."""
    return "; ".join(
        f"{who}: {said[0 if who == 'qemu' else -1].strip()}"
        for who, text in _words(work)
        if (said := text.strip().splitlines())
    )


def _words(work: Path) -> Iterator[tuple[str, str]]:
    """(who, all that it said) of kernel and qemu, each of which may have said nothing."""
    for who, name in (("console", "console"), ("qemu", "qemu.log")):
        log = work / name
        yield who, log.read_text(errors="replace") if log.exists() else ""


def _attempt(
    boot: Boot,
    accelerator: str,
    work: Path,
    results: Path,
    timeout: float,
    output: Callable[[bytes], object],
) -> int:
    for left in ("answer.tar", "console"):
        (work / left).unlink(missing_ok=True)
    with (work / "answer.tar").open("wb") as disk:
        disk.truncate(_ANSWER_BYTES)
    overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(boot.image)]
    subprocess.run([*overlay, str(work / "root.qcow2")], check=True)
    qemu = _start(boot, accelerator, work)
    try:
        rest = _await_up(qemu, _boot_seconds(accelerator))
        output(rest)
        _follow(qemu, boot, timeout, output)
    finally:
        qemu.kill()
        qemu.communicate()
    return _take_answer(work / "answer.tar", results, boot)


def _boot_seconds(accelerator: str) -> float:
    return float(os.environ.get("PYAMBIENT_BOOT_TIMEOUT") or _BOOT_SECONDS[accelerator])


def _start(boot: Boot, accelerator: str, work: Path) -> subprocess.Popen[bytes]:
    disks = (
        (work / "root.qcow2", "format=qcow2,cache=unsafe"),
        (work / "job.tar", "format=raw,readonly=on"),
        (work / "answer.tar", "format=raw,cache=unsafe"),
    )
    command = ["qemu-system-x86_64", *_cpu(accelerator), "-smp", str(_CPUS), "-m", str(_MEMORY_MIB)]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-kernel", str(boot.kernel), "-append", _KERNEL_LINE]
    command += ["-initrd", str(boot.initrd)] if boot.initrd else []
    command += ["-serial", f"file:{work / 'console'}"]
    command += ["-chardev", "stdio,id=job,signal=off", "-serial", "chardev:job"]
    command += [
        "-object",
        "rng-random,id=rng,filename=/dev/urandom",
        "-device",
        "virtio-rng-pci,rng=rng",
    ]
    for path, options in disks:
        command += ["-drive", f"file={path},if=virtio,{options}"]
    with (work / "qemu.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # ^C is ours to handle
        )


def _cpu(accelerator: str) -> list[str]:
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    # Five-level page tables only make the emulation slower.
    return ["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]


def _await_up(qemu: subprocess.Popen[bytes], patience: float) -> bytes:
    """Wait for init's first line; what came behind it."""
    seen = b""
    try:
        for chunk in _read(qemu, patience):
            seen += chunk
            if b"\n" in seen:
                return seen.partition(b"\n")[2]
    except TimeoutError:
        raise _NotUp(f"not up after {patience:.0f} s") from None
    raise _NotUp("the machine ended while booting")


def _follow(
    qemu: subprocess.Popen[bytes], boot: Boot, timeout: float, output: Callable[[bytes], object]
) -> None:
    """Pass on what the job prints until the guest ends."""
    try:
        for chunk in _read(qemu, timeout):
            output(chunk)
    except TimeoutError:
        raise TimedOut(
            f"the job on kernel {boot.name} was ended after {timeout:.0f} s",
            "give it more with --timeout",
        ) from None


def _read(qemu: subprocess.Popen[bytes], patience: float) -> Iterator[bytes]:
    """Chunks of the job's serial port until qemu ends; TimeoutError when patience does."""
    port = _port(qemu)
    deadline = time.monotonic() + patience
    with selectors.DefaultSelector() as selector:
        selector.register(port, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                chunk = os.read(port, 1 << 16)
                if not chunk:
                    return
                yield chunk
    raise TimeoutError


def _port(qemu: subprocess.Popen[bytes]) -> int:
    if qemu.stdout is None:
        raise ValueError("qemu was started without a pipe")
    return qemu.stdout.fileno()


def _take_answer(answer: Path, results: Path, boot: Boot) -> int:
    try:
        with tarfile.open(answer, "r:") as tar:
            code = tar.extractfile("code")
            value = int(code.read() if code else b"")
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise BedError(
            f"the guest with kernel {boot.name} ended without an exit code", "run it again"
        ) from error
    results.mkdir(parents=True, exist_ok=True)
    unpack = [
        "tar",
        "-xf",
        str(answer),
        "-C",
        str(results),
        "--no-same-owner",
        "--strip-components=1",
    ]
    done = subprocess.run([*unpack, "results"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(f"test bed: not all results came back: {done.stderr.strip()}\n")
    return value
