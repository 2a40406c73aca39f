"""x in 16 bits (or 32) times int8 weights: one scale per output, applied to the sums.

A weight becomes x's dtype in registers, which loses nothing: all int8 values are exact in bfloat16. So this is the
product of choice for int8 weights on a GPU: nothing but the weights is rounded, and a decoding step reads half of what
it reads in bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from apt_kernels.triton import linear_tile
from apt_kernels.triton.launch import require
from apt_kernels.triton.linear_tile import Epilogue, load_rows, load_weight, split_range, store_tile, tile_origin

OP = "linear_w8a16"

candidates = linear_tile.candidates
shape_class = linear_tile.shape_class


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x,
    x_stride,
    weight,
    out,
    row_scales,
    out_scales,
    bias,
    num_rows,
    num_out,
    num_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    first_row, first_out = tile_origin(num_rows, num_out, BLOCK_M, BLOCK_N)
    first_in, last_in = split_range(num_in, BLOCK_K, SPLIT_K)
    rows = first_row + tl.arange(0, BLOCK_M)
    outs = first_out + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(first_in, last_in, BLOCK_K):
        inputs = k + tl.arange(0, BLOCK_K)
        x_tile = load_rows(x, rows, inputs, num_rows, num_in, x_stride)
        weight_tile = load_weight(weight, outs, inputs, num_out, num_in).to(x_tile.dtype)
        acc = tl.dot(weight_tile, x_tile, acc, input_precision="ieee")
    store_tile(acc, out, row_scales, out_scales, bias, first_row, first_out, num_rows, num_out, SPLIT_K)


def linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """[T, in] -> [T, out]: `reference.weight_only_linear` of the dequantized weight.

    Args:
        x: float32, float16 or bfloat16; rows may lie apart.
        weight: int8 [out, in]. scales: float32 [out]. bias: float32 [out].

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    require(weight.dim() == 2 and weight.dtype == torch.int8, "weight", "must be int8 [out, in]")
    require(weight.is_contiguous(), "weight", "must be contiguous")
    num_out, num_in = weight.shape
    linear_tile.check(x, num_out, num_in, bias, out_dtype, weight=weight, scales=scales)
    linear_tile.require_scales(scales, num_out)
    shape = (x.shape[0], num_out, num_in)
    config = linear_tile.choose(OP, *shape, x.device, linear_tile.default_config)
    epilogue = Epilogue(out_dtype, bias, out_scales=scales)
    return linear_tile.run(_linear_kernel, (x, x.stride(0), weight), shape, x.device, epilogue, config)
