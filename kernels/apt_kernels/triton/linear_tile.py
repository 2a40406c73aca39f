"""What the matrix products share: which tile a program makes, sums cut into splits, the epilogue, and the launch.

All of them multiply a tile of the weight [outputs, inputs] by one of x transposed [inputs, rows]. The weight is the
left operand because that one may come from registers, where it has just been unpacked, and because the few rows of a
decoding step then fill the short side of the tensor cores' instructions.

A sum over the inputs may be cut into splits, each of its own program, where there are too few tiles to keep all
multiprocessors reading. A second kernel adds the splits up in their order, so results are the same every time. Up to
`DECODE_ROWS` rows the splits and steps of a sum depend on the weight only, and with them a row's result; beyond that
it may depend on how many rows there are, as it does in cuBLAS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from apt_kernels.triton import tuning
from apt_kernels.triton.launch import num_processors, require, require_device
from apt_kernels.triton.tuning import Config, tuned

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DECODE_ROWS = 64
ROW_CLASSES = (DECODE_ROWS, 512, 8192)
"""Up to so many rows share a configuration; more than the last have the last one's."""
FEWEST_ROWS = 16
"""Rows of the smallest tile."""
FEWEST_STEPS = 4
"""Tiles of inputs that a split sums at least: fewer do not pay for its traffic."""
MAX_SPLITS = 16
REDUCE_BLOCK = 512


@triton.jit
def tile_origin(num_rows, num_out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first row, first output) of this program's tile; programs that run together share tiles in L2."""
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(num_out, BLOCK_N)
    tile = tl.program_id(0)
    tile_n, tile_m = tl.swizzle2d(tile // tiles_m, tile % tiles_m, tiles_n, tiles_m, 8)
    return tile_m * BLOCK_M, tile_n * BLOCK_N


@triton.jit
def split_range(num_in, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """(first, last) input of this program's split, whole tiles of them."""
    size = tl.cdiv(tl.cdiv(num_in, BLOCK_K), SPLIT_K) * BLOCK_K
    first = tl.program_id(1) * size
    return first, tl.minimum(first + size, num_in)


@triton.jit
def load_rows(x, rows, inputs, num_rows, num_in, x_stride):
    """x transposed, [inputs, rows]; what lies outside is zero."""
    inside = (rows < num_rows)[None, :] & (inputs < num_in)[:, None]
    return tl.load(x + rows.to(tl.int64)[None, :] * x_stride + inputs[:, None], mask=inside, other=0.0)


@triton.jit
def load_weight(weight, outs, inputs, num_out, num_in):
    """[outputs, inputs]; what lies outside is zero."""
    inside = (outs < num_out)[:, None] & (inputs < num_in)[None, :]
    return tl.load(weight + outs.to(tl.int64)[:, None] * num_in + inputs[None, :], mask=inside, other=0.0)


@triton.jit
def finish(sums, row_scales, out_scales, bias, rows, outs, inside):
    """Sums of any shape times the scales of their rows and outputs, plus the bias; each of the three may be None."""
    value = sums.to(tl.float32)
    if row_scales is not None:
        value *= tl.load(row_scales + rows, mask=inside, other=0)
    if out_scales is not None:
        value *= tl.load(out_scales + outs, mask=inside, other=0)
    if bias is not None:
        value += tl.load(bias + outs, mask=inside, other=0)
    return value


@triton.jit
def store_tile(
    acc,
    out,
    row_scales,
    out_scales,
    bias,
    first_row,
    first_out,
    num_rows,
    num_out,
    SPLIT_K: tl.constexpr,
):
    """acc [outputs, rows] into out [rows, outputs], finished; or, where sums are split, as it is into [splits, ...]."""
    rows = (first_row + tl.arange(0, acc.shape[1]))[None, :]
    outs = (first_out + tl.arange(0, acc.shape[0]))[:, None]
    inside = (rows < num_rows) & (outs < num_out)
    place = rows.to(tl.int64) * num_out + outs
    if SPLIT_K == 1:
        acc = finish(acc, row_scales, out_scales, bias, rows, outs, inside)
    else:
        place += tl.program_id(1).to(tl.int64) * num_rows * num_out
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _add_splits(
    partial,
    out,
    row_scales,
    out_scales,
    bias,
    num_rows,
    num_out,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [rows, outputs] from partial [splits, rows, outputs], added up in order."""
    size = num_rows.to(tl.int64) * num_out
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    sums = tl.load(partial + place, mask=inside, other=0)
    for split in tl.static_range(1, SPLIT_K):
        sums += tl.load(partial + split * size + place, mask=inside, other=0)
    value = finish(sums, row_scales, out_scales, bias, place // num_out, place % num_out, inside)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What becomes of the sums: times the scales, plus the bias, rounded to a dtype."""

    out_dtype: torch.dtype
    bias: torch.Tensor | None = None
    """[out] float32."""
    out_scales: torch.Tensor | None = None
    """[out] float32."""
    row_scales: torch.Tensor | None = None
    """[T] float32."""

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """In the order in which kernels take them."""
        return self.row_scales, self.out_scales, self.bias


def run(
    kernel: Any,
    inputs: tuple[Any, ...],
    shape: tuple[int, int, int],
    device: torch.device,
    epilogue: Epilogue,
    config: Config,
    *,
    sums: torch.dtype = torch.float32,
    **constants: Any,
) -> torch.Tensor:
    """Launch a product.

    BLOCK_M of the configuration is the most: few rows take a smaller tile, which leaves the order of their sums alone.

    Args:
        kernel: takes `inputs`, then out, row_scales, out_scales, bias, num_rows, num_out and num_in.
        shape: (num_rows, num_out, num_in).
        sums: dtype of sums that are split.
        constants: further constexpr arguments.

    Returns:
        [num_rows, num_out] of the epilogue's dtype.
    """
    num_rows, num_out, _ = shape
    out = torch.empty(num_rows, num_out, dtype=epilogue.out_dtype, device=device)
    if num_rows == 0:
        return out
    splits, block_n = config.blocks["SPLIT_K"], config.blocks["BLOCK_N"]
    block_m = min(config.blocks["BLOCK_M"], max(FEWEST_ROWS, triton.next_power_of_2(num_rows)))
    grid = (triton.cdiv(num_rows, block_m) * triton.cdiv(num_out, block_n), splits)
    target = out if splits == 1 else torch.empty(splits, num_rows, num_out, dtype=sums, device=device)
    kernel[grid](*inputs, target, *epilogue.tensors(), *shape, **constants, **(config.options() | {"BLOCK_M": block_m}))
    if splits > 1:
        blocks = (triton.cdiv(num_rows * num_out, REDUCE_BLOCK),)
        _add_splits[blocks](
            target, out, *epilogue.tensors(), num_rows, num_out, SPLIT_K=splits, BLOCK=REDUCE_BLOCK, num_warps=4
        )
    return out


def check(
    x: torch.Tensor,
    num_out: int,
    num_in: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    **others: torch.Tensor | None,
) -> None:
    """The arguments that all products have in common.

    Raises:
        ValueError: names the argument.
    """
    require(x.dim() == 2 and x.shape[1] == num_in, "x", f"must be [T, {num_in}], got {tuple(x.shape)}")
    require(x.dtype in FLOAT_DTYPES, "x", f"must be float32, float16 or bfloat16, not {x.dtype}")
    require(num_in == 1 or x.stride(1) == 1, "x", "must have inputs side by side")
    require(out_dtype in FLOAT_DTYPES, "out_dtype", f"must be float32, float16 or bfloat16, not {out_dtype}")
    if bias is not None:
        require(bias.shape == (num_out,) and bias.dtype == torch.float32, "bias", f"must be float32 [{num_out}]")
        require(bias.is_contiguous(), "bias", "must be contiguous")
    require_device(x=x, bias=bias, **others)


def num_inputs(x: torch.Tensor) -> int:
    """Of a matrix.

    Raises:
        ValueError: it is none.
    """
    require(x.dim() == 2, "x", f"must be [T, in], got {tuple(x.shape)}")
    return x.shape[1]


def require_scales(scales: torch.Tensor, num_out: int) -> None:
    """One float32 per output.

    Raises:
        ValueError: they are something else.
    """
    fits = scales.shape == (num_out,) and scales.dtype == torch.float32 and scales.is_contiguous()
    require(fits, "scales", f"must be float32 [{num_out}] and contiguous")


def row_class(num_rows: int) -> int:
    """The number of rows that stands for this one."""
    return next((most for most in ROW_CLASSES if num_rows <= most), ROW_CLASSES[-1])


def shape_class(num_rows: int, num_out: int, num_in: int) -> str:
    """Products that share a configuration: one weight, and a range of rows."""
    return f"{num_out}x{num_in}-{row_class(num_rows)}"


def default_config(
    num_rows: int, num_out: int, num_in: int, device: torch.device, *, decode_k: int = 128, many_k: int = 64
) -> Config:
    """For a device nobody has measured; inputs of a tile for a decoding step, and for more rows."""
    if num_rows > DECODE_ROWS:
        block, num_warps = (64, 4) if num_rows <= ROW_CLASSES[1] else (128, 8)
        blocks = {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": many_k, "SPLIT_K": 1}
        return Config(blocks, num_warps=num_warps, num_stages=3)
    splits = num_splits(triton.cdiv(num_out, 64), triton.cdiv(num_in, decode_k), num_processors(device))
    return Config({"BLOCK_M": DECODE_ROWS, "BLOCK_N": 64, "BLOCK_K": decode_k, "SPLIT_K": splits}, num_stages=4)


def num_splits(num_tiles: int, num_steps: int, processors: int) -> int:
    """A power of two that gives each multiprocessor up to two programs, of at least FEWEST_STEPS steps."""
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * num_tiles <= 2 * processors and num_steps >= 2 * splits * FEWEST_STEPS:
        splits *= 2
    return splits


def candidates(num_rows: int, block_ks: tuple[int, ...] = (64, 128, 256)) -> list[Config]:
    """Configurations worth measuring."""
    if num_rows > DECODE_ROWS:
        tiles = [(64, 64, 4), (64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8)]
        return [
            Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SPLIT_K": 1}, num_warps=warps, num_stages=stages)
            for m, n, warps in tiles
            for k in block_ks
            for stages in (2, 3, 4)
        ]
    return [
        Config({"BLOCK_M": DECODE_ROWS, "BLOCK_N": n, "BLOCK_K": k, "SPLIT_K": splits}, num_stages=stages)
        for n in (64, 128)
        for k in block_ks
        for splits in (1, 2, 4, 8, 16)
        for stages in (3, 4, 6)
    ]


Default = Callable[[int, int, int, torch.device], Config]


def choose(op: str, num_rows: int, num_out: int, num_in: int, device: torch.device, default: Default) -> Config:
    """The configuration of a launch."""
    return _choose(op, row_class(num_rows), num_out, num_in, device, default, tuning.version())


@cache
def _choose(
    op: str, num_rows: int, num_out: int, num_in: int, device: torch.device, default: Default, version: int
) -> Config:
    return tuned(op, shape_class(num_rows, num_out, num_in), device, default(num_rows, num_out, num_in, device))
