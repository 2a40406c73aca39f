"""SmoothQuant (arXiv 2211.10438): what is hard to round in activations is moved into weights, where it is easy."""

from __future__ import annotations

import torch
from torch import nn

from apt_core.layers.norm import RMSNorm
from apt_core.models.channels import Junction
from apt_core.quantization import StoredWeight
from apt_train.quantize.rounding import Rounder
from apt_train.quantize.simulate import rounded_inputs
from apt_train.quantize.statistics import InputStatistics

STRENGTHS = (0.3, 0.5, 0.65, 0.8, 0.9)
"""Parts of an input's range that are moved, of which the one with the least error is taken, if any lessens it."""
SMALLEST = 1e-5
"""Ranges below it count as it: an input that is always 0 has no range to move."""


@torch.no_grad()
def smooth(junction: Junction, statistics: InputStatistics, rounder: Rounder, dtype: torch.dtype) -> float:
    """Scale the channels of a junction and of its statistics in place, if that lessens the error of the outputs.

    Args:
        rounder: of the readers' weights.
        dtype: in which a norm's weight is stored: factors are such that it needs no rounding.

    Returns:
        The strength that was taken; 0 where none lessens the error.
    """
    best, best_error, best_factors = 0.0, _error(junction, statistics, rounder, None), None
    for strength in STRENGTHS:
        factors = _factors(junction, statistics, strength, dtype)
        if (error := _error(junction, statistics, rounder, factors)) < best_error:
            best, best_error, best_factors = strength, error, factors
    if best_factors is not None:
        junction.scale(best_factors)
        statistics.divide(junction.per_input(best_factors))
    return best


def _factors(junction: Junction, statistics: InputStatistics, strength: float, dtype: torch.dtype) -> torch.Tensor:
    """[channels], what the inputs are divided by: their range to the strength over that of the weights to the rest."""
    weights = torch.stack([reader.weight.abs().amax(0) for reader in junction.readers.values()]).amax(0)
    inputs, weights = (junction.largest(x).clamp_min(SMALLEST) for x in (statistics.largest, weights))
    factors = inputs.pow(strength) / weights.pow(1 - strength)
    factors = factors / (factors.amax() * factors.amin()).sqrt()
    if not isinstance(junction.maker, RMSNorm):
        return factors
    norm = junction.maker.weight
    stored = (norm / factors).to(dtype).float()
    return torch.where((stored == 0) | (norm == 0), torch.ones_like(norm), norm / stored)


def _error(junction: Junction, statistics: InputStatistics, rounder: Rounder, factors: torch.Tensor | None) -> float:
    """Sum over the readers of their squared ``output_error``."""
    samples, scale, largest = statistics.samples, torch.ones(()), statistics.largest
    if factors is not None:
        scale = junction.per_input(factors)
    error = 0.0
    for reader in junction.readers.values():
        stored = rounder.round(reader.weight * scale, largest / scale)
        error += output_error(samples / scale, stored, samples, reader) ** 2
    return error


def output_error(x: torch.Tensor, stored: StoredWeight, exact_x: torch.Tensor, reader: nn.Linear) -> float:
    """Of a layer's outputs without bias: what a server makes of inputs x [T, in], against the reader's own.

    Root mean square over the tokens of the error relative to the token's output: some first tokens have activations
    hundreds of times as large as all others, which must not decide alone.
    """
    exact = exact_x @ reader.weight.T
    found = rounded_inputs(x, stored) @ stored.dequantize().T
    norms = exact.norm(dim=1)
    relative = ((found - exact).norm(dim=1) / norms)[norms > 0]
    return relative.square().mean().sqrt().item() if len(relative) else 0.0
