"""SmoothQuant (arXiv 2211.10438): what is hard to round in activations is moved into weights, where it is easy."""

from __future__ import annotations

import torch

from apt_core.layers.norm import RMSNorm
from apt_core.models.channels import Junction
from apt_core.quantization import StoredWeight
from apt_train.quantize.rounding import Rounder
from apt_train.quantize.simulate import rounded_inputs
from apt_train.quantize.statistics import InputStatistics

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Parts of an input's range that are moved, of which the one with the least error is taken, if any lessens it."""
SMALLEST = 1e-5
"""Ranges below this part of the largest count as it: an input that is always 0 has no range to move."""


@torch.no_grad()
def smooth(junction: Junction, statistics: InputStatistics, rounder: Rounder, dtype: torch.dtype) -> float:
    """Scale the channels of a junction and of its statistics in place, if that lessens the error of the outputs.

    Args:
        rounder: of the readers' weights.
        dtype: in which a norm's weight is stored: factors are such that it needs no rounding.

    Returns:
        The strength that was taken; 0 where none lessens the error.
    """
    weight = torch.cat([reader.weight for reader in junction.readers.values()])
    # A token with a scale of its own is judged by itself; one scale for all must reach the largest of them.
    inputs = statistics.largest if rounder.scheme == "w8a8-static" else statistics.typical
    exact = statistics.samples @ weight.T
    best, best_factors = 0.0, torch.ones(junction.num_channels)
    best_error = _error(junction, weight, statistics, rounder, best_factors, exact)
    for strength in STRENGTHS:
        factors = _factors(junction, inputs, weight.norm(dim=0), strength, dtype)
        if (error := _error(junction, weight, statistics, rounder, factors, exact)) < best_error:
            best, best_error, best_factors = strength, error, factors
    if best:
        junction.scale(best_factors)
        statistics.divide(junction.per_input(best_factors))
    return best


def _factors(
    junction: Junction, inputs: torch.Tensor, weights: torch.Tensor, strength: float, dtype: torch.dtype
) -> torch.Tensor:
    """[channels], what inputs are divided by: their size [in] to the strength over that of the weights to the rest."""
    inputs, weights = (junction.largest(x).clamp_min(SMALLEST * (x.amax().item() or 1.0)) for x in (inputs, weights))
    factors = inputs.pow(strength) / weights.pow(1 - strength)
    factors = factors / (factors.amax() * factors.amin()).sqrt()
    if not isinstance(junction.maker, RMSNorm):
        return factors
    norm = junction.maker.weight
    stored = (norm / factors).to(dtype).float()
    return torch.where((stored == 0) | (norm == 0), torch.ones_like(norm), norm / stored)


def _error(
    junction: Junction,
    weight: torch.Tensor,
    statistics: InputStatistics,
    rounder: Rounder,
    factors: torch.Tensor,
    exact: torch.Tensor,
) -> float:
    """Of all readers' outputs, with channels scaled by factors; see ``output_error``."""
    scale = junction.per_input(factors)
    return output_error(statistics.samples / scale, rounder.nearest(weight * scale, statistics.largest / scale), exact)


def output_error(x: torch.Tensor, stored: StoredWeight, exact: torch.Tensor) -> float:
    """Of what a server makes of inputs x [T, in], without bias, against exact outputs [T, out].

    Root mean square over the tokens of the error relative to the token's output: some first tokens have activations
    hundreds of times as large as all others, which must not decide alone.
    """
    found = rounded_inputs(x, stored) @ stored.dequantize().T
    norms = exact.norm(dim=1)
    relative = ((found - exact).norm(dim=1) / norms)[norms > 0]
    return relative.square().mean().sqrt().item() if len(relative) else 0.0
