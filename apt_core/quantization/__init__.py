"""Weights in fewer bits: what is made of floats at load time, and the forms that quantized checkpoints store.

int8, int4 and float8, one file each, are made by data-free methods, so any checkpoint loads in any precision.
"""

from __future__ import annotations

from apt_core.quantization.float8 import Float8Weight, quantize_float8
from apt_core.quantization.int4 import Int4Tensor, quantize_int4
from apt_core.quantization.int8 import Int8Tensor, quantize_int8
from apt_core.quantization.packing import WeightPrecision, own_precision, pack_weight, pack_weights
from apt_core.quantization.stored import GroupedWeight, StoredWeight, moved

__all__ = [
    "QUANTIZATION_VERSION",
    "Float8Weight",
    "GroupedWeight",
    "Int4Tensor",
    "Int8Tensor",
    "StoredWeight",
    "WeightPrecision",
    "moved",
    "own_precision",
    "pack_weight",
    "pack_weights",
    "quantize_float8",
    "quantize_int4",
    "quantize_int8",
]

QUANTIZATION_VERSION = 1
"""Raised whenever the same weights would get other values in int8 or int4: packed weights are kept on disk."""
