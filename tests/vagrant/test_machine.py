"""Jobs in guests, with a program that stands in for qemu."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vagrant.testbed import machine
from vagrant.testbed.errors import BedError

# What a guest does, done by a shell: it speaks on stdout, and answers on the last disk.
_QEMU = """#!/bin/bash
echo "$*" >>"$LOG"
for word; do
    case $word in file=*answer.tar,*) answer=${word#file=} answer=${answer%%,*} ;; esac
    case $word in file:*) echo "the kernel's last words" >"${word#file:}" ;; esac
done
answer() {
    mkdir -p "$answer.d/results"
    echo "$1" >"$answer.d/code"
    echo found >"$answer.d/results/file"
    tar -cf "$answer" -C "$answer.d" code results
}
"""
_UP = 'echo "up 1.5 6.1"\n'


class Guest:
    """Runs a job in a pretended guest; keeps what it printed and how qemu was called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.output = b""
        self._bin = folder / "bin"
        self._bin.mkdir()
        self._program("qemu-img", "#!/bin/sh\n")
        monkeypatch.setenv("PATH", f"{self._bin}:{os.environ['PATH']}")
        monkeypatch.setenv("LOG", str(folder / "log"))
        monkeypatch.setenv("PYAMBIENT_CACHE", str(folder / "cache"))
        monkeypatch.setenv("PYAMBIENT_DRIVER", "qemu")
        (folder / "cache/testbed").mkdir(parents=True)

    def _program(self, name: str, text: str) -> None:
        path = self._bin / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, behaviour: str, timeout: float = 20) -> int:
        self._program("qemu-system-x86_64", _QEMU + behaviour)
        boot = machine.Boot("6.1", Path("vmlinuz"), Path("initrd"), Path("root.img"))
        return machine.run(boot, Path.touch, self.folder / "results", timeout, self._print)

    def _print(self, data: bytes) -> None:
        self.output += data

    @property
    def boots(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    return Guest(tmp_path, monkeypatch)


def test_code_output_and_results_come_back(guest: Guest) -> None:
    """What the job printed, what it left and its exit code reach the host; the up line does not."""
    code = guest.run(_UP + "echo hello; answer 7")

    assert (code, guest.output) == (7, b"hello\n")
    assert (guest.folder / "results/file").read_text() == "found\n"


def test_a_boot_that_fails_is_tried_once_more(
    guest: Guest, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second boot runs the job, and the first one's failure is told with its last words."""
    once = f'[ "$(wc -l <"$LOG")" -gt 1 ] || exit 0\n{_UP}answer 0'

    assert guest.run(once) == 0
    assert len(guest.boots) == 2
    assert "the kernel's last words" in capsys.readouterr().err


def test_a_boot_that_hangs_twice_is_reported(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two boots without an up line comes one line that names the kernel and its console."""
    monkeypatch.setenv("PYAMBIENT_BOOT_TIMEOUT", "0.2")

    with pytest.raises(BedError, match=r"kernel 6\.1 does not boot.*console-6\.1\.log"):
        guest.run("exec sleep 60")
    assert len(guest.boots) == 2


def test_what_qemu_complains_of_is_told(guest: Guest) -> None:
    """A qemu that ends before it opens a console: its complaint is in the line, and kept."""
    no_console = 'for word; do case $word in file:*) rm "${word#file:}" ;; esac; done\n'

    with pytest.raises(BedError, match=r"qemu: no such accelerator\); read .*console-6\.1\.log"):
        guest.run(no_console + 'echo "no such accelerator" >&2')
    kept = guest.folder / "results/console-6.1.log"
    assert kept.read_text() == "no such accelerator\n"


def test_a_job_that_takes_too_long_is_ended(guest: Guest) -> None:
    """The guest is ended when the job's time is over, with what it printed so far passed on."""
    with pytest.raises(machine.TimedOut, match="--timeout"):
        guest.run(_UP + "echo begun; exec sleep 60", timeout=0.5)
    assert guest.output == b"begun\n"


def test_a_guest_that_dies_is_no_success(guest: Guest) -> None:
    """A guest that ends without an answer is an error, not exit code 0."""
    with pytest.raises(BedError, match="without an exit code"):
        guest.run(_UP)


def test_kvm_that_fails_is_forgone(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where KVM boots nothing, the CPU is emulated: this time after a line, later at once."""
    monkeypatch.delenv("PYAMBIENT_DRIVER")
    monkeypatch.setattr(machine, "_has_kvm", lambda: True)
    only_tcg = f'[[ "$*" == *tcg* ]] || exit 1\n{_UP}answer 0'

    assert [guest.run(only_tcg), guest.run(only_tcg)] == [0, 0]
    assert ["kvm" in line for line in guest.boots] == [True, False, False]
    assert capsys.readouterr().err.count("KVM does not work here") == 1


def test_kvm_is_forgone_in_a_cache_that_cannot_be_written(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who may only read the cache gets a guest all the same."""
    (guest.folder / "file").touch()
    monkeypatch.setenv("PYAMBIENT_CACHE", str(guest.folder / "file"))
    monkeypatch.delenv("PYAMBIENT_DRIVER")
    monkeypatch.setattr(machine, "_has_kvm", lambda: True)

    assert guest.run(f'[[ "$*" == *tcg* ]] || exit 1\n{_UP}answer 0') == 0
    assert "KVM does not work here" in capsys.readouterr().err


@pytest.mark.parametrize("driver", ["kvm", "qemu"])
def test_the_driver_can_be_chosen(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    """PYAMBIENT_DRIVER decides between KVM and emulation."""
    monkeypatch.setenv("PYAMBIENT_DRIVER", driver)

    assert guest.run(_UP + "answer 0") == 0
    assert ("-accel kvm" in guest.boots[0]) == (driver == "kvm")


def test_an_unknown_driver_is_refused(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped PYAMBIENT_DRIVER is not taken for one of the two."""
    monkeypatch.setenv("PYAMBIENT_DRIVER", "xen")

    with pytest.raises(BedError, match="kvm or qemu"):
        guest.run(_UP)
