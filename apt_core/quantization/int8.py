"""int8: symmetric, one scale per output."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = 127


@dataclass(frozen=True)
class Int8Tensor:
    """value = scale * int8."""

    values: torch.Tensor
    """[out, in] int8."""
    scales: torch.Tensor
    """[out] float32."""


def quantize_int8(weight: torch.Tensor) -> Int8Tensor:
    """A float weight [out, in], each output's largest magnitude at 127."""
    wide = weight.detach().float()
    scales = wide.abs().amax(1) / LARGEST
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
    values = (wide * inverse.unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Int8Tensor(values, scales)
