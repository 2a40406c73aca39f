"""One stage of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from apt_core.metadata import AttentionMetadata
from apt_train.loss import Batch, ModelWithLoss, head_loss


@dataclass(frozen=True, slots=True)
class StackedBatches:
    """M micro-batches of equal length."""

    input_ids: torch.Tensor
    """[M, T] int64."""
    labels: torch.Tensor
    """[M, T] int64."""
    positions: torch.Tensor
    """[M, T] int64."""
    cu_seqlens: torch.Tensor
    """[M, S+1] int32; unused places repeat T."""

    @staticmethod
    def of(batches: Sequence[Batch]) -> StackedBatches:
        """All of them must have the same T."""
        num_tokens = len(batches[0].input_ids)
        bounds = [batch.metadata().cu_seqlens_q for batch in batches]
        most = max(len(each) for each in bounds)
        return StackedBatches(
            torch.stack([batch.input_ids for batch in batches]),
            torch.stack([batch.labels for batch in batches]),
            torch.stack([batch.positions for batch in batches]),
            torch.stack([F.pad(each, (0, most - len(each)), value=num_tokens) for each in bounds]),
        )


class Stage(nn.Module):
    """Some consecutive layers, after the embedding in the first stage, before norm, head and loss in the last.

    Between stages one tensor travels, the sum of output and residual: a layer that begins without a residual makes of
    it the same two that it would have got.

    Args:
        whole: whose modules these are.
        layers: indices of the layers.
    """

    def __init__(self, whole: ModelWithLoss, layers: range, index: int, num_stages: int) -> None:
        super().__init__()
        decoder = whole.model.model
        self.index, self.is_last = index, index == num_stages - 1
        self.layers = nn.ModuleList()
        for layer in layers:
            self.layers.add_module(str(layer), decoder.layers[layer])
        self.embed_tokens = decoder.embed_tokens if index == 0 else None
        self.norm = decoder.norm if self.is_last else None
        self.head = whole.head if self.is_last else None
        self._rotary = decoder.rotary
        self._head_loss = whole.head_loss

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        labels: torch.Tensor,
        autocast: torch.dtype | None,
        with_accuracy: bool,
    ) -> torch.Tensor:
        """One micro-batch, its tensors as in `StackedBatches` with M = 1.

        Returns:
            Hidden states [T, C], or [T/n, C] with tensor parallelism; of the last stage (loss, likeliest labels) [2].
        """
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            hidden = self._hidden(x, positions[0], cu_seqlens[0])
            if self.norm is None:
                return hidden
            assert self.head is not None
            found = head_loss(self._head_loss, self.head, hidden, labels[0], with_accuracy)
            return torch.stack([value.to(found[0].dtype) for value in found])

    def _hidden(self, x: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x[0])
        num_tokens = len(positions)  # x may have fewer: those of this process
        metadata = AttentionMetadata(cu_seqlens, cu_seqlens.diff(), num_tokens, num_tokens)
        rotary = self._rotary(positions, x.dtype)
        residual: torch.Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, rotary, metadata, None)
        assert residual is not None  # a stage has a layer
        return x + residual if self.norm is None else self.norm.add(x, residual)[0]
