"""Checkpoint: what an engine or a trainer needs to build and fill a model, whatever format it was stored in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from apt_core.checkpoint.formats import WeightFormat
from apt_core.checkpoint.quantized_reader import read_weights
from apt_core.checkpoint.safetensors_reader import WeightFile, read_tensors
from apt_core.model_config import GenerationConfig, ModelConfig
from apt_core.quantization import StoredWeight
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

    weight_format: WeightFormat | None = None
    """How linear layers are stored in fewer bits; None if they are not."""
    tokenizer_digest: str = ""
    """Of the text that the tokenizer was made from."""
    quantized_files: tuple[WeightFile, ...] = ()
    """Of a GGUF, what it has in 4 bits; ``weight_files`` holds the same dequantized."""

    @property
    def is_quantized(self) -> bool:
        """Whether weights are there in fewer bits only: they stay so, unless another precision is asked for."""
        return self.weight_format is not None and not self.quantized_files

    def weights(self) -> Iterator[tuple[str, torch.Tensor | StoredWeight]]:
        """Hugging Face parameter name and its CPU tensor in stored dtype, or its quantized weight, one at a time.

        Tensors are views of memory-mapped files: copy what has to outlive a change of the file.

        Raises:
            CheckpointError: a quantized weight lacks a part or a part does not fit, or a file has been damaged or
                removed since the checkpoint was opened.
        """
        if self.weight_format is None:
            return read_tensors(self.weight_files)
        return read_weights(self.weight_files + self.quantized_files, self.weight_format)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``weights``, with quantized weights dequantized to float32."""
        if not self.is_quantized:
            yield from read_tensors(self.weight_files)
            return
        for name, weight in self.weights():
            yield name, weight if isinstance(weight, torch.Tensor) else weight.dequantize()
