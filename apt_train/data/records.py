"""Records of one file, read from any place on without the whole file in memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from apt_core.errors import ConfigError
from apt_train.data.config import DataConfig

MAX_TEXT_BYTES = 1 << 20
"""A text document longer than this is cut."""
MAX_LINE_BYTES = 64 << 20
"""A longer line of JSONL is refused rather than read into memory."""
_ROWS = 256

Format = Literal["text", "jsonl", "parquet"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of documents."""

    path: Path
    format: Format
    num_bytes: int
    """On disk, when the run began."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a file holds in one place, not yet understood."""

    file: SourceFile
    begin: int
    """Place in the file: a byte of what it decompresses to, or a row of Parquet."""
    end: int
    """Where the next record begins."""
    data: Any
    """Bytes of text or of a JSON line; the Arrow scalar of a Parquet column."""
    num_bytes: int

    @property
    def place(self) -> str:
        """File and line, for errors; found by reading the file up to there."""
        if self.file.format == "parquet":
            return f"{self.file.path}: row {self.begin}"
        with _open(self.file.path) as file:
            line, left = 1, self.begin
            while left and (chunk := file.read(min(left, MAX_TEXT_BYTES))):
                line, left = line + chunk.count(b"\n"), left - len(chunk)
        return f"{self.file.path}:{line}"


def read_records(file: SourceFile, begin: int, config: DataConfig) -> Iterator[Record]:
    """The records of a file from a place on, which is 0 or the end of another record.

    Raises:
        ConfigError: the file is gone, has changed since it was found, or is damaged.
        OSError: of the disk or the network; the same place may be readable in a while.
    """
    try:
        if file.path.stat().st_size != file.num_bytes:
            raise ConfigError(f"{file.path} has changed since the run began", field="data.paths")
        match file.format:
            case "text":
                yield from _read_text(file, begin, config)
            case "jsonl":
                yield from _read_lines(file, begin)
            case "parquet":
                yield from _read_parquet(file, begin, config.column)
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(f"{file.path} cannot be read any more: {error.strerror}", field="data.paths") from None
    except ConfigError:
        raise
    except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
        # What decompressors and pyarrow say of bytes has no number, unlike what the system says of a disk.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ConfigError(f"{file.path} is damaged: {error}", field="data.paths") from None


def _open_plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open_zstd(path: Path) -> IO[bytes]:
    try:
        from pyarrow import input_stream
    except ImportError:
        raise ConfigError(f"{path} needs pyarrow: pip install 'apt-llm[train]'", field="data.paths") from None
    return io.BufferedReader(input_stream(str(path), compression="zstd"))


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
"""How files with these endings are opened."""


def _open(path: Path, begin: int = 0) -> IO[bytes]:
    """The file's bytes, decompressed, from a place on; in a compressed file all before it is read."""
    stream: IO[bytes] = COMPRESSIONS.get(path.suffix.lower(), _open_plain)(path)
    if stream.seekable():
        stream.seek(begin)
    else:
        while begin and (skipped := stream.read(min(begin, MAX_TEXT_BYTES))):
            begin -= len(skipped)
    return stream


def _read_text(file: SourceFile, begin: int, config: DataConfig) -> Iterator[Record]:
    piece, rest = bytearray(), b""
    with _open(file.path, begin) as stream:
        while line := rest + stream.readline(MAX_TEXT_BYTES - len(rest)):
            rest = b""
            is_blank = config.text_documents == "paragraph" and not line.strip()
            piece += line
            if is_blank or len(piece) >= MAX_TEXT_BYTES:
                cut = _whole_characters(piece) if config.encoding == "utf-8" else len(piece)
                # What is cut off begins the next line, just as when reading begins here.
                rest = bytes(piece[cut:])
                if piece[:cut].strip():
                    yield Record(file, begin, begin + cut, bytes(piece[:cut]), cut)
                begin += cut
                piece.clear()
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
    with _open(file.path, begin) as stream:
        while line := stream.readline(MAX_LINE_BYTES):
            end = begin + len(line)
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while not line.endswith(b"\n") and (line := stream.readline(MAX_TEXT_BYTES)):
                    end += len(line)
                yield Record(file, begin, end, b"", 0)
            elif line.strip():
                yield Record(file, begin, end, line, len(line))
            begin = end


def _open_parquet(file: SourceFile) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'apt-llm[train]'", field="data.format") from None
    return ParquetFile(file.path)


def parquet_columns(file: SourceFile) -> list[str]:
    """Names of a Parquet file's columns.

    Raises:
        ConfigError: it is no Parquet file.
    """
    try:
        with _open_parquet(file) as parquet:
            return list(parquet.schema_arrow.names)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file.path} is no Parquet file: {error}", field="data.paths") from None


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
                values = batch.column(0)
                # The same for all rows of a batch, so that it does not depend on where reading began.
                num_bytes = values.nbytes // max(len(values), 1)
                for index in range(max(begin - row, 0), len(values)):
                    yield Record(file, row + index, row + index + 1, values[index], num_bytes)
                row += batch.num_rows
