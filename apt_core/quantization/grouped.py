"""Symmetric codes of 4 bits in groups along the inputs, as compressed-tensors and its readers have them.

Int4Tensor, with a minimum for each group, is finer; this is what other servers load.
"""

from __future__ import annotations

import torch

from apt_core.quantization.stored import GroupedWeight

NUM_BITS = 4
ZERO = 2 ** (NUM_BITS - 1)
"""The code of 0; codes reach from 0 to 15, so values from -8 to 7 times the scale."""
SCALE_DTYPE = torch.bfloat16
"""What scales are stored in. Codes are made for the rounded scale."""


def symmetric_scales(groups: torch.Tensor) -> torch.Tensor:
    """Of weights [..., group size], [...] float32: the largest magnitude lies at 7.5 of 7 or 8 steps."""
    scales: torch.Tensor = groups.abs().amax(-1) / (ZERO - 0.5)
    return scales.to(SCALE_DTYPE).float()


def symmetric_codes(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Nearest codes 0 .. 15 of weights, as floats; scales broadcast. Where a scale is 0, that of 0."""
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
    return (weight * inverse).round_().clamp_(-ZERO, ZERO - 1).add_(ZERO)


def quantize_grouped(weight: torch.Tensor, group_size: int) -> GroupedWeight:
    """A float weight [out, in] by rounding to nearest; group_size must divide in."""
    groups = weight.detach().float().unflatten(1, (-1, group_size))
    scales = symmetric_scales(groups)
    return grouped_weight(symmetric_codes(groups, scales.unsqueeze(2)).flatten(1), scales)


def grouped_weight(codes: torch.Tensor, scales: torch.Tensor) -> GroupedWeight:
    """From codes 0 .. 15 [out, in] of any type and scales [out, groups] that SCALE_DTYPE holds exactly."""
    zeros = torch.full(scales.shape, ZERO, dtype=torch.uint8)
    return GroupedWeight(codes.to(torch.uint8), scales.to(SCALE_DTYPE), zeros, NUM_BITS)
