"""What would happen to a connection, rule by rule: the answer of `pyambient explain`, as values.

Interception and mesh each explain their part; the parts are joined where both are known.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

# Of one part. With text of these lengths an answer fits a packet of the details channel.
MOST_FINDINGS: Final = 64
_LONGEST_RULE: Final = 120
_LONGEST: Final = 300


class Outcome(enum.Enum):
    """How a connection ends up. CAPTURED: the proxy gets it, and what it does is not known."""

    DIRECT = "direct"
    CAPTURED = "captured"
    TUNNELLED = "tunnelled"
    SAME_NODE = "same-node"
    PLAIN = "plain"
    FORWARDED = "forwarded"
    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule that was asked, whether it matched, and what was found, in words."""

    rule: str
    matched: bool
    found: str

    def to_json(self) -> dict[str, Any]:
        rule, found = _shown(self.rule, _LONGEST_RULE), _shown(self.found, _LONGEST)
        return {"rule": rule, "matched": self.matched, "found": found}


class End(NamedTuple):
    """What a rule that decides leads to."""

    outcome: Outcome
    summary: str


# A rule that was asked; with an end, it is the last one.
Ruled = tuple[Finding, End | None]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The rules in the order in which they are asked, and what comes of them."""

    findings: tuple[Finding, ...]
    outcome: Outcome
    summary: str

    @classmethod
    def of(cls, rules: Iterable[Ruled]) -> Self:
        """Ask rules until one decides; one of them has to."""
        findings: list[Finding] = []
        for finding, end in rules:
            findings.append(finding)
            if end is not None:
                return cls(_bounded(findings), *end)
        raise ValueError("no rule decides")

    def then(self, more: Self) -> Self:
        """The rules of both parts, with the end of the second one, which decides."""
        return type(self)(self.findings + more.findings, more.outcome, more.summary)

    def to_json(self) -> dict[str, Any]:
        return {
            "findings": [finding.to_json() for finding in self.findings],
            "outcome": self.outcome.value,
            "summary": _shown(self.summary, _LONGEST),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The explanation of such fields; KeyError, TypeError or ValueError if they are none."""
        findings = tuple(Finding(**finding) for finding in fields["findings"])
        return cls(findings, Outcome(fields["outcome"]), str(fields["summary"]))


def _shown(text: str, most: int) -> str:
    """Names may come from a file of anybody's: one line of ASCII, of a bounded length."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:most])


def _bounded(findings: list[Finding]) -> tuple[Finding, ...]:
    """All of them, or the first and the last ones, the deciding one among them."""
    if len(findings) <= MOST_FINDINGS:
        return tuple(findings)
    left_out = len(findings) - MOST_FINDINGS + 1
    gap = Finding("more rules", False, f"{left_out} are left out here")
    return (*findings[: MOST_FINDINGS - 2], gap, findings[-1])
