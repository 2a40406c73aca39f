"""What a check found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """The server runs, but not as well as it could."""
    PROBLEM = "problem"
    """The server does not start, or fails requests."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    level: Level
    message: str
    advice: str = ""
    """What to do; empty if all is well."""


def ok(check: str, message: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, message)


def warning(check: str, message: str, advice: str) -> Finding:
    """It could be better."""
    return Finding(check, Level.WARNING, message, advice)


def problem(check: str, message: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(check, Level.PROBLEM, message, advice)


def has_problems(findings: Sequence[Finding]) -> bool:
    """Whether a server should not be started."""
    return any(finding.level is Level.PROBLEM for finding in findings)


def as_text(findings: Sequence[Finding]) -> str:
    """For people: a line each, with the advice below."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:8} {finding.check:12} {finding.message}")
        if finding.advice:
            lines.append(f"{'':21} -> {finding.advice}")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """For programs: a list of objects."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)
