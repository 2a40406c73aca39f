"""Weights in fewer bits: one file a format. Data-free methods only, so any checkpoint loads in any format."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from apt_core.quantization.int4 import quantize_int4
from apt_core.quantization.int8 import quantize_int8
from apt_kernels import ops

__all__ = ["QUANTIZATION_VERSION", "WeightPrecision", "pack_weight", "quantize_int4", "quantize_int8"]

QUANTIZATION_VERSION = 1
"""Raised whenever the same weights would get other values in int8 or int4: packed weights are kept on disk."""
WeightPrecision: TypeAlias = Literal["float32", "bfloat16", "int8", "int4"]


def pack_weight(weight: torch.Tensor, precision: WeightPrecision) -> ops.PackedWeight:
    """A float weight [out, in] packed in a precision.

    Weights whose number of inputs no int4 group divides are packed in int8 instead.
    """
    if precision == "int4" and (int4 := quantize_int4(weight)) is not None:
        return ops.pack_int4_weight(int4.values, int4.scales, int4.minima)
    if precision in ("int8", "int4"):
        int8 = quantize_int8(weight)
        return ops.pack_int8_weight(int8.values, int8.scales)
    return ops.pack_linear_weight(weight.to(getattr(torch, precision)))
