"""Layers that join the parts of a model on several ranks; one rank alone has none of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from apt_core.parallel import Communicator


class SummedLinear(nn.Module):
    """A linear layer of whose inputs each rank has some: the outputs are sums over the ranks."""

    def __init__(self, linear: nn.Module, communicator: Communicator) -> None:
        super().__init__()
        self.linear = linear
        self._communicator = communicator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's inputs [T, in] -> [T, out], the same on all ranks."""
        return self._communicator.all_reduce(self.linear(x))


class GatheredLinear(nn.Module):
    """A linear layer of whose outputs each rank has some, the last one perhaps fewer: all of them, side by side."""

    def __init__(self, linear: nn.Module, num_outputs: int, communicator: Communicator) -> None:
        super().__init__()
        self.linear = linear
        self._num_outputs = num_outputs
        self._most = -(-num_outputs // communicator.size)
        self._communicator = communicator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[R, in] -> [R, out], the same on all ranks bit for bit."""
        part: torch.Tensor = self.linear(x)
        if part.shape[1] < self._most:
            part = F.pad(part, (0, self._most - part.shape[1]))
        return self._communicator.all_gather(part)[:, : self._num_outputs]


class VocabularyEmbedding(nn.Module):
    """An embedding of whose rows each rank has some, from ``first`` on."""

    def __init__(self, embedding: nn.Embedding, first: int, communicator: Communicator) -> None:
        super().__init__()
        self.weight = embedding.weight
        self._first = first
        self._communicator = communicator

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, C], the same on all ranks bit for bit: one of them adds a row, all others zeros."""
        rows = input_ids - self._first
        is_here = (rows >= 0) & (rows < len(self.weight))
        found = F.embedding(rows.clamp(0, len(self.weight) - 1), self.weight)
        return self._communicator.all_reduce(found.masked_fill(~is_here.unsqueeze(1), 0))
