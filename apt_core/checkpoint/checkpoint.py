"""Checkpoint: what an engine or a trainer needs to build and fill a model, whatever format it was stored in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from apt_core.checkpoint.safetensors_reader import WeightFile, read_tensors
from apt_core.model_config import GenerationConfig, ModelConfig
from apt_core.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Its weights stay on disk until ``tensors`` is iterated."""

    path: Path
    """The folder or file it was read from."""
    config: ModelConfig
    generation: GenerationConfig
    tokenizer: Tokenizer
    weight_files: tuple[WeightFile, ...]
    """Hugging Face layout; for a GGUF, its dequantized copy in the cache."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face parameter name and CPU tensor in its stored dtype, one at a time.

        The tensors are views of memory-mapped files: copy what has to outlive a change of the file.

        Raises:
            CheckpointError: a file has been damaged or removed since the checkpoint was opened.
        """
        return read_tensors(self.weight_files)
