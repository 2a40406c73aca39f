"""Errors of several processes as lines of JSON in one folder, bounded in size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_core.error_log.record import ErrorRecord
from apt_core.error_log.report import ErrorPatterns, find_patterns, to_html, to_markdown


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written."""

    markdown: Path
    html: Path


class ErrorLogger:
    """Keeps the errors of one process, and reads those of all.

    Args:
        folder: shared by the processes; each writes files of its own. Made when the first error is kept.
        name: of this process, for its files.
        places: what of the errors' contexts reports count by, such as rank and step.
        max_bytes: of this process's two files together; the older half goes first.
        max_files: of all processes; the oldest go when a process begins one. None: all stay.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        places: Sequence[str],
        *,
        max_bytes: int = 10_000_000,
        max_files: int | None = None,
    ) -> None:
        self._folder, self._places, self._half, self._max_files = folder, tuple(places), max_bytes // 2, max_files
        self._path = folder / f"errors-{name}.jsonl"

    def log_to_file(self, error: BaseException, context: Mapping[str, Any] | None = None) -> ErrorRecord:
        """Keep an exception."""
        record = ErrorRecord.of(error, context or {})
        self.keep(record)
        return record

    def keep(self, record: ErrorRecord) -> None:
        """Append a record.

        Raises:
            OSError: it cannot be written.
        """
        line = f"{record.to_line()}\n".encode()
        size = self._path.stat().st_size if self._path.exists() else None
        if size is None:
            self._make_room()
        elif size and size + len(line) > self._half:
            self._path.replace(self._path.with_suffix(".old.jsonl"))
        with self._path.open("ab") as file:
            file.write(line)

    def analyze_error_patterns(self, since: float = 0.0) -> ErrorPatterns:
        """Count the errors of all processes by cause and place.

        Args:
            since: seconds since 1970; older ones do not count.
        """
        return find_patterns((record for record in self._read() if record.time >= since), self._places)

    def generate_error_report(self) -> ReportFiles:
        """Write errors.md and errors.html to the folder."""
        patterns = self.analyze_error_patterns()
        files = ReportFiles(self._folder / "errors.md", self._folder / "errors.html")
        self._folder.mkdir(parents=True, exist_ok=True)
        _replace(files.markdown, to_markdown(patterns))
        _replace(files.html, to_html(patterns))
        return files

    def _make_room(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._max_files is not None:
            newest_first = sorted(self._files(), key=_modified, reverse=True)
            for path in newest_first[self._max_files - 1 :]:
                path.unlink(missing_ok=True)

    def _read(self) -> Iterator[ErrorRecord]:
        for path in sorted(self._files()):
            with path.open(encoding="utf-8", errors="replace") as file:
                yield from (record for line in file if (record := ErrorRecord.from_line(line)))

    def _files(self) -> list[Path]:
        return list(self._folder.glob("errors-*.jsonl"))


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process was faster
        return 0.0


def _replace(path: Path, text: str) -> None:
    """All at once: other processes may write the same report."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
