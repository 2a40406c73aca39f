"""What many errors have in common, for people to read."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from apt_core.error_log.record import ErrorRecord

LISTED = 20
"""At most so many causes, and values of each place, are listed, the most frequent first."""
_NAMED = 5
"""So many values of a cause are named one by one."""


@dataclass(frozen=True)
class Cause:
    """Errors of one cause."""

    name: str
    count: int
    values: Mapping[str, tuple[Any, ...]]
    """The values of each place that it has been seen at, in order."""
    last: ErrorRecord

    def seen_at(self, place: str) -> str:
        """Such as "0, 1" or "3 to 17"."""
        values = self.values[place]
        if len(values) <= _NAMED:
            return ", ".join(map(str, values)) or "-"
        if all(isinstance(value, int) for value in values):
            return f"{values[0]} to {values[-1]}"
        return f"{', '.join(map(str, values[:_NAMED]))} and {len(values) - _NAMED} more"


@dataclass(frozen=True)
class ErrorPatterns:
    """The most frequent causes, and of each place the most frequent values with their counts."""

    total: int
    causes: tuple[Cause, ...]
    places: Mapping[str, tuple[tuple[Any, int], ...]]


def find_patterns(records: Iterable[ErrorRecord], places: Sequence[str]) -> ErrorPatterns:
    """Count errors by cause and by places, which are keys of their contexts."""
    by_cause: dict[str, list[ErrorRecord]] = {}
    for record in sorted(records, key=lambda r: r.time):
        by_cause.setdefault(record.cause, []).append(record)
    causes = sorted((_cause(name, group, places) for name, group in by_cause.items()), key=lambda c: -c.count)
    all_records = [record for group in by_cause.values() for record in group]
    counts = {place: tuple(Counter(_values(all_records, place)).most_common(LISTED)) for place in places}
    return ErrorPatterns(len(all_records), tuple(causes[:LISTED]), counts)


def to_markdown(patterns: ErrorPatterns) -> str:
    """The report as Markdown."""
    parts = [f"# Errors\n\n{_summary(patterns)}"]
    for title, header, rows in _tables(patterns):
        lines = [header, ["---"] * len(header), *[[_cell(value) for value in row] for row in rows]]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    for cause in _with_traceback(patterns):
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
    for cause in _with_traceback(patterns):
        name, text = html.escape(cause.name), html.escape(cause.last.traceback)
        parts.append(f"<details><summary>Last traceback of {name}</summary><pre>{text}</pre></details>")
    style = "body{font-family:sans-serif}td,th{border:1px solid #999;padding:.2em .6em;text-align:left}"
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Errors</title><style>{style}</style>"
    return head + "\n".join(parts) + "</html>\n"


def _cause(name: str, records: Sequence[ErrorRecord], places: Sequence[str]) -> Cause:
    values = {place: tuple(sorted(set(_values(records, place)))) for place in places}
    return Cause(name, len(records), values, records[-1])


def _values(records: Iterable[ErrorRecord], place: str) -> list[Any]:
    return [record.context[place] for record in records if record.context.get(place) is not None]


def _with_traceback(patterns: ErrorPatterns) -> list[Cause]:
    return [cause for cause in patterns.causes if cause.last.traceback]


def _summary(patterns: ErrorPatterns) -> str:
    if not patterns.total:
        return "No errors were logged."
    last = max(cause.last.time for cause in patterns.causes)
    return f"Errors: {patterns.total}; causes: {len(patterns.causes)}; the last at {_moment(last)}."


def _tables(patterns: ErrorPatterns) -> list[tuple[str, list[str], list[list[str]]]]:
    places = list(patterns.places)
    causes = [
        [cause.name, str(cause.count), *[cause.seen_at(place) for place in places], _moment(cause.last.time)]
        for cause in patterns.causes
    ]
    tables = [("Causes", ["cause", "errors", *[f"{place}s" for place in places], "last"], causes)]
    for place, counts in patterns.places.items():
        rows = [[str(value), str(count)] for value, count in counts]
        tables.append((f"{place.capitalize()}s", [place, "errors"], rows))
    return tables


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
