"""A model with its loss as one module, so that hooks of data parallelism see every weight a step uses."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from apt_core.metadata import AttentionMetadata
from apt_core.models.decoder import DecoderForCausalLM
from apt_kernels import ops


class Batch(Protocol):
    """T packed tokens, as `apt_train.data` makes them."""

    @property
    def input_ids(self) -> torch.Tensor:
        """[T] int64."""

    @property
    def labels(self) -> torch.Tensor:
        """[T] int64: the next token of the same sequence, or -100 where it does not count."""

    @property
    def positions(self) -> torch.Tensor:
        """[T] int64."""

    @property
    def num_scored(self) -> int:
        """Labels that count."""

    def metadata(self) -> AttentionMetadata:
        """Layout of the sequences."""

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""


class ModelWithLoss(nn.Module):
    """Embedding, layers, head and cross-entropy in one forward pass; logits never exist as a whole."""

    def __init__(self, model: DecoderForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(Sum of the losses of the tokens that count [], their number [])."""
        x = self.model.embed(batch.input_ids)
        hidden = self.model(x, batch.positions, batch.metadata())
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        head = self.model.lm_head if self.model.lm_head is not None else self.model.model.embed_tokens
        return ops.linear_cross_entropy(hidden, head.get_parameter("weight"), batch.labels)
