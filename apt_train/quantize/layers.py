"""A checkpoint's decoder layers one at a time, each in float32, and what passes from one to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from apt_core.checkpoint import Checkpoint
from apt_core.checkpoint.safetensors_reader import TensorFiles
from apt_core.errors import CheckpointError
from apt_core.layers.rotary import RotaryEmbedding
from apt_core.metadata import AttentionMetadata
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderLayer


class LayerSource:
    """The weights of an opened checkpoint that is not quantized."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self._files = TensorFiles(checkpoint.weight_files)

    def get(self, name: str) -> torch.Tensor:
        """A copy of a tensor in float32; CheckpointError if there is none."""
        if name not in self._files.paths:
            raise CheckpointError("is missing", file=self._files.file_of(name), field=name)
        return self._files.get(name).to(torch.float32, copy=True)

    def layer(self, index: int) -> DecoderLayer:
        """One of the decoder's layers, not fused."""
        with torch.device("meta"):
            layer = DecoderLayer(self.config, index)
        for name, parameter in list(layer.named_parameters()):
            full_name = f"model.layers.{index}.{name}"
            tensor = self.get(full_name)
            if tensor.shape != parameter.shape:
                problem = f"has shape {list(tensor.shape)}, expected {list(parameter.shape)}"
                raise CheckpointError(problem, file=self._files.file_of(full_name), field=full_name)
            owner, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
        return layer.eval()


@dataclass
class Hidden:
    """What enters the next layer, of one window."""

    x: torch.Tensor
    """[T, C]."""
    residual: torch.Tensor | None = None
    """[T, C], not yet added; None before the first layer."""


class Stream:
    """Windows on their way through the layers, each computed by itself: attention needs memory for one only."""

    def __init__(self, config: ModelConfig, embedding: torch.Tensor, windows: list[torch.Tensor]) -> None:
        """Windows of token ids, all of one length."""
        self.hidden = [Hidden(embedding[ids]) for ids in windows]
        length = len(windows[0])
        self._rotary = RotaryEmbedding(config.rope, config.head_dim)(torch.arange(length), torch.float32)
        self._metadata = AttentionMetadata.for_full_sequences([length])

    @torch.inference_mode()
    def look(self, layer: DecoderLayer) -> None:
        """Compute a layer for whoever has hooks in it."""
        for hidden in self.hidden:
            self._through(layer, hidden)

    @torch.inference_mode()
    def advance(self, layer: DecoderLayer) -> None:
        """Pass through a layer."""
        self.hidden = [self._through(layer, hidden) for hidden in self.hidden]

    def _through(self, layer: DecoderLayer, hidden: Hidden) -> Hidden:
        # The residual is added in place by some backends.
        residual = None if hidden.residual is None else hidden.residual.clone()
        return Hidden(*layer(hidden.x.clone(), residual, self._rotary, self._metadata, None))
