"""Tensors of safetensors files, read one at a time from memory-mapped files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from apt_core.document import read_document
from apt_core.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file and the tensors to take from it."""

    path: Path
    names: tuple[str, ...]


def find_weight_files(folder: Path) -> tuple[WeightFile, ...]:
    """The weight files of a Hugging Face folder, their headers checked.

    Raises:
        CheckpointError: a file is missing or damaged, or lacks a tensor that the index places in it.
    """
    index = folder / _INDEX
    if index.is_file() and not (folder / _SINGLE).is_file():
        return _indexed_files(folder, index)
    path = folder / _SINGLE
    if not path.is_file():
        raise CheckpointError(f"there is neither {_SINGLE} nor {_INDEX}", file=folder)
    return (WeightFile(path, tensor_names(path)),)


def tensor_names(path: Path) -> tuple[str, ...]:
    """Names of all tensors of one file; raises CheckpointError if it is damaged."""
    with open_safetensors(path) as file:
        return tuple(file.keys())


def read_tensors(files: tuple[WeightFile, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and CPU tensor, in stored dtype. A tensor is a view of the mapped file: pages are read as it is copied."""
    for weight_file in files:
        with open_safetensors(weight_file.path) as file:
            for name in weight_file.names:
                yield name, file.get_tensor(name)


class TensorFiles:
    """The tensors of several files by name. Files are opened when first asked for one, and stay open."""

    def __init__(self, files: tuple[WeightFile, ...]) -> None:
        self.paths = {name: file.path for file in files for name in file.names}
        """The file of each tensor."""
        self._folder = files[0].path.parent
        self._opened: dict[Path, Any] = {}

    def get(self, name: str) -> torch.Tensor:
        """A CPU tensor in its stored dtype, a view of the mapped file.

        Raises:
            CheckpointError: the file has been damaged or removed since it was listed.
        """
        path = self.paths[name]
        with _named_faults(path):
            if path not in self._opened:
                self._opened[path] = safe_open(path, framework="pt", device="cpu")
            tensor: torch.Tensor = self._opened[path].get_tensor(name)
            return tensor

    def file_of(self, name: str) -> Path:
        """Where a tensor lies; of a name that is nowhere, the folder."""
        return self.paths.get(name, self._folder)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, whose header has been checked against its length.

    Raises:
        CheckpointError: it is missing, truncated or damaged.
    """
    with _named_faults(path), safe_open(path, framework="pt", device="cpu") as file:
        yield file


@contextmanager
def _named_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"is truncated or damaged ({error})", file=path) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error})", file=path) from None


def _indexed_files(folder: Path, index: Path) -> tuple[WeightFile, ...]:
    weight_map = read_document(index).child("weight_map")
    if weight_map is None or not weight_map.values:
        raise CheckpointError("is missing", file=index, field="weight_map")
    names_of: dict[str, list[str]] = {}
    for name in weight_map.values:
        names_of.setdefault(weight_map.text(name), []).append(name)
    files = tuple(WeightFile(folder / shard, tuple(names)) for shard, names in sorted(names_of.items()))
    for file in files:
        _check_shard(file, index)
    return files


def _check_shard(file: WeightFile, index: Path) -> None:
    field = f"weight_map.{file.names[0]}"
    if file.path.parent != index.parent:
        raise CheckpointError(f"shard {file.path.name!r} lies outside the folder", file=index, field=field)
    if not file.path.is_file():
        raise CheckpointError(f"shard {file.path.name} does not exist", file=index, field=field)
    for name in set(file.names) - set(tensor_names(file.path)):
        raise CheckpointError(f"is missing, though {index.name} places it here", file=file.path, field=name)
