"""RMSNorm (arXiv 1910.07467), alone or with the addition to the residual stream before it, forward and backward.

A tile is some whole rows. The weight's gradient is summed by each program over its own tiles, then over the programs:
no atomics, equal bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from apt_kernels.triton.launch import num_processors, require, require_device
from apt_kernels.triton.tuning import Config, tuned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 16384
"""A row stays in the registers of one program."""
TILE_ELEMENTS = 4096
PROGRAMS_PER_PROCESSOR = 4
"""For the gradients: enough to hide its reads, few enough to keep the partial sums of the weight's gradient small."""


@triton.jit
def _row_pointers(base, rows, heads, stride, head_stride):
    """Where rows of [T, heads, C] begin; row r is head r % heads of token r // heads."""
    return base + (rows // heads).to(tl.int64) * stride + (rows % heads) * head_stride


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x,
    residual,
    weight,
    out,
    total_out,
    num_rows,
    heads,
    eps,
    stride,
    head_stride,
    residual_stride,
    residual_head_stride,
    HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of rows; with a residual, total_out gets the sum that is normalised. Outputs are contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < num_rows) & (columns < WIDTH)
    total = tl.load(_row_pointers(x, rows, heads, stride, head_stride) + columns, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        pointers = _row_pointers(residual, rows, heads, residual_stride, residual_head_stride) + columns
        added = tl.load(pointers, mask=mask, other=0.0)
        total = (total.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total_out + rows * WIDTH + columns, total, mask=mask)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    # Rounded before the weight as by the reference.
    normed = (wide * scale[:, None]).to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + rows * WIDTH + columns, (normed * w).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    x,
    weight,
    grad,
    total_grad,
    x_grad,
    partial_grads,
    num_rows,
    heads,
    eps,
    stride,
    head_stride,
    HAS_TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Every num_programs-th tile of rows, and the sum of their contributions to the weight's gradient.

    x is what was normalised; with total_grad, the gradient of what it was returned as is added to x's.
    """
    columns = tl.arange(0, BLOCK_C)[None, :]
    w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    weight_grad = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        mask = (rows < num_rows) & (columns < WIDTH)
        wide = tl.load(_row_pointers(x, rows, heads, stride, head_stride) + columns, mask=mask, other=0.0).to(
            tl.float32
        )
        g = tl.load(grad + rows * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)[:, None]
        normed = wide * scale
        weight_grad += g * normed
        normed_grad = g * w
        along = tl.sum(normed_grad * normed, 1)[:, None] / WIDTH
        result = (normed_grad - normed * along) * scale
        if HAS_TOTAL:
            result += tl.load(total_grad + rows * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_grad + rows * WIDTH + columns, result.to(x_grad.dtype.element_ty), mask=mask)
    partial = partial_grads + tl.program_id(0) * WIDTH + columns
    tl.store(partial, tl.sum(weight_grad, 0)[None, :], mask=columns < WIDTH)


def shape_class(width: int) -> str:
    """What the best tiles depend on. Not on the number of rows: a row's result must not depend on its company."""
    return f"c{triton.next_power_of_2(width)}"


def candidates(width: int) -> list[Config]:
    """Configurations worth measuring for rows of this width."""
    elements = (2048, 4096, 8192, 16384)
    rows = sorted({max(1, count // triton.next_power_of_2(width)) for count in elements})
    return [Config({"BLOCK_R": count}, num_warps=warps) for count in rows for warps in (4, 8, 16)]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, [..., C] -> [..., C], differentiable in x and weight; see `reference.rms_norm`.

    Raises:
        ValueError: an argument the kernel cannot run; names it.
    """
    _check("x", x, weight)
    out: torch.Tensor = _norm(x, weight, eps)
    return out


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of x + residual, x + residual), differentiable in all three; see `reference.fused_add_rms_norm`.

    Raises:
        ValueError: an argument the kernel cannot run; names it.
    """
    _check("x", x, weight)
    _check("residual", residual, weight)
    require(residual.shape == x.shape, "residual", f"must be {tuple(x.shape)}, got {tuple(residual.shape)}")
    normed, total = _add_norm(x, residual, weight, eps)
    return normed, total


def _check(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    require_device(**{name: x, "weight": weight})
    require(x.dtype in DTYPES, name, f"must be one of {DTYPES}, got {x.dtype}")
    require(x.dim() > 1 and 0 < x.shape[-1] <= MAX_WIDTH, name, f"must be [..., C], C to {MAX_WIDTH}: {tuple(x.shape)}")
    require(x.stride(-1) == 1, name, "must be contiguous within a row")
    fits = weight.shape == x.shape[-1:] and weight.dtype == x.dtype and weight.is_contiguous()
    require(fits, "weight", f"must be contiguous {x.dtype} [{x.shape[-1]}], got {weight.dtype} {tuple(weight.shape)}")


@torch.library.custom_op("apt_triton::rms_norm", mutates_args=())
def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = _empty_like(x)
    _launch_forward(x, None, weight, out, None, eps)
    return out


@_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _empty_like(x)


@torch.library.custom_op("apt_triton::fused_add_rms_norm", mutates_args=())
def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, total = _empty_like(x), _empty_like(x)
    _launch_forward(x, residual, weight, normed, total, eps)
    return normed, total


@_add_norm.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(x), _empty_like(x)


@torch.library.custom_op("apt_triton::rms_norm_backward", mutates_args=())
def _norm_backward(
    grad: torch.Tensor, total_grad: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of what was normalised, x [..., C], and of the weight; total_grad is x's own as a second output."""
    x_grad, rows, config = _empty_like(x), _as_rows(x), _config("rms_norm_backward", x)
    num_rows, heads = rows.shape[0] * rows.shape[1], rows.shape[1]
    num_tiles = triton.cdiv(num_rows, config.blocks["BLOCK_R"])
    num_programs = min(num_tiles, PROGRAMS_PER_PROCESSOR * num_processors(x.device))
    partial_grads = torch.empty(num_programs, x.shape[-1], dtype=torch.float32, device=x.device)
    if num_programs > 0:
        _backward_kernel[(num_programs,)](
            *(rows, weight, grad.contiguous(), None if total_grad is None else total_grad.contiguous()),
            *(x_grad, partial_grads, num_rows, heads, eps, *rows.stride()[:2]),
            HAS_TOTAL=total_grad is not None,
            **_constants(x),
            **config.options(),
        )
    return x_grad, partial_grads.sum(0).to(weight.dtype)


@_norm_backward.register_fake
def _(
    grad: torch.Tensor, total_grad: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(x), _empty_like(weight)


def _launch_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
) -> None:
    rows, added, config = _as_rows(x), None if residual is None else _as_rows(residual), _config("rms_norm", x)
    num_rows, heads = rows.shape[0] * rows.shape[1], rows.shape[1]
    if num_rows == 0:
        return
    _forward_kernel[(triton.cdiv(num_rows, config.blocks["BLOCK_R"]),)](
        *(rows, added, weight, out, total, num_rows, heads, eps, *rows.stride()[:2]),
        *((0, 0) if added is None else added.stride()[:2]),
        HAS_RESIDUAL=added is not None,
        **_constants(x),
        **config.options(),
    )


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., C] as [T, heads, C], without a copy of two or three dimensions: heads may lie in a token's wider row."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(0, -3)


def _config(op: str, x: torch.Tensor) -> Config:
    width = x.shape[-1]
    rows = max(1, TILE_ELEMENTS // triton.next_power_of_2(width))
    default = Config({"BLOCK_R": rows}, num_warps=8 if width <= TILE_ELEMENTS else 16)
    return tuned(op, shape_class(width), x.device, default)


def _constants(x: torch.Tensor) -> dict[str, int]:
    return {"WIDTH": x.shape[-1], "BLOCK_C": triton.next_power_of_2(x.shape[-1])}


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _norm_gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x_grad, weight_grad = _norm_backward(grad, None, *ctx.saved_tensors, ctx.eps)
    return x_grad, weight_grad, None


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _add_norm_gradients(ctx: Any, grad: torch.Tensor, total_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x_grad, weight_grad = _norm_backward(grad, total_grad, *ctx.saved_tensors, ctx.eps)
    return x_grad, x_grad, weight_grad, None


_norm.register_autograd(_norm_gradients, setup_context=_keep_norm)
_add_norm.register_autograd(_add_norm_gradients, setup_context=_keep_add_norm)
