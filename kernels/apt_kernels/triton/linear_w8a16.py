"""x in 16 bits (or 32) times int8 weights: one scale per output, applied to the sums.

A weight becomes x's dtype in registers, which loses nothing: all int8 values are exact in bfloat16. So this is the
product of choice for int8 weights on a GPU: nothing but the weights is rounded, and a decoding step reads half of what
it reads in bfloat16. They lie in words (linear_words.py): bytes one after the other take twice the instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from apt_kernels.triton import linear_tile, linear_words
from apt_kernels.triton.linear_tile import Epilogue, load_rows, split_range, store_tile, tile_origin
from apt_kernels.triton.linear_words import WORDS, load_words
from apt_kernels.triton.tuning import Config

OP = "linear_w8a16"
BITS = tl.constexpr(8)
BLOCK = 128
"""Inputs in a block."""

shape_class = linear_tile.shape_class


def candidates(num_rows: int) -> list[Config]:
    """Configurations worth measuring."""
    return linear_tile.candidates(num_rows, block_ks=(BLOCK, 2 * BLOCK))


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x,
    x_stride,
    words,
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
    lane = tl.arange(0, WORDS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(first_in, last_in, BLOCK_K):
        for block in tl.static_range(0, BLOCK_K, 128):
            tile = load_words(words, outs, k + block, num_out, num_in, BITS)
            for slot in tl.static_range(4):
                x_tile = load_rows(x, rows, lane + k + (block + slot * WORDS), num_rows, num_in, x_stride)
                values = (tile >> (8 * (slot // 2) + 16 * (slot % 2))).to(tl.int8)
                acc = tl.dot(values.to(x_tile.dtype), x_tile, acc, input_precision="ieee")
    store_tile(acc, out, row_scales, out_scales, bias, first_row, first_out, num_rows, num_out, SPLIT_K)


def linear(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """[T, in] -> [T, out]: `reference.weight_only_linear` of `reference.dequantize_int8`.

    Args:
        x: float32, float16 or bfloat16; rows may lie apart.
        words: int8 weights [out, in] as `linear_words.pack` has them. scales: float32 [out]. bias: float32 [out].

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    num_out, num_in = len(words), linear_tile.num_inputs(x)
    linear_words.require_words(words, num_in, BITS.value)
    linear_tile.check(x, num_out, num_in, bias, out_dtype, words=words, scales=scales)
    linear_tile.require_scales(scales, num_out)
    shape = (x.shape[0], num_out, num_in)
    config = linear_tile.choose(OP, *shape, x.device, _default_config)
    epilogue = Epilogue(out_dtype, bias, out_scales=scales)
    return linear_tile.run(_linear_kernel, (x, x.stride(0), words), shape, x.device, epilogue, config)


def _default_config(num_rows: int, num_out: int, num_in: int, device: torch.device) -> Config:
    return linear_tile.default_config(num_rows, num_out, num_in, device, decode_k=2 * BLOCK, many_k=BLOCK)
