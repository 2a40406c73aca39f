"""What many errors have in common, for people to read."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from apt_train.errors.record import ErrorRecord

LISTED = 20
"""At most so many causes, ranks and steps are listed, the most frequent first."""


@dataclass(frozen=True)
class Cause:
    """Errors of one cause."""

    name: str
    count: int
    ranks: tuple[int, ...]
    first_step: int | None
    last_step: int | None
    last: ErrorRecord

    @property
    def steps(self) -> str:
        """Such as 3 to 17."""
        if self.first_step is None:
            return "-"
        return str(self.first_step) if self.first_step == self.last_step else f"{self.first_step} to {self.last_step}"


@dataclass(frozen=True)
class ErrorPatterns:
    """The most frequent causes, ranks and steps; each count belongs to what stands before it."""

    total: int
    causes: tuple[Cause, ...]
    ranks: tuple[tuple[int, int], ...]
    steps: tuple[tuple[int, int], ...]


def find_patterns(records: Iterable[ErrorRecord]) -> ErrorPatterns:
    """Count errors by cause, rank and step."""
    by_cause: dict[str, list[ErrorRecord]] = {}
    for record in sorted(records, key=lambda r: r.time):
        by_cause.setdefault(record.cause, []).append(record)
    causes = sorted((_cause(name, group) for name, group in by_cause.items()), key=lambda c: -c.count)
    all_records = [record for group in by_cause.values() for record in group]
    ranks = Counter(r.rank for r in all_records).most_common(LISTED)
    steps = Counter(r.step for r in all_records if r.step is not None).most_common(LISTED)
    return ErrorPatterns(len(all_records), tuple(causes[:LISTED]), tuple(ranks), tuple(steps))


def to_markdown(patterns: ErrorPatterns) -> str:
    """The report as Markdown."""
    parts = [f"# Errors\n\n{_summary(patterns)}"]
    for title, header, rows in _tables(patterns):
        lines = [header, ["---"] * len(header), *[[_cell(value) for value in row] for row in rows]]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    for cause in patterns.causes:
        # Indented, as a fence could be closed by the text itself.
        text = "\n".join(f"    {line}" for line in cause.last.traceback.splitlines())
        parts.append(f"## Last traceback of {_cell(cause.name)}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def to_html(patterns: ErrorPatterns) -> str:
    """The report as one HTML page that needs nothing else."""
    parts = [f"<h1>Errors</h1><p>{html.escape(_summary(patterns))}</p>"]
    for title, header, rows in _tables(patterns):
        lines = [_row("th", header), *[_row("td", row) for row in rows]]
        parts.append(f"<h2>{title}</h2><table>{''.join(lines)}</table>")
    for cause in patterns.causes:
        name, text = html.escape(cause.name), html.escape(cause.last.traceback)
        parts.append(f"<details><summary>Last traceback of {name}</summary><pre>{text}</pre></details>")
    style = "body{font-family:sans-serif}td,th{border:1px solid #999;padding:.2em .6em;text-align:left}"
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Errors</title><style>{style}</style>"
    return head + "\n".join(parts) + "</html>\n"


def _cause(name: str, records: Sequence[ErrorRecord]) -> Cause:
    steps = [record.step for record in records if record.step is not None]
    ranks = tuple(sorted({record.rank for record in records}))
    return Cause(name, len(records), ranks, min(steps, default=None), max(steps, default=None), records[-1])


def _summary(patterns: ErrorPatterns) -> str:
    if not patterns.total:
        return "No errors were logged."
    last = max(cause.last.time for cause in patterns.causes)
    when = datetime.fromtimestamp(last, UTC).isoformat(timespec="seconds")
    return f"Errors: {patterns.total}; causes: {len(patterns.causes)}; the last at {when}."


def _tables(patterns: ErrorPatterns) -> list[tuple[str, list[str], list[list[str]]]]:
    causes = [[c.name, str(c.count), ", ".join(map(str, c.ranks)), c.steps] for c in patterns.causes]
    ranks = [[str(rank), str(count)] for rank, count in patterns.ranks]
    steps = [[str(step), str(count)] for step, count in patterns.steps]
    return [
        ("Causes", ["cause", "errors", "ranks", "steps"], causes),
        ("Ranks", ["rank", "errors"], ranks),
        ("Steps", ["step", "errors"], steps),
    ]


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
