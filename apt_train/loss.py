"""A model with its loss as one module, so that hooks of data parallelism see every weight a step uses."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from apt_core.metadata import AttentionMetadata
from apt_core.models.decoder import DecoderForCausalLM
from apt_kernels import ops

ROWS = 256
"""Tokens whose logits exist at once where accuracy is counted."""


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


class HeadLoss(Protocol):
    """The loss of a head over its vocabulary."""

    def __call__(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, with_accuracy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of hidden [T, C] and the head's weight [V, C]; returns as `ModelWithLoss.forward`."""


class ModelWithLoss(nn.Module):
    """Embedding, layers, head and cross-entropy in one forward pass; logits never exist as a whole."""

    def __init__(self, model: DecoderForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.head_loss: HeadLoss = whole_head_loss
        """Tensor parallelism puts its own here."""
        self.keeps_whole_gradients = True
        """Whether data parallelism sums gradients once a step, not after each micro-batch."""

    def forward(self, batch: Batch, with_accuracy: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(Sum of the losses of the tokens that count [], how many of these were the likeliest []).

        Args:
            with_accuracy: costs one more product with the head; without it the second is 0.
        """
        x = self.model.embed(batch.input_ids)
        hidden = self.model(x, batch.positions, batch.metadata())
        return head_loss(self.head_loss, self.head, hidden, batch.labels, with_accuracy)

    @property
    def head(self) -> nn.Module:
        """What has the head's weight."""
        return self.model.lm_head if self.model.lm_head is not None else self.model.model.embed_tokens


def head_loss(
    compute: HeadLoss, head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, with_accuracy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `ModelWithLoss.forward` returns, of final hidden states [T, C]; with autocast in its precision."""
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return compute(hidden, head.get_parameter("weight"), labels, with_accuracy)


def whole_head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, with_accuracy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `HeadLoss` where the weight is whole."""
    losses, _ = ops.linear_cross_entropy(hidden, weight, labels)
    return losses, num_right(hidden, weight.to(hidden.dtype), labels) if with_accuracy else labels.new_zeros(())


@torch.no_grad()
def num_right(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many labels have the largest logit [], of hidden [T, C] and the head's weight [V, C], some rows at a time."""
    right = labels.new_zeros(())
    for rows, expected in zip(hidden.split(ROWS), labels.split(ROWS), strict=True):
        right += ((rows @ weight.T).argmax(-1) == expected).sum()
    return right
