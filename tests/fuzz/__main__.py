"""`make fuzz`: coverage-guided fuzzing of the targets (atheris, the `fuzz` extra).

Each target runs for the time given, from the inputs that the repository keeps; what it learns stays
in the corpus. An input that breaks something is named at the end: kept in
tests/fuzz/inputs it is a test case.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

INPUTS = Path(__file__).parent / "inputs"
_MAX_LENGTH = 4096
_ONE_INPUT_SECONDS = 20


def fuzz_one(name: str, libfuzzer: list[str]) -> None:
    """Become the fuzzer of one target; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["pyambient.hbone", "pyambient.model", "hpack"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *libfuzzer], TARGETS[name])
    atheris.Fuzz()


def fuzz(name: str, seconds: int, corpus: Path) -> bool:
    """Fuzz one target in a process of its own; whether nothing was found."""
    own, findings = corpus / name, corpus / "findings"
    for directory in (own, findings):
        directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz", "--target", name, "--"]
    command += [f"-max_total_time={seconds}", f"-max_len={_MAX_LENGTH}"]
    command += [f"-timeout={_ONE_INPUT_SECONDS}", f"-artifact_prefix={findings}/{name}-"]
    command += ["-print_final_stats=1", str(own), str(INPUTS / name)]
    return subprocess.run(command, check=False).returncode == 0


def main() -> int:
    """Fuzz every target in turn; 1 if one has found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--target", help="just this one, with libFuzzer's own options behind --")
    parser.add_argument("libfuzzer", nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.target:
        fuzz_one(chosen.target, chosen.libfuzzer)
        return 0
    names = sorted(directory.name for directory in INPUTS.iterdir())
    broken = [name for name in names if not fuzz(name, chosen.seconds, chosen.corpus)]
    for name in broken:
        print(f"target {name} found something: see {chosen.corpus}/findings")  # noqa: T201
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
