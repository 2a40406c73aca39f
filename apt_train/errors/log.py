"""Errors of all ranks as lines of JSON in one folder, bounded in size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_train.errors.record import ErrorRecord
from apt_train.errors.report import ErrorPatterns, find_patterns, to_html, to_markdown


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written."""

    markdown: Path
    html: Path


class ErrorLogger:
    """Keeps the errors of one rank, and reads those of all.

    Args:
        folder: shared by the ranks; each writes files of its own.
        max_bytes: of this rank's two files together; the older half goes first.
    """

    def __init__(self, folder: Path, rank: int, *, max_bytes: int = 10_000_000) -> None:
        self._folder, self._rank, self._half = folder, rank, max_bytes // 2
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"errors-rank{rank}.jsonl"

    def log_to_file(self, error: BaseException, context: Mapping[str, Any] | None = None) -> ErrorRecord:
        """Append an error; the context's ``step`` is the step it belongs to."""
        record = ErrorRecord.of(error, self._rank, context or {})
        line = f"{record.to_line()}\n".encode()
        size = self._path.stat().st_size if self._path.exists() else 0
        if size and size + len(line) > self._half:
            self._path.replace(self._path.with_suffix(".old.jsonl"))
        with self._path.open("ab") as file:
            file.write(line)
        return record

    def analyze_error_patterns(self) -> ErrorPatterns:
        """Count the errors of all ranks by cause, rank and step."""
        return find_patterns(self._read())

    def generate_error_report(self) -> ReportFiles:
        """Write errors.md and errors.html to the folder."""
        patterns = self.analyze_error_patterns()
        files = ReportFiles(self._folder / "errors.md", self._folder / "errors.html")
        _replace(files.markdown, to_markdown(patterns))
        _replace(files.html, to_html(patterns))
        return files

    def _read(self) -> Iterator[ErrorRecord]:
        for path in sorted(self._folder.glob("errors-rank*.jsonl")):
            with path.open(encoding="utf-8", errors="replace") as file:
                yield from (record for line in file if (record := ErrorRecord.from_line(line)))


def _replace(path: Path, text: str) -> None:
    """All at once: other ranks may write the same report."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
