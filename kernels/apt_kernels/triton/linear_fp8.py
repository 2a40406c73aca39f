"""float8 e4m3 weights: with a scale per tensor, per output, or per block of outputs and inputs.

Where the tensor cores multiply float8 (from compute capability 8.9 on), x is quantized to it, one scale a row. Sums
leave the tensor cores after each tile of inputs: Hopper's keep fewer bits than a float32 (arXiv 2412.19437, 3.3.2).
Elsewhere a weight becomes x's dtype in registers, which is exact, and x stays as it is.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from apt_kernels.triton import linear_tile
from apt_kernels.triton.launch import require
from apt_kernels.triton.linear_tile import Epilogue, load_rows, load_weight, split_range, store_tile, tile_origin
from apt_kernels.triton.quantize import quantize_rows
from apt_kernels.triton.tuning import Config

OP = "linear_fp8"
BLOCK_K = 128
"""A block of inputs with a scale of its own holds whole tiles of so many."""
FIRST_CAPABILITY = (8, 9)

shape_class = linear_tile.shape_class


def candidates(num_rows: int) -> list[Config]:
    """Configurations worth measuring."""
    return linear_tile.candidates(num_rows, block_ks=(BLOCK_K,))


@triton.jit
def _e4m3_to_half(bits):
    """uint8 -> float16: the same exponent and fraction, where the exponent means 2**8 less."""
    wide = bits.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x,
    x_stride,
    weight,
    block_scales,
    block_out,
    block_in,
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
        weight_tile = load_weight(weight, outs, inputs, num_out, num_in)
        if weight.dtype.element_ty == tl.uint8:
            weight_tile = _e4m3_to_half(weight_tile).to(x_tile.dtype)
        sums = tl.dot(weight_tile, x_tile, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
        if block_scales is not None:
            place = outs // block_out * tl.cdiv(num_in, block_in) + k // block_in
            sums *= tl.load(block_scales + place, mask=outs < num_out, other=0)[:, None]
        acc += sums
    store_tile(acc, out, row_scales, out_scales, bias, first_row, first_out, num_rows, num_out, SPLIT_K)


@cache
def has_float8(device: torch.device) -> bool:
    """Whether a device multiplies float8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int] | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    quantizes_x: bool,
) -> torch.Tensor:
    """[T, in] -> [T, out]; see `reference.float8_linear`.

    Args:
        x: float32, float16 or bfloat16; rows may lie apart.
        weight: float8_e4m3fn [out, in].
        scales: float32, [out], or one per block of outputs and inputs.
        block: outputs and inputs of a block, the latter a multiple of BLOCK_K; None with one scale per output.
        bias: float32 [out].
        quantizes_x: whether to multiply in float8, which needs a device that `has_float8`.

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    require(weight.dim() == 2 and weight.dtype == torch.float8_e4m3fn, "weight", "must be float8_e4m3fn [out, in]")
    require(weight.is_contiguous(), "weight", "must be contiguous")
    num_out, num_in = weight.shape
    linear_tile.check(x, num_out, num_in, bias, out_dtype, weight=weight, scales=scales)
    if block is None:
        linear_tile.require_scales(scales, num_out)
    else:
        require(block[1] % BLOCK_K == 0, "block", f"must hold a multiple of {BLOCK_K} inputs, got {block}")
        expected = (triton.cdiv(num_out, block[0]), triton.cdiv(num_in, block[1]))
        fits = scales.shape == expected and scales.dtype == torch.float32 and scales.is_contiguous()
        require(fits, "scales", f"must be float32 {expected} and contiguous")
    row_scales = None
    if quantizes_x:
        x, row_scales = quantize_rows(x, torch.float8_e4m3fn)
    else:
        weight = weight.view(torch.uint8)
    shape = (x.shape[0], num_out, num_in)
    config = linear_tile.choose(OP, *shape, x.device, _default_config)
    block_args = (None, 1, 1) if block is None else (scales, *block)
    inputs = (x, x.stride(0), weight, *block_args)
    epilogue = Epilogue(out_dtype, bias, out_scales=scales if block is None else None, row_scales=row_scales)
    return linear_tile.run(_linear_kernel, inputs, shape, x.device, epilogue, config)


def _default_config(num_rows: int, num_out: int, num_in: int, device: torch.device) -> Config:
    return linear_tile.default_config(num_rows, num_out, num_in, device, decode_k=BLOCK_K, many_k=BLOCK_K)
