"""The account a run gives of itself: acts, remarks, checks, and the verdict at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

_WIDTH = 100


class Account:
    """Prints what happens as it happens, and keeps which checks failed."""

    def __init__(self) -> None:
        self._console = Console(width=_WIDTH, highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._held = 0
        self.failed: list[str] = []

    @contextlib.contextmanager
    def act(self, title: str) -> Iterator[None]:
        """A heading, and a spinner (on a terminal) as long as the act takes."""
        self._console.print(f"\n[bold cyan]{title}[/]")
        with self._console.status("[dim]working[/]"):
            yield

    def say(self, text: str) -> None:
        self._console.print(Text(f"  {text}"))

    def show(self, text: str) -> None:
        """What a program printed, as it printed it."""
        for line in text.rstrip().splitlines():
            self._console.print(Text(f"    {line}", style="dim"))

    def check(self, claim: str, held: bool, evidence: str = "") -> None:  # noqa: FBT001 - reads as a sentence
        """Tell whether `claim` held, and by what it was seen."""
        mark = Text("  ✓ ", style="bold green") if held else Text("  ✗ ", style="bold red")
        self._console.print(mark + Text(claim))
        if evidence:
            self.show(evidence)
        if held:
            self._held += 1
        else:
            self.failed.append(claim)

    def verdict(self) -> int:
        """The closing line, and the exit code: 0 if every check held."""
        took = time.monotonic() - self._began
        if self.failed:
            self._console.print(
                f"\n[bold red]{len(self.failed)} of {self._total} checks failed:[/]"
            )
            for claim in self.failed:
                self._console.print(Text(f"  ✗ {claim}"))
            return 1
        self._console.print(f"\n[bold green]All {self._total} checks held[/] in {took:.1f} s.")
        return 0

    @property
    def _total(self) -> int:
        return self._held + len(self.failed)

    def __repr__(self) -> str:
        return f"<Account: {self._held} held, {len(self.failed)} failed>"
