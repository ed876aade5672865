"""The guest: a Debian root file system with its kernels, and the image the kernels boot from."""

from __future__ import annotations

import inspect
import json
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

from . import cache, host, progress
from .errors import BedError
from .packages import SUITE, Packages

SERIES = ("5.10", "6.1", "6.12")
IMAGE_GIB = 3
_HERE = Path(__file__).parent
_FILES = _HERE.parent / "guest"
_CHECKOUT = _HERE.parent.parent
_PYTHON_VERSION = "3.11"  # bookworm's
# Where the guest keeps what the project imports: `make PREPARED=1` uses this environment.
_VENV = Path("opt/pyambient")
_SITE_PACKAGES = _VENV / f"lib/python{_PYTHON_VERSION}/site-packages"
_PACKAGES = (
    # what pyambient, its demo and its tests call
    *("python3", "python3-venv", "libbpf1", "iproute2", "iptables", "nftables", "ipset"),
    *("procps", "util-linux", "curl", "tcpdump", "iputils-ping", "make", "ca-certificates"),
    # what makes it a machine, and a Vagrant box
    *("systemd-sysv", "udev", "dbus", "kmod", "ifupdown", "isc-dhcp-client", "netbase"),
    *("openssh-server", "sudo", "rsync", "less"),
    # what makes an initrd; busybox is its shell
    *("initramfs-tools", "busybox", "zstd"),
)
# Read by nobody in a guest, and a fifth of its size.
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
# Names from `[project.optional-dependencies] dev` that running tests takes; the rest checks code.
_TEST_TOOLS = ("pytest", "hypothesis", "h2", "grpcio-tools")
# `pip install --editable` in the guest, without network.
_BUILD_TOOLS = ("pip", "setuptools>=77", "wheel")
_PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in range(36, 16, -1))


@dataclass(frozen=True)
class Guest:
    """A finished guest: `image` (raw ext4), and per series a kernel with its initrd."""

    folder: Path

    @property
    def image(self) -> Path:
        return self.folder / "root.img"

    @property
    def ssh_key(self) -> Path:
        """The private key of the guest's user vagrant."""
        return self.folder / "vagrant_key"

    def kernel(self, series: str) -> Path:
        return self.folder / f"vmlinuz-{series}"

    def initrd(self, series: str) -> Path:
        return self.folder / f"initrd-{series}"


def guest() -> Guest:
    """The guest of this checkout; built first, with root and network, where it is missing."""
    if not cache.has("guest", key()):
        _debian()
        _python()
    return Guest(cache.folder("guest", "guest image", key(), _make_image))


def key() -> str:
    """Changes with whatever goes into the guest, and with how it is made."""
    files = sorted(path for path in _FILES.iterdir() if path.is_file())
    made_by = [inspect.getsource(step) for step in (_make_image, _take_kernels, _mke2fs)]
    return cache.digest(_debian_key(), _python_key(), *files, str(IMAGE_GIB), *made_by)


def _debian_key() -> str:
    packages = _HERE / "packages.py"
    made_by = inspect.getsource(_make_debian)
    return cache.digest(SUITE, *_PACKAGES, *_LEFT_OUT, *SERIES, packages, _initramfs(), made_by)


def _debian() -> Path:
    """Folder with `guest.tar`, and `kernels.json`: {series: kernel release}."""
    return cache.folder("debian", "Debian packages and kernels", _debian_key(), _make_debian)


def _initramfs() -> Path:
    """What the initrd needs to find its root: a hundred modules less to unpack at each boot."""
    return _FILES / "initramfs-modules"


def _make_debian(part: Path) -> None:
    host.require_root("building the guest")
    host.install("mmdebstrap", "debian-archive-keyring")
    log = part.parent / "debian.log"
    log.unlink(missing_ok=True)
    scratch = part / "apt"
    scratch.mkdir()
    packages = Packages(scratch, log)
    packages.update()
    images = {series: packages.kernel(series) for series in SERIES}
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    progress.run(
        "Debian packages and kernels",
        [
            *("mmdebstrap", "--variant=minbase", "--format=tar", "--architectures=amd64"),
            *('--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"'),
            *options,
            f"--include={','.join((*_PACKAGES, *images.values()))}",
            '--essential-hook=mkdir -p "$1/etc/initramfs-tools/conf.d"',
            '--essential-hook=echo MODULES=list >"$1/etc/initramfs-tools/conf.d/pyambient"',
            f"--essential-hook=cp {_initramfs()} $1/etc/initramfs-tools/modules",
            *(SUITE, str(part / "guest.tar"), *packages.sources),
        ],
        log,
    )
    releases = {series: image.removeprefix("linux-image-") for series, image in images.items()}
    (part / "kernels.json").write_text(json.dumps(releases))
    shutil.rmtree(scratch)


def requirements() -> list[str]:
    """What the guest's Python needs, by the project's own pyproject.toml."""
    project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text())["project"]
    dev = project["optional-dependencies"]["dev"]
    tools = [line for line in dev if line.startswith(_TEST_TOOLS)]
    return [*project["dependencies"], *tools, *_BUILD_TOOLS]


def _python_key() -> str:
    made_by = inspect.getsource(_make_python)
    return cache.digest(_PYTHON_VERSION, *requirements(), *_PLATFORMS, made_by)


def _python() -> Path:
    """Folder with `site-packages`."""
    return cache.folder("python", "Python packages", _python_key(), _make_python)


def _make_python(part: Path) -> None:
    host.install("python3-venv")
    log = part.parent / "python.log"
    log.unlink(missing_ok=True)
    scratch = part / "venv"
    title = "Python packages"
    progress.run(title, ["/usr/bin/python3", "-m", "venv", str(scratch)], log)
    # Named, not left to this machine's interpreter: the wheels are for the guest's.
    target = ["--only-binary=:all:", f"--python-version={_PYTHON_VERSION}", "--implementation=cp"]
    target += [f"--platform={platform}" for platform in _PLATFORMS]
    pip = [str(scratch / "bin/pip"), "install", "--quiet", "--disable-pip-version-check"]
    target += [f"--target={part / 'site-packages'}"]
    try:
        progress.run(title, [*pip, *target, *requirements()], log)
    except BedError as error:
        raise BedError(
            f"the Python packages cannot be had ({progress.last_line(log)})",
            f"see whether this machine has a network, or read {log}",
        ) from error
    shutil.rmtree(scratch)


def _make_image(part: Path) -> None:
    host.require_root("building the guest")
    host.install("e2fsprogs", "openssh-client")
    debian, python = _debian(), _python()
    log = part.parent / "guest.log"
    log.unlink(missing_ok=True)
    tree = part / "tree"
    tree.mkdir()

    def step(*command: str | Path) -> None:
        progress.run("guest image", command, log)

    step("tar", "-xf", debian / "guest.tar", "-C", tree)
    _take_kernels(part, tree, json.loads((debian / "kernels.json").read_text()))
    step("cp", "-a", _FILES, tree / "run/guest")
    step("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vagrant", "-f", part / "vagrant_key")
    shutil.copy(part / "vagrant_key.pub", tree / "run/guest/authorized_keys")
    step("chroot", tree, "sh", "/run/guest/prepare")
    step("cp", "-a", f"{python / 'site-packages'}/.", tree / _SITE_PACKAGES)
    shutil.rmtree(tree / "run/guest")
    step(*_mke2fs(), "-d", tree, part / "root.img", f"{IMAGE_GIB}G")
    shutil.rmtree(tree)


def _take_kernels(part: Path, tree: Path, releases: dict[str, str]) -> None:
    for series, release in releases.items():
        shutil.copy(tree / f"boot/vmlinuz-{release}", part / f"vmlinuz-{series}")
        shutil.move(tree / f"boot/initrd.img-{release}", part / f"initrd-{series}")


def _mke2fs() -> tuple[str, ...]:
    """ext4 without a journal: a guest is thrown away, or rebuilt."""
    return (
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-O",
        "^has_journal",
        "-E",
        "lazy_itable_init=1",
        "-L",
        "root",
    )
