"""Cache of GGUF files that have been converted: one safetensors file each, in Hugging Face layout and float32.

Linear layers that are 4-bit in the file are kept in this form too.

An entry carries the model's JSON documents in its header's metadata, so that it is complete in itself. It is valid
while its header is intact, its length is right, and its source has the size and time of change it was made from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from apt_core.checkpoint.cache_file import (
    Header,
    StoredTensor,
    header_bytes,
    identity,
    read_header,
    replacing,
)
from apt_core.checkpoint.gguf_tensors import HFTensor
from apt_core.checkpoint.safetensors_reader import WeightFile
from apt_core.errors import CheckpointError
from apt_kernels.cache import cache_folder

_FORMAT = "2"
"""Raised whenever the conversion would give other contents."""
_DTYPES = {"|u1": "U8", "<f2": "F16"}
"""safetensors' names of numpy's types."""


@dataclass(frozen=True)
class CacheEntry:
    """A converted file."""

    weights: WeightFile
    """Every tensor in float32."""
    q4_parts: WeightFile | None
    """Those that the file has in 4 bits, as it has them."""
    documents: dict[str, str]
    """Texts of config.json and the like by name."""


def entry_path(source: Path) -> Path:
    """Where a GGUF's entry lies: one per path and format, so that a changed source replaces its own entry."""
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]
    return cache_folder() / "gguf" / f"{source.stem}-{place}.v{_FORMAT}.safetensors"


def read_entry(source: Path) -> CacheEntry | None:
    """The entry of a GGUF, or None where there is none, or a stale or damaged one."""
    path = entry_path(source)
    try:
        with path.open("rb") as file:
            header = read_header(file)
        if header.metadata.pop("source") != identity(source):
            return None
    except (OSError, ValueError, LookupError):
        return None
    return _entry(path, header.tensors, header.metadata)


def write_entry(source: Path, documents: dict[str, str], tensors: Iterable[HFTensor]) -> CacheEntry:
    """Convert tensors one by one into the entry of a GGUF. Concurrent writers each replace the other's equal file.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    path = entry_path(source)
    tensors = list(tensors)
    q4_parts = {name: values for tensor in tensors for name, values in tensor.q4_parts().items()}
    stored = {tensor.name: StoredTensor("F32", tensor.shape) for tensor in tensors}
    stored |= {name: StoredTensor(_DTYPES[values.dtype.str], values.shape) for name, values in q4_parts.items()}
    try:
        with replacing(path) as file:
            file.write(header_bytes(Header({**documents, "source": identity(source)}, stored)))
            for tensor in tensors:
                file.write(tensor.values().astype("<f4", copy=False).data)
            for values in q4_parts.values():
                file.write(values.data)
    except OSError as error:
        raise CheckpointError(
            f"the converted weights cannot be written ({error.strerror or error}); $APT_CACHE names another folder",
            file=path,
        ) from None
    return _entry(path, stored, documents)


def _entry(path: Path, tensors: dict[str, StoredTensor], documents: dict[str, str]) -> CacheEntry:
    floats = tuple(name for name, tensor in tensors.items() if tensor.dtype == "F32")
    parts = tuple(name for name in tensors if name not in set(floats))
    return CacheEntry(WeightFile(path, floats), WeightFile(path, parts) if parts else None, documents)
