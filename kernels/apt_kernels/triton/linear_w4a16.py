"""x in 16 bits (or 32) times 4-bit weights: value = scale * code + minimum, scale and minimum of the code's group.

Layout: inputs come in blocks of 256, and a block of an output is 32 words of 32 bits, one after the other. Four bits
`i` of word `j` hold the code of input `32 i + j`. So one shift and one mask turn a tile of words [outputs, 32] into
the codes of 32 consecutive inputs, each in the lane and register where its word was: no value moves between threads,
and as groups are multiples of 32 inputs, such a tile has one scale per output. Inputs are filled up to whole blocks
with groups whose scale and minimum are 0.

A weight is dequantized in float32 and rounded once, to x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from apt_kernels.triton import linear_tile
from apt_kernels.triton.launch import require
from apt_kernels.triton.linear_tile import Epilogue, load_rows, split_range, store_tile, tile_origin
from apt_kernels.triton.tuning import Config

OP = "linear_w4a16"
GROUP_SIZES = (32, 64, 128)
CODES = tl.constexpr(8)
"""In a word."""
WORDS = tl.constexpr(32)
"""In a block."""
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
    tl.static_assert(BLOCK_K == CODES * WORDS)
    first_row, first_out = tile_origin(num_rows, num_out, BLOCK_M, BLOCK_N)
    first_in, last_in = split_range(num_in, BLOCK_K, SPLIT_K)
    rows = first_row + tl.arange(0, BLOCK_M)
    outs = first_out + tl.arange(0, BLOCK_N)
    is_out = outs < num_out
    lane = tl.arange(0, WORDS)
    row_of_words = words + outs.to(tl.int64) * (tl.cdiv(num_in, BLOCK_K) * WORDS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(first_in, last_in, BLOCK_K):
        tile = tl.load(row_of_words[:, None] + k // CODES + lane[None, :], mask=is_out[:, None], other=0)
        for i in tl.static_range(CODES):
            # Written so that slots of one group have one and the same load.
            group = k // GROUP_SIZE + i * WORDS // GROUP_SIZE
            place = group * num_out + outs
            scale = tl.load(scales + place, mask=is_out, other=0).to(tl.float32)[:, None]
            minimum = tl.load(minima + place, mask=is_out, other=0).to(tl.float32)[:, None]
            x_tile = load_rows(x, rows, lane + k + i * WORDS, num_rows, num_in, x_stride)
            values = ((tile >> (4 * i)) & 15).to(tl.float32) * scale + minimum
            acc = tl.dot(values.to(x_tile.dtype), x_tile, acc, input_precision="ieee")
    store_tile(acc, out, row_scales, out_scales, bias, first_row, first_out, num_rows, num_out, SPLIT_K)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """uint8 in 0 .. 15 [out, in] -> int32 [out, words], in the layout above."""
    num_out, num_in = weight.shape
    codes = F.pad(weight, (0, -num_in % BLOCK)).view(num_out, -1, CODES.value, WORDS.value)
    words = torch.zeros_like(codes[:, :, 0], dtype=torch.int32)
    for i in range(CODES.value):
        words |= codes[:, :, i].to(torch.int32) << (4 * i)
    return words.flatten(1)


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
        words: of `pack`. scales, minima: of `pack_factors`. group_size: 32, 64 or 128. bias: float32 [out].

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    require(group_size in GROUP_SIZES, "group_size", f"must be one of {GROUP_SIZES}, got {group_size}")
    require(words.dim() == 2 and words.dtype == torch.int32, "words", "must be int32 [out, words]")
    num_out, num_in = words.shape[0], x.shape[1]
    num_blocks = triton.cdiv(num_in, BLOCK)
    fits = words.shape[1] == num_blocks * WORDS.value and words.is_contiguous()
    require(fits, "words", f"must be those of {num_in} inputs, and contiguous")
    for name, factors in (("scales", scales), ("minima", minima)):
        fits = factors.shape == (num_blocks * BLOCK // group_size, num_out) and factors.dtype == torch.float16
        require(fits and factors.is_contiguous(), name, "must be those of pack_factors")
    linear_tile.check(x, num_out, num_in, bias, out_dtype, words=words, scales=scales, minima=minima)
    shape = (x.shape[0], num_out, num_in)
    config = linear_tile.choose(OP, *shape, x.device, _default_config)
    inputs = (x, x.stride(0), words, scales, minima)
    epilogue = Epilogue(out_dtype, bias)
    return linear_tile.run(_linear_kernel, inputs, shape, x.device, epilogue, config, GROUP_SIZE=group_size)


def _default_config(num_rows: int, num_out: int, num_in: int, device: torch.device) -> Config:
    config = linear_tile.default_config(num_rows, num_out, num_in, device, block_k=BLOCK)
    if num_rows <= linear_tile.DECODE_ROWS:
        return config
    # Whole blocks of inputs are large tiles: fewer rows and stages leave them room.
    return Config({**config.blocks, "BLOCK_M": 64, "BLOCK_K": BLOCK}, num_warps=config.num_warps, num_stages=2)
