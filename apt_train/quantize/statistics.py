"""What calibration remembers of the inputs of linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from apt_core.models.channels import Junction

NUM_SAMPLES = 512
"""Tokens whose inputs are kept, to measure errors of outputs on."""


class InputStatistics:
    """Of one input [T, in], over all windows.

    Tokens count alike, whatever their size: the first tokens of a text can be hundreds of times as large as all others.
    """

    def __init__(self, num_inputs: int, num_windows: int, *, has_hessian: bool) -> None:
        self.largest = torch.zeros(num_inputs)
        """[in] largest magnitudes."""
        self.hessian = torch.zeros(num_inputs, num_inputs) if has_hessian else None
        """[in, in], the sum of x x^T over tokens divided by their norms."""
        self._squares = torch.zeros(num_inputs)
        self._samples: list[torch.Tensor] = []
        self._per_window = -(-NUM_SAMPLES // num_windows)

    @property
    def typical(self) -> torch.Tensor:
        """[in] root mean square of tokens divided by their norms, times a constant."""
        return self._squares.sqrt()

    @property
    def samples(self) -> torch.Tensor:
        """[NUM_SAMPLES or so, in], evenly spread, with the first token of each window, whose activations stand out."""
        return torch.cat(self._samples)

    def add(self, x: torch.Tensor) -> None:
        """Take the inputs [T, in] of one window in."""
        x = x.detach().float()
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        step = max(1, len(x) // self._per_window)
        self._samples.append(x[::step][: self._per_window].clone())
        relative = F.normalize(x, dim=1)
        self._squares += relative.square().sum(0)
        if self.hessian is not None:
            self.hessian.addmm_(relative.T, relative)

    def divide(self, factors: torch.Tensor) -> None:
        """Make them those of inputs divided by factors [in]; tokens keep their weights."""
        self.largest = self.largest / factors
        self._squares = self._squares / factors.square()
        self._samples = [samples / factors for samples in self._samples]
        if self.hessian is not None:
            self.hessian = self.hessian / (factors.unsqueeze(0) * factors.unsqueeze(1))


@contextmanager
def recorded(junctions: list[Junction], num_windows: int, *, has_hessian: bool) -> Iterator[list[InputStatistics]]:
    """Statistics of each junction's input, filled by whatever its readers compute within the block."""
    statistics, hooks = [], []
    for junction in junctions:
        first = next(iter(junction.readers.values()))
        statistics.append(InputStatistics(first.in_features, num_windows, has_hessian=has_hessian))
        hooks.append(first.register_forward_pre_hook(_adding_to(statistics[-1])))
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()


def _adding_to(statistics: InputStatistics) -> Any:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        statistics.add(args[0])

    return hook
