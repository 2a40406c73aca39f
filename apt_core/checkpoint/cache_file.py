"""Files of the user's cache: safetensors with a sealed header, each of which appears by one atomic rename.

The header carries a digest of itself and, as metadata, texts of the kind of file that it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_NO_DIGEST = "0" * 64
_ABANDONED_AFTER_S = 3600.0
_ITEM_SIZES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header describes it."""

    dtype: str
    """As safetensors spells it: F32, BF16, F16 or U8."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """How long it is."""
        return _ITEM_SIZES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says it holds."""

    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]
    """In the order in which they lie in the file, one right after the other."""

    @property
    def num_bytes(self) -> int:
        """Length of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def identity(source: Path) -> str:
    """Which version of a file this is: its path, size and time of change."""
    stat = source.stat()
    return f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def header_bytes(header: Header) -> bytes:
    """Length and header of a safetensors file (huggingface/safetensors README, format); the tensors follow."""
    entries: dict[str, object] = {"__metadata__": {"digest": _NO_DIGEST, **header.metadata}}
    offset = 0
    for name, tensor in header.tensors.items():
        end = offset + tensor.num_bytes
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    text = text.replace(_NO_DIGEST.encode(), hashlib.sha256(text).hexdigest().encode(), 1)
    return len(text).to_bytes(8, "little") + text


def read_header(file: BinaryIO) -> Header:
    """The header that ``header_bytes`` made; the file is then at the first tensor's first byte.

    Raises:
        ValueError: a byte of it has changed, the file is not of the length it says, or is none of ours.
        OSError: the file cannot be read.
    """
    file_size = os.fstat(file.fileno()).st_size
    size = int.from_bytes(file.read(8), "little")
    if size > file_size:
        raise ValueError("its header is cut off")
    text = file.read(size)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__")
        digest = metadata.pop("digest")
        tensors = {name: StoredTensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        header = Header(metadata, tensors)
        end = 8 + size + header.num_bytes
        seal = hashlib.sha256(text.replace(digest.encode(), _NO_DIGEST.encode(), 1)).hexdigest()
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError("it has no header of ours") from None
    if seal != digest:
        raise ValueError("its header has changed")
    if file_size != end:
        raise ValueError(f"it has {file_size} bytes, not {end}")
    return header


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
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
    """What a killed process has left behind; a running one writes all the time."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER_S:
            leftover.unlink(missing_ok=True)
