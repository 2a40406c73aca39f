"""SwiGLU's gate (arXiv 2002.05202), silu(gate) * up, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from apt_kernels.triton.launch import require, require_device
from apt_kernels.triton.tuning import Config, tuned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _forward_kernel(gate_up, out, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One block of columns of one row; gate_up holds gate and up of WIDTH each side by side, out is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(gate_up + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(out + row * WIDTH + columns, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(gate_up, grad, gate_up_grad, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of one block of columns of one row's gate and up; grad and gate_up_grad are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(gate_up + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    gate_grad = g * up * share * (1.0 + gate * (1.0 - share))
    up_grad = g * gate * share
    dtype = gate_up_grad.dtype.element_ty
    tl.store(gate_up_grad + row * 2 * WIDTH + columns, gate_grad.to(dtype), mask=mask)
    tl.store(gate_up_grad + row * 2 * WIDTH + WIDTH + columns, up_grad.to(dtype), mask=mask)


def shape_class(width: int) -> str:
    """What the best blocks depend on."""
    return f"i{triton.next_power_of_2(width)}"


def candidates() -> list[Config]:
    """Configurations worth measuring."""
    return [Config({"BLOCK": block}, num_warps=warps) for block in (512, 1024, 2048, 4096) for warps in (4, 8)]


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, gate and up side by side: [..., 2 I] -> [..., I], differentiable; see `reference.silu_and_mul`.

    Raises:
        ValueError: an argument the kernel cannot run; names it.
    """
    require_device(gate_up=gate_up)
    require(gate_up.dtype in DTYPES, "gate_up", f"must be one of {DTYPES}, got {gate_up.dtype}")
    fits = gate_up.dim() > 0 and gate_up.shape[-1] > 0 and gate_up.shape[-1] % 2 == 0
    require(fits, "gate_up", f"must be [..., 2 I], got {tuple(gate_up.shape)}")
    require(gate_up.stride(-1) == 1, "gate_up", "must be contiguous within a row")
    out: torch.Tensor = _silu_and_mul(gate_up)
    return out


@torch.library.custom_op("apt_triton::silu_and_mul", mutates_args=())
def _silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    out, rows = _output(gate_up), gate_up.reshape(-1, gate_up.shape[-1])
    grid, constants = _launch(rows)
    if rows.shape[0] > 0:
        _forward_kernel[grid](rows, out, rows.stride(0), **constants)
    return out


@_silu_and_mul.register_fake
def _(gate_up: torch.Tensor) -> torch.Tensor:
    return _output(gate_up)


@torch.library.custom_op("apt_triton::silu_and_mul_backward", mutates_args=())
def _silu_and_mul_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up's gradient, [..., 2 I]."""
    gate_up_grad, rows = _like(gate_up), gate_up.reshape(-1, gate_up.shape[-1])
    grid, constants = _launch(rows)
    if rows.shape[0] > 0:
        _backward_kernel[grid](rows, grad.contiguous(), gate_up_grad, rows.stride(0), **constants)
    return gate_up_grad


@_silu_and_mul_backward.register_fake
def _(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    return _like(gate_up)


def _launch(rows: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants for [rows, 2 I]."""
    width = rows.shape[1] // 2
    default = Config({"BLOCK": min(1024, triton.next_power_of_2(width))})
    config = tuned("silu_and_mul", shape_class(width), rows.device, default)
    return (rows.shape[0], triton.cdiv(width, config.blocks["BLOCK"])), {"WIDTH": width, **config.options()}


def _output(gate_up: torch.Tensor) -> torch.Tensor:
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    gate_up_grad: torch.Tensor = _silu_and_mul_backward(grad, *ctx.saved_tensors)
    return gate_up_grad


_silu_and_mul.register_autograd(_gradient, setup_context=_keep)
