"""int8 times int8: weights with one scale per output, x quantized with one scale per row.

Sums are exact integers, and splitting them changes nothing: a row's result depends on the row alone. One scale for a
whole row costs some quality with models that were not made for it, so this is for checkpoints that say they were.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from apt_kernels.triton import linear_tile
from apt_kernels.triton.launch import require
from apt_kernels.triton.linear_tile import Epilogue, load_rows, load_weight, split_range, store_tile, tile_origin
from apt_kernels.triton.quantize import quantize_rows

OP = "linear_w8a8"
MAX_IN = 2**17
"""Products are at most 127 * 128: so many fit into an int32."""

candidates = linear_tile.candidates
shape_class = linear_tile.shape_class


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x,
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
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in range(first_in, last_in, BLOCK_K):
        inputs = k + tl.arange(0, BLOCK_K)
        x_tile = load_rows(x, rows, inputs, num_rows, num_in, num_in)
        acc = tl.dot(load_weight(weight, outs, inputs, num_out, num_in), x_tile, acc, out_dtype=tl.int32)
    store_tile(acc, out, row_scales, out_scales, bias, first_row, first_out, num_rows, num_out, SPLIT_K)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    input_scale: float | None = None,
) -> torch.Tensor:
    """[T, in] -> [T, out]; see `reference.int8_row_linear`.

    Args:
        x: float32, float16 or bfloat16; rows may lie apart.
        weight: int8 [out, in]. scales: float32 [out]. bias: float32 [out].
        input_scale: of every row; None gives each row its own.

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    require(weight.dim() == 2 and weight.dtype == torch.int8, "weight", "must be int8 [out, in]")
    require(weight.is_contiguous(), "weight", "must be contiguous")
    num_out, num_in = weight.shape
    require(num_in <= MAX_IN, "weight", f"has {num_in} inputs; sums hold {MAX_IN}")
    linear_tile.check(x, num_out, num_in, bias, out_dtype, weight=weight, scales=scales)
    linear_tile.require_scales(scales, num_out)
    values, row_scales = quantize_rows(x, torch.int8, input_scale)
    shape = (x.shape[0], num_out, num_in)
    config = linear_tile.choose(OP, *shape, x.device, linear_tile.default_config)
    epilogue = Epilogue(out_dtype, bias, out_scales=scales, row_scales=row_scales)
    return linear_tile.run(_linear_kernel, (values, weight), shape, x.device, epilogue, config, sums=torch.int32)
