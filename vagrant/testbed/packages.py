"""Debian's package sources through an APT configuration of our own.

The machine's /etc/apt says which mirrors to use and is never touched; state, cache and indexes
lie in a scratch folder. So a bookworm guest can have kernels of other suites, and a machine
without these suites stays without them.
"""

from __future__ import annotations

import os
import re
import subprocess
from functools import cached_property
from pathlib import Path

from . import progress
from .errors import BedError

SUITE = "bookworm"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_MAIN_SUITES = (SUITE, f"{SUITE}-updates", f"{SUITE}-backports")
# Linux 5.10 is the kernel of the release before.
_SECURITY_SUITES = (f"{SUITE}-security", "bullseye-security")
_INDEX = re.compile(r"^'(?P<base>\S+)/dists/(?P<suite>[^/\s']+)/InRelease'", re.MULTILINE)


def mirrors(uris: str) -> tuple[str, str]:
    """Debian's mirror and its security mirror, out of what `apt-get --print-uris update` prints."""
    bases = {found["suite"]: found["base"] for found in _INDEX.finditer(uris)}
    security = [suite for suite in bases if suite.endswith("-security")]
    for suite in security:
        main = bases.get(suite.removesuffix("-security"))
        if main:
            return main, bases[suite]
    raise BedError(
        "this machine's APT sources name no Debian release together with its security suite",
        "build on Debian, or copy a filled PYAMBIENT_CACHE here",
    )


class Packages:
    """APT with its state below `scratch`, on the mirrors of this machine."""

    def __init__(self, scratch: Path, log: Path) -> None:
        self._scratch = scratch
        self._config = scratch / "apt.conf"
        self._log = log
        for name in ("state/lists/partial", "cache/archives/partial", "etc/apt.conf.d"):
            (scratch / name).mkdir(parents=True)
        (scratch / "status").touch()
        self._config.write_text(
            f'Dir::State "{scratch}/state";\nDir::State::status "{scratch}/status";\n'
            f'Dir::Cache "{scratch}/cache";\nDir::Etc "{scratch}/etc";\n'
            f'Acquire::Languages "none";\nAPT::Sandbox::User "root";\n' + _network_settings()
        )
        (scratch / "etc/sources.list").write_text("\n".join(self.sources) + "\n")

    @cached_property
    def sources(self) -> list[str]:
        """Lines for a sources.list: the guest's suite and those that its kernels come from."""
        # An empty state: otherwise only indexes that have to be fetched anew are printed.
        options = ["-o", f"Dir::State::Lists={self._scratch}/none", "--print-uris"]
        printed = subprocess.run(
            ["apt-get", *options, "update"], capture_output=True, text=True, check=False
        )
        main, security = mirrors(printed.stdout)
        places = [(main, suite) for suite in _MAIN_SUITES]
        places += [(security, suite) for suite in _SECURITY_SUITES]
        return [f"deb [signed-by={_KEYRING}] {base} {suite} main" for base, suite in places]

    def update(self) -> None:
        """Fetch the indexes."""
        try:
            self._apt("apt-get", "update", "-q", "--error-on=any")
        except BedError as error:
            raise BedError(
                f"no network: the package sources cannot be read ({progress.last_line(self._log)})",
                "connect this machine, or copy a filled PYAMBIENT_CACHE here",
            ) from error

    def download(self, package: str) -> Path:
        """The .deb file of a package's best version."""
        self._apt("apt-get", "download", package)
        return next(self._scratch.glob(f"{package}_*.deb"))

    def kernel(self, series: str) -> str:
        """The package with the best cloud kernel of a series such as "6.1"."""
        best = ("", "")
        for meta in ("linux-image-cloud-amd64", f"linux-image-{series}-cloud-amd64"):
            for stanza in self._show(meta).split("\n\n"):
                fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line)
                version = fields.get("Version", "")
                if version.startswith(f"{series}.") and _newer(version, best[0]):
                    best = (version, fields["Depends"].split()[0])
        if not best[1]:
            raise BedError(
                f"the package sources have no cloud kernel {series}",
                f"look for one in {', '.join((*_MAIN_SUITES, *_SECURITY_SUITES))}",
            )
        return best[1]

    def _show(self, package: str) -> str:
        command = ["apt-cache", "show", "--all-versions", package]
        return subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False
        ).stdout

    def _apt(self, *command: str) -> None:
        progress.run(command[1], command, self._log, self._scratch, self._environment)

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "APT_CONFIG": str(self._config), "LC_ALL": "C"}

    def __repr__(self) -> str:
        return f"<Packages in {self._scratch}>"


def _newer(version: str, other: str) -> bool:
    command = ["dpkg", "--compare-versions", version, "gt", other]
    return subprocess.run(command, check=False).returncode == 0


def _network_settings() -> str:
    """The machine's way to the network (proxies, certificates), for our configuration too."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False)
    wanted = re.compile(r"^Acquire::https?(::\w+)* \"[^\"]+\";$", re.IGNORECASE)
    return "".join(f"{line}\n" for line in dump.stdout.splitlines() if wanted.match(line))
