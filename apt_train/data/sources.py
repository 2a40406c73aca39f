"""Files of documents, read one record at a time from any place on."""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apt_core.errors import ConfigError
from apt_train.data.config import DataConfig

MAX_TEXT_BYTES = 1 << 20
"""A text document longer than this is cut."""
MAX_LINE_BYTES = 64 << 20
"""A longer line of JSONL is refused rather than read into memory."""
PACKAGE_PREFIX = "package:"
_ENDINGS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_ROWS = 256

Format = Literal["text", "jsonl", "parquet"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of documents."""

    path: Path
    format: Format
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Record:
    """What a file holds in one place, not yet understood."""

    file: SourceFile
    begin: int
    """Place in the file: a byte, or a row of Parquet."""
    end: int
    """Where the next record begins."""
    data: Any
    """Bytes of text or of a JSON line; the value of a Parquet column."""
    num_bytes: int

    @property
    def place(self) -> str:
        """File and line, for errors; found by reading the file up to there."""
        if self.file.format == "parquet":
            return f"{self.file.path}: row {self.begin}"
        with self.file.path.open("rb") as file:
            line, left = 1, self.begin
            while left and (chunk := file.read(min(left, MAX_TEXT_BYTES))):
                line, left = line + chunk.count(b"\n"), left - len(chunk)
        return f"{self.file.path}:{line}"


def find_files(patterns: tuple[str, ...], config: DataConfig, *, field: str) -> tuple[SourceFile, ...]:
    """The files that patterns name, each once, in the order of their paths.

    Raises:
        ConfigError: a pattern names no file, files are empty, or a Parquet file lacks the column.
    """
    if not patterns:
        raise ConfigError("name at least one file", field=field)
    paths = sorted({path for pattern in patterns for path in _expand(pattern, field)})
    files = tuple(SourceFile(path, _format(path, config), path.stat().st_size) for path in paths)
    if not any(file.num_bytes for file in files):
        raise ConfigError(f"all files are empty: {', '.join(map(str, paths[:3]))}", field=field)
    for file in files:
        if file.format == "parquet":
            _check_column(file, config.column)
    if config.content == "messages" and any(file.format == "text" for file in files):
        raise ConfigError("text files hold no messages; messages need jsonl or parquet", field="data.content")
    return files


def read_records(file: SourceFile, begin: int, config: DataConfig) -> Iterator[Record]:
    """The records of a file from a place on, which is 0 or the end of another record."""
    match file.format:
        case "text":
            return _read_text(file, begin, config)
        case "jsonl":
            return _read_lines(file, begin)
        case "parquet":
            return _read_parquet(file, begin, config.column)


def _expand(pattern: str, field: str) -> list[Path]:
    where = pattern
    if pattern.startswith(PACKAGE_PREFIX):
        package, _, inside = pattern.removeprefix(PACKAGE_PREFIX).partition("/")
        where = str(_package_folder(package, field) / (inside or "**"))
    paths = [Path(name) for name in glob.glob(where, recursive=True)]
    files = [path.resolve() for path in paths if path.is_file()]
    if not files:
        raise ConfigError(f"there is no file {pattern}", field=field)
    return files


def _package_folder(package: str, field: str) -> Path:
    """Where an installed package lies; it is not imported, as its data may be older than its Python."""
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"no package {package!r} is installed", field=field)
    return Path(glob.escape(spec.submodule_search_locations[0]))


def _format(path: Path, config: DataConfig) -> Format:
    return _ENDINGS.get(path.suffix.lower(), "text") if config.format == "auto" else config.format


def _read_text(file: SourceFile, begin: int, config: DataConfig) -> Iterator[Record]:
    piece = bytearray()
    with file.path.open("rb") as stream:
        stream.seek(begin)
        while line := stream.readline(MAX_TEXT_BYTES):
            is_blank = config.text_documents == "paragraph" and not line.strip()
            piece += line
            if is_blank or len(piece) >= MAX_TEXT_BYTES:
                cut = _whole_characters(piece) if config.encoding == "utf-8" else len(piece)
                if piece[:cut].strip():
                    yield Record(file, begin, begin + cut, bytes(piece[:cut]), cut)
                begin, piece = begin + cut, piece[cut:]
        if piece.strip():
            yield Record(file, begin, begin + len(piece), bytes(piece), len(piece))


def _whole_characters(data: bytearray) -> int:
    """How many bytes of UTF-8 to take so that no character is cut in two."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2
            return len(data) - back if length > back else len(data)
        if byte < 0x80:
            break
    return len(data)


def _read_lines(file: SourceFile, begin: int) -> Iterator[Record]:
    with file.path.open("rb") as stream:
        stream.seek(begin)
        while line := stream.readline(MAX_LINE_BYTES):
            end = begin + len(line)
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := stream.readline(MAX_TEXT_BYTES)) and not rest.endswith(b"\n"):
                    pass
                line, end = b"", stream.tell()
                yield Record(file, begin, end, line, 0)
            elif line.strip():
                yield Record(file, begin, end, line, len(line))
            begin = end


def _open_parquet(file: SourceFile) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'apt-llm[train]'", field="data.format") from None
    try:
        return ParquetFile(file.path)
    except ArrowInvalid as error:
        raise ConfigError(f"{file.path} is no Parquet file: {error}", field="data.paths") from None


def _check_column(file: SourceFile, column: str) -> None:
    with _open_parquet(file) as parquet:
        names = parquet.schema_arrow.names
    if column not in names:
        raise ConfigError(f"{file.path} has no column {column!r}; it has {', '.join(names)}", field="data.column")


def _read_parquet(file: SourceFile, begin: int, column: str) -> Iterator[Record]:
    """Row groups before the place are not read."""
    with _open_parquet(file) as parquet:
        row = 0
        for group in range(parquet.metadata.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            if row + num_rows <= begin:
                row += num_rows
                continue
            for batch in parquet.iter_batches(_ROWS, row_groups=[group], columns=[column]):
                first = max(begin - row, 0)
                for index, value in enumerate(batch.column(0)[first:], start=row + first):
                    data = value.as_py()
                    yield Record(file, index, index + 1, data, len(data) if isinstance(data, str) else len(repr(data)))
                row += batch.num_rows
