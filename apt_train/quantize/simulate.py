"""What a server computes from quantized weights, in float32 or float64: the specification that its kernels round."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from apt_core.layers.linear import QuantizedLinear
from apt_core.quantization import Float8Weight, Int8Tensor, StoredWeight
from apt_core.quantization.float8 import LARGEST as LARGEST_FLOAT8
from apt_core.quantization.int8 import LARGEST as LARGEST_INT8


def rounded_inputs(x: torch.Tensor, weight: StoredWeight) -> torch.Tensor:
    """x [T, in] as a layer with this weight sees it, in float32; in float64 if x is."""
    x = x if x.dtype == torch.float64 else x.float()
    if isinstance(weight, Float8Weight):
        scales = _scales(x, LARGEST_FLOAT8)
        return (x / scales).to(torch.float8_e4m3fn).to(x.dtype) * scales
    if isinstance(weight, Int8Tensor) and weight.has_int8_inputs:
        scales = (
            _scales(x, LARGEST_INT8) if weight.input_scale is None else torch.tensor(weight.input_scale, dtype=x.dtype)
        )
        return (x / scales).round().clamp(-LARGEST_INT8 - 1, LARGEST_INT8) * scales
    return x


def _scales(x: torch.Tensor, largest: float) -> torch.Tensor:
    """[T, 1], one scale a token; of a token of zeros, any."""
    scales = x.abs().amax(1, keepdim=True) / largest
    return torch.where(scales == 0, torch.ones_like(scales), scales)


class SimulatedLinear(nn.Module):
    """A linear layer with a dequantized weight and rounded inputs."""

    weight: torch.Tensor

    def __init__(self, stored: StoredWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.stored = stored
        self.register_buffer("weight", stored.dequantize(), persistent=False)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        return F.linear(rounded_inputs(x, self.stored), self.weight, self.bias)


def simulate(model: nn.Module) -> None:
    """Replace every QuantizedLinear, not yet fused, of a loaded model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                (stored,) = child.parts
                assert not isinstance(stored, torch.Tensor)
                setattr(parent, name, SimulatedLinear(stored, child.bias))
