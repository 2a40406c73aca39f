"""Products with packed weights, of any precision."""

from __future__ import annotations

import torch

from apt_kernels.cpu import linear as cpu_linear
from apt_kernels.cpu.linear import PackedWeight
from apt_kernels.ops import backends
from apt_kernels.ops.backends import require

# Triton is for NVIDIA's GPUs here: a torch without CUDA does not import it.
if torch.version.cuda is not None:
    from apt_kernels.triton import packed as triton_packed

INT4_GROUP_SIZES = (32, 64, 128)
MAX_INT8_IN = 2**17
"""Products of two int8 are at most 127 * 128: so many fit into an int32."""
FLOAT8_BLOCK_IN = 128
"""Inputs that a product with float8 weights sums before it applies a block's scale."""


def pack_linear_weight(weight: torch.Tensor) -> PackedWeight:
    """A weight [out, in] in its own precision, in the layout that `packed_linear` multiplies with."""
    require(weight.dim() == 2, "weight", f"must be [out, in], got {tuple(weight.shape)}")
    return cpu_linear.PlainWeight(weight) if backends.is_on_gpu(weight) else cpu_linear.pack(weight)


def pack_int8_weight(
    weight: torch.Tensor,
    scales: torch.Tensor,
    *,
    has_int8_inputs: bool = False,
    input_scale: float | None = None,
) -> PackedWeight:
    """int8 [out, in] with float32 scales [out], packed.

    On a processor inputs become int8 in any case, in small groups: see `reference.int8_linear`. On a GPU they stay as
    they are, for quality (`reference.weight_only_linear`), unless they are meant to be int8.

    Args:
        has_int8_inputs: whether the weight was made for inputs in int8, one scale a row: `reference.int8_row_linear`.
        input_scale: the scale of every row of these; None gives each row its own.

    Raises:
        ValueError: a shape or dtype that does not fit; names the argument.
    """
    require(weight.dim() == 2 and weight.dtype == torch.int8, "weight", "must be int8 [out, in]")
    require(weight.shape[1] <= MAX_INT8_IN, "weight", f"has {weight.shape[1]} inputs; sums hold {MAX_INT8_IN}")
    fits = scales.shape == weight.shape[:1] and scales.dtype == torch.float32
    require(fits, "scales", "must be float32 [out]")
    if backends.is_on_gpu(weight):
        return triton_packed.pack_int8(weight, scales, has_int8_inputs=has_int8_inputs, input_scale=input_scale)
    return cpu_linear.pack_int8(weight, scales)


def pack_int4_weight(weight: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> PackedWeight:
    """4-bit weights, packed: value = scale * weight + minimum.

    On a processor inputs become int8 in the same groups: see `reference.int4_linear`. On a GPU they stay as they are:
    see `reference.weight_only_linear`.

    Args:
        weight: uint8 in 0 .. 15 [out, in].
        scales, minima: [out, in / group_size]; kept as float16.

    Raises:
        ValueError: a shape or dtype that does not fit; names the argument.
    """
    require(weight.dim() == 2 and weight.dtype == torch.uint8, "weight", "must be uint8 [out, in]")
    require(scales.dim() == 2 and scales.shape[0] == weight.shape[0], "scales", "must be [out, groups]")
    require(minima.shape == scales.shape, "minima", "must have the shape of scales")
    has_group_size = any(scales.shape[1] * size == weight.shape[1] for size in INT4_GROUP_SIZES)
    require(has_group_size, "scales", f"must hold one per group of {INT4_GROUP_SIZES} of the {weight.shape[1]} inputs")
    if backends.is_on_gpu(weight):
        return triton_packed.pack_int4(weight, scales, minima)
    return cpu_linear.pack_int4(weight, scales, minima)


def pack_float8_weight(
    weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None = None
) -> PackedWeight:
    """float8 e4m3 [out, in] on a GPU, packed; see `reference.float8_linear`.

    Inputs become float8, too, where the GPU multiplies it.

    Args:
        scales: float32, [out], or one per block.
        block: outputs and inputs of a block, the latter a multiple of FLOAT8_BLOCK_IN; None with one scale per output.

    Raises:
        ValueError: a shape, dtype or device that does not fit; names the argument.
    """
    require(backends.is_on_gpu(weight), "weight", f"must be on a CUDA device, not {weight.device}")
    fits = weight.dim() == 2 and weight.dtype == torch.float8_e4m3fn
    require(fits, "weight", "must be float8_e4m3fn [out, in]")
    num_out, num_in = weight.shape
    shape: tuple[int, ...] = (num_out,)
    if block is not None:
        require(block[1] % FLOAT8_BLOCK_IN == 0, "block", f"must hold a multiple of {FLOAT8_BLOCK_IN} inputs")
        shape = (-(-num_out // block[0]), -(-num_in // block[1]))
    require(scales.shape == shape and scales.dtype == torch.float32, "scales", f"must be float32 {shape}")
    return triton_packed.pack_float8(weight, scales, block)


def packed_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Linear layer on a packed weight: [T, in] -> [T, out].

    Args:
        bias: [out] float32.
        out_dtype: float32, bfloat16 or float16; None takes x's.

    Raises:
        ValueError: shapes that do not fit together; names the argument.
    """
    require(x.dim() == 2 and x.shape[1] == weight.in_features, "x", f"must be [T, {weight.in_features}]")
    fits = bias is None or (bias.shape == (weight.out_features,) and bias.dtype == torch.float32)
    require(fits, "bias", f"must be float32 [{weight.out_features}]")
    wanted = out_dtype or x.dtype
    if backends.is_on_gpu(x) or (x.dtype in backends.NATIVE_DTYPES and wanted in backends.NATIVE_DTYPES):
        return weight.linear(x, bias, wanted)
    return weight.linear(x.float(), bias, torch.float32).to(wanted)
