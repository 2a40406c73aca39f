"""x in 16 bits (or 32) times 4-bit weights: value = scale * code + minimum, scale and minimum of the code's group.

Codes lie in words (linear_words.py), where a shift and a mask unpack two of them at once: with the bits of 128 above, a
code is the bfloat16 128 + code, and this is the upper half of the same float32. A weight is dequantized in float32 and
rounded once, to x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from apt_kernels.triton import linear_tile, linear_words
from apt_kernels.triton.launch import require
from apt_kernels.triton.linear_tile import Epilogue, load_rows, split_range, store_tile, tile_origin
from apt_kernels.triton.linear_words import WORDS, load_words
from apt_kernels.triton.tuning import Config

OP = "linear_w4a16"
GROUP_SIZES = (32, 64, 128)
BITS = tl.constexpr(4)
BLOCK = 256
"""Inputs in a block."""

shape_class = linear_tile.shape_class


def candidates(num_rows: int) -> list[Config]:
    """Configurations worth measuring."""
    return linear_tile.candidates(num_rows, block_ks=(BLOCK,))


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x,
    x_stride,
    words,
    scales,
    minima,
    out,
    row_scales,
    out_scales,
    bias,
    num_rows,
    num_out,
    num_in,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    tl.static_assert(BLOCK_K == 256)
    first_row, first_out = tile_origin(num_rows, num_out, BLOCK_M, BLOCK_N)
    first_in, last_in = split_range(num_in, BLOCK_K, SPLIT_K)
    rows = first_row + tl.arange(0, BLOCK_M)
    outs = first_out + tl.arange(0, BLOCK_N)
    is_out = outs < num_out
    lane = tl.arange(0, WORDS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(first_in, last_in, BLOCK_K):
        tile = load_words(words, outs, k, num_out, num_in, BITS)
        for slot in tl.static_range(8):
            # Written so that slots of one group have one and the same load.
            place = outs + (k // GROUP_SIZE + slot * WORDS // GROUP_SIZE) * num_out
            scale = tl.load(scales + place, mask=is_out, other=0).to(tl.float32)[:, None]
            minimum = tl.load(minima + place, mask=is_out, other=0).to(tl.float32)[:, None]
            x_tile = load_rows(x, rows, lane + k + slot * WORDS, num_rows, num_in, x_stride)
            pair = ((tile >> (4 * (slot // 2))) & 0x000F000F) | 0x43004300
            bits = pair << 16 if slot % 2 == 0 else pair & -65536
            values = bits.to(tl.float32, bitcast=True) * scale + (minimum - 128 * scale)
            acc = tl.dot(values.to(x_tile.dtype), x_tile, acc, input_precision="ieee")
    store_tile(acc, out, row_scales, out_scales, bias, first_row, first_out, num_rows, num_out, SPLIT_K)


def pack_factors(factors: torch.Tensor, num_in: int) -> torch.Tensor:
    """Scales or minima [out, groups] -> float16 [groups of whole blocks, out]: a tile's lie side by side."""
    group_size = num_in // factors.shape[1]
    missing = (-num_in % BLOCK) // group_size
    return F.pad(factors.to(torch.float16), (0, missing)).T.contiguous()


def linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """[T, in] -> [T, out]: `reference.weight_only_linear` of `reference.dequantize_int4`.

    Args:
        x: float32, float16 or bfloat16; rows may lie apart.
        words: codes [out, in] as `linear_words.pack` has them. scales, minima: of `pack_factors`.
        group_size: 32, 64 or 128. bias: float32 [out].

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    require(group_size in GROUP_SIZES, "group_size", f"must be one of {GROUP_SIZES}, got {group_size}")
    num_out, num_in = len(words), linear_tile.num_inputs(x)
    linear_words.require_words(words, num_in, BITS.value)
    num_groups = triton.cdiv(num_in, BLOCK) * BLOCK // group_size
    for name, factors in (("scales", scales), ("minima", minima)):
        fits = factors.shape == (num_groups, num_out) and factors.dtype == torch.float16
        require(fits and factors.is_contiguous(), name, "must be those of pack_factors")
    linear_tile.check(x, num_out, num_in, bias, out_dtype, words=words, scales=scales, minima=minima)
    shape = (x.shape[0], num_out, num_in)
    config = linear_tile.choose(OP, *shape, x.device, _default_config)
    inputs = (x, x.stride(0), words, scales, minima)
    epilogue = Epilogue(out_dtype, bias)
    return linear_tile.run(_linear_kernel, inputs, shape, x.device, epilogue, config, GROUP_SIZE=group_size)


def _default_config(num_rows: int, num_out: int, num_in: int, device: torch.device) -> Config:
    config = linear_tile.default_config(num_rows, num_out, num_in, device, decode_k=BLOCK, many_k=BLOCK)
    if num_rows <= linear_tile.DECODE_ROWS:
        return config
    # Whole blocks of inputs are large tiles: fewer rows and stages leave them room.
    return Config({**config.blocks, "BLOCK_M": 64}, num_warps=config.num_warps, num_stages=2)
