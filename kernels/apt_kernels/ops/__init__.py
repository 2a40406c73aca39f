"""The public ops: check arguments, then choose a backend by device, dtype and need of gradients.

On a processor the C++ ops serve float32 and bfloat16 wherever no gradient is wanted. On a GPU the Triton kernels serve,
with gradients where training needs them. Everything else is made of torch ops, which autograd and the compiler see
through.
"""

from __future__ import annotations

import torch

from apt_kernels.cpu import native
from apt_kernels.cpu.decoder import DecoderLayers, LayerWeights, Projection, can_run_layers, has_product
from apt_kernels.cpu.linear import (
    PACKED_LAYOUT_VERSION,
    PORTABLE_FORMATS,
    QUANTIZED_FORMATS,
    PackedWeight,
    can_pack,
)
from apt_kernels.ops.activation import gated_silu, silu_and_mul
from apt_kernels.ops.attention import paged_attention, varlen_attention
from apt_kernels.ops.backends import TRITON_DTYPES
from apt_kernels.ops.cross_entropy import linear_cross_entropy
from apt_kernels.ops.kv_cache import rope_and_store_kv, store_kv
from apt_kernels.ops.norm import fused_add_rms_norm, rms_norm
from apt_kernels.ops.packed import (
    FLOAT8_BLOCK_IN,
    pack_float8_weight,
    pack_int4_weight,
    pack_int8_weight,
    pack_linear_weight,
    packed_linear,
)
from apt_kernels.ops.sampling import argmax, sample, top_logprobs
from apt_kernels.reference import apply_rope

__all__ = [
    "FLOAT8_BLOCK_IN",
    "PACKED_LAYOUT_VERSION",
    "PORTABLE_FORMATS",
    "QUANTIZED_FORMATS",
    "TRITON_DTYPES",
    "DecoderLayers",
    "LayerWeights",
    "PackedWeight",
    "Projection",
    "apply_rope",
    "argmax",
    "can_pack",
    "can_run_layers",
    "fused_add_rms_norm",
    "gated_silu",
    "has_product",
    "linear_cross_entropy",
    "pack_float8_weight",
    "pack_int4_weight",
    "pack_int8_weight",
    "pack_linear_weight",
    "packed_linear",
    "paged_attention",
    "rms_norm",
    "rope_and_store_kv",
    "sample",
    "set_num_threads",
    "silu_and_mul",
    "store_kv",
    "top_logprobs",
    "varlen_attention",
]


def set_num_threads(count: int) -> None:
    """How many threads an op on a processor uses: torch's and the C++ ops'."""
    torch.set_num_threads(count)
    native.set_num_threads(count)
