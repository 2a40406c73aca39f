"""Cache of GGUF files that have been converted: one safetensors file each, in Hugging Face layout and float32.

An entry carries the model's JSON documents in its header's metadata, so that it is complete in itself and appears by
one atomic rename. It is valid while its header is intact, its length is right, and its source has the size and time of
change it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from apt_core.checkpoint.gguf_tensors import HFTensor
from apt_core.checkpoint.safetensors_reader import WeightFile
from apt_core.errors import CheckpointError

_FORMAT = "1"
"""Raised whenever the conversion would give other contents."""
_NO_DIGEST = "0" * 64
_ABANDONED_AFTER_S = 3600.0


@dataclass(frozen=True)
class CacheEntry:
    """A converted file."""

    weights: WeightFile
    documents: dict[str, str]
    """Texts of config.json and the like by name."""


def cache_folder() -> Path:
    """$APT_CACHE, else apt in $XDG_CACHE_HOME, else ~/.cache/apt."""
    if own := os.environ.get("APT_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "apt"


def entry_path(source: Path) -> Path:
    """Where a GGUF's entry lies: one per path and format, so that a changed source replaces its own entry."""
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]
    return cache_folder() / "gguf" / f"{source.stem}-{place}.v{_FORMAT}.safetensors"


def read_entry(source: Path) -> CacheEntry | None:
    """The entry of a GGUF, or None where there is none, or a stale or damaged one."""
    path = entry_path(source)
    try:
        header = _read_header(path)
        metadata = header.pop("__metadata__")
        if metadata.pop("source") != _identity(source):
            return None
        end = max(tensor["data_offsets"][1] for tensor in header.values())
        if path.stat().st_size != _data_start(path) + end:
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    metadata.pop("digest")
    return CacheEntry(WeightFile(path, tuple(header)), metadata)


def write_entry(source: Path, documents: dict[str, str], tensors: Iterable[HFTensor]) -> CacheEntry:
    """Convert tensors one by one into the entry of a GGUF. Concurrent writers each replace the other's equal file.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    path = entry_path(source)
    tensors = list(tensors)
    metadata = {**documents, "source": _identity(source)}
    try:
        with _replacing(path) as file:
            file.write(_header(metadata, tensors))
            for tensor in tensors:
                file.write(tensor.values().astype("<f4", copy=False).data)
    except OSError as error:
        raise CheckpointError(
            f"the converted weights cannot be written ({error.strerror or error}); $APT_CACHE names another folder",
            file=path,
        ) from None
    return CacheEntry(WeightFile(path, tuple(tensor.name for tensor in tensors)), documents)


def _identity(source: Path) -> str:
    stat = source.stat()
    return f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _header(metadata: dict[str, str], tensors: list[HFTensor]) -> bytes:
    """Length and header of a safetensors file (huggingface/safetensors README, format)."""
    entries: dict[str, Any] = {"__metadata__": {"digest": _NO_DIGEST, **metadata}}
    offset = 0
    for tensor in tensors:
        size = 4 * _product(tensor.shape)
        entries[tensor.name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    text = text.replace(_NO_DIGEST.encode(), hashlib.sha256(text).hexdigest().encode(), 1)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path) -> dict[str, Any]:
    """The header as written by ``_header``; ValueError if a byte of it has changed."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("truncated")
        text = file.read(size)
    header = json.loads(text)
    digest = header["__metadata__"]["digest"]
    if hashlib.sha256(text.replace(digest.encode(), _NO_DIGEST.encode(), 1)).hexdigest() != digest:
        raise ValueError("damaged")
    return dict(header)


def _data_start(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes ``path``'s place when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_abandoned(path: Path) -> None:
    """What a killed conversion has left behind; a running one writes all the time."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER_S:
            leftover.unlink(missing_ok=True)


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
