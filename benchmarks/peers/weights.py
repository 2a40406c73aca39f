"""One model for all engines: what APT serves, written as a Hugging Face folder in bfloat16."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from apt_core.checkpoint import Checkpoint, exported, open_checkpoint
from benchmarks.peers.engine import Weights


def shared_weights(source: str, folder: Path) -> Weights:
    """Open a model; one that came from a GGUF is written to a folder below ``folder``, once.

    Raises:
        CheckpointError: the source cannot be read, or the folder cannot be written.
    """
    checkpoint = open_checkpoint(source)
    path, vocab_size = checkpoint.path.resolve(), checkpoint.config.vocab_size
    if path.is_dir():
        return Weights(_name(checkpoint), source, path, None, vocab_size)
    hf_folder = exported(path, torch.bfloat16, folder)
    return Weights(hf_folder.name, source, hf_folder, path, vocab_size)


def _name(checkpoint: Checkpoint) -> str:
    """Another one for each place, size and time of change."""
    files = [file.path for file in checkpoint.weight_files]
    stats = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return f"{checkpoint.path.stem}-{hashlib.sha256(' '.join(stats).encode()).hexdigest()[:12]}"
