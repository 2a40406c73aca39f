"""A checkpoint folder in Hugging Face layout, written tensor by tensor; it appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from apt_core.errors import ConfigError

SHARD_BYTES = 2 * 2**30
"""Tensors of one file, about: what a writer holds in memory."""


class FolderWriter:
    """Collects a folder's files; see ``new_folder``."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.num_bytes = 0
        """Of all tensors so far."""
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._is_closed = False

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, or keep it until a file is full."""
        self._waiting[name] = tensor.detach().contiguous()
        self.num_bytes += tensor.nbytes
        if sum(waiting.nbytes for waiting in self._waiting.values()) >= self._shard_bytes:
            self._flush()

    def document(self, name: str, text: str) -> None:
        """Write a file of text."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Write what is kept; several files get an index. To be called earlier only where the weights are read."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._waiting:
            self._flush()
        if len(self._shards) == 1:
            self._path(0).rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._path(index).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index_document = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        self.document("model.safetensors.index.json", json.dumps(index_document, indent=1))

    def _flush(self) -> None:
        path = self._path(len(self._shards))
        path.touch()  # safetensors makes files that their owner alone may read
        mode = path.stat().st_mode
        save_file(self._waiting, path, metadata={"format": "pt"})
        path.chmod(mode)
        self._shards.append(list(self._waiting))
        self._waiting = {}

    def _path(self, index: int) -> Path:
        return self.folder / f"model-{index + 1:05d}.safetensors"


@contextmanager
def new_folder(folder: Path, *, field: str, shard_bytes: int = SHARD_BYTES) -> Iterator[FolderWriter]:
    """A writer of a folder that appears when the block ends well.

    Args:
        folder: must not exist, or be empty.
        field: the setting that names it, for messages.
        shard_bytes: how long a file of weights may get before the next begins.

    Raises:
        ConfigError: the folder holds something, or cannot be written.
    """
    check_new(folder, field=field)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            whole = Path(temporary) / folder.name
            whole.mkdir()
            writer = FolderWriter(whole, shard_bytes)
            yield writer
            writer.close()
            whole.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror or error})", field=field) from None


def check_new(folder: Path, *, field: str) -> None:
    """ConfigError unless there is nothing at a path, or an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something already; name a new folder", field=field)
