"""Activations in 8 bits, one scale a row: int8 or float8 e4m3, made when a product needs them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from apt_kernels.triton.launch import require, require_device
from apt_kernels.triton.linear_tile import FLOAT_DTYPES

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What the largest magnitude of a row becomes."""
BLOCK = 2048


@triton.jit
def _quantize_kernel(
    x,
    x_stride,
    input_scale,
    values,
    row_scales,
    num_in,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    values += row * num_in
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    num_odd = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_in, BLOCK):
        size = tl.abs(tl.load(x + first + lane, mask=first + lane < num_in, other=0).to(tl.float32))
        largest = tl.maximum(largest, size)
        num_odd += (size < float("inf")).to(tl.int32) ^ 1
    most = tl.max(largest)
    if input_scale is None:
        scale = tl.div_rn(most, LARGEST)
        inverse = tl.div_rn(LARGEST, tl.where(most == 0, 1.0, most))
    else:
        scale = input_scale
        inverse = tl.div_rn(1.0, scale)
    # A maximum passes over NaN. As in the twin, a row with NaN or infinity becomes NaN.
    tl.store(row_scales + row, tl.where(tl.sum(num_odd) == 0, scale, float("nan")))
    for first in range(0, num_in, BLOCK):
        inside = first + lane < num_in
        value = tl.load(x + first + lane, mask=inside, other=0).to(tl.float32) * inverse
        value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
        if values.dtype.element_ty == tl.int8:
            # Adding 1.5 * 2**23 leaves a float32 no room for a fraction: it rounds as the twin does, halves to even.
            value = (value + 12582912.0) - 12582912.0
        tl.store(values + first + lane, value.to(values.dtype.element_ty), mask=inside)


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, input_scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in] as dtype times a scale per row: ([T, in], float32 [T]); see `reference.quantize_rows`.

    A row's largest magnitude becomes the dtype's. A row that is not finite gets the scale NaN.

    Args:
        dtype: int8 or float8_e4m3fn.
        input_scale: the scale of every row; larger values are cut off. None gives each row its own.

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    require(dtype in LARGEST, "dtype", f"must be int8 or float8_e4m3fn, not {dtype}")
    require(x.dim() == 2 and x.dtype in FLOAT_DTYPES, "x", "must be float32, float16 or bfloat16 [T, in]")
    require(x.shape[1] == 1 or x.stride(1) == 1, "x", "must have inputs side by side")
    require(input_scale is None or input_scale > 0, "input_scale", f"must be positive, got {input_scale}")
    require_device(x=x)
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0] > 0:
        block = min(BLOCK, triton.next_power_of_2(x.shape[1]))
        _quantize_kernel[(x.shape[0],)](
            x, x.stride(0), input_scale, values, scales, x.shape[1], LARGEST=LARGEST[dtype], BLOCK=block, num_warps=4
        )
    return values, scales
