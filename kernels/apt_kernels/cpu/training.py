"""The ops of training in C++ on a processor: norms, SwiGLU's gate and the loss, each one pass over memory each way.

Under autocast what a norm or a gate passes on is rounded once, where the products that read it would each round it
again. The residual stream stays in float32, as it does with torch's own ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from apt_kernels.cpu import native
from apt_kernels.cross_entropy import define, torch_step

DTYPES = (torch.float32, torch.bfloat16)


def can_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> bool:
    """Whether `add_rms_norm` takes these: weights and residuals of training are float32."""
    wide = [weight] if residual is None else [weight, residual]
    return _serves(x) and all(each.dtype == torch.float32 and each.device == x.device for each in wide)


def can_gate(gate: torch.Tensor) -> bool:
    """Whether `gated_silu` takes it."""
    return _serves(gate)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of x + residual, x + residual float32), both of x's shape; differentiable once."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    out_dtype = dtype if dtype in DTYPES else torch.float32
    normed, total, _ = _training_norm(x, residual, weight, eps, out_dtype)
    return normed, total


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `reference.gated_silu`; differentiable once."""
    out: torch.Tensor = _gated_silu(gate, up)
    return out


def _serves(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and native.isa() != native.OFF and x.dtype in DTYPES


@torch.library.custom_op("apt_training::norm", mutates_args=())
def _training_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normed, total, inverse_rms = torch.ops.apt_cpu.training_norm(x, residual, weight, eps, out_dtype)
    return normed, total, inverse_rms


@_training_norm.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return total.to(out_dtype, copy=True), total, total.new_empty(x.numel() // x.shape[-1])


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, _, _ = inputs
    _, total, inverse_rms = output
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, inverse_rms, weight)
    ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None


@once_differentiable
def _norm_gradients(
    ctx: Any, normed_grad: torch.Tensor | None, total_grad: torch.Tensor | None, _: None
) -> tuple[torch.Tensor | None, ...]:
    total, inverse_rms, weight = ctx.saved_tensors
    if normed_grad is None:
        normed_grad = torch.zeros_like(total)
    residual_grad, x_grad, weight_grad = torch.ops.apt_cpu.training_norm_backward(
        normed_grad, total_grad, total, inverse_rms, weight, ctx.x_dtype
    )
    return x_grad, residual_grad if ctx.has_residual else None, weight_grad, None, None


_training_norm.register_autograd(_norm_gradients, setup_context=_keep_norm)


@torch.library.custom_op("apt_training::gated_silu", mutates_args=())
def _gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.apt_cpu.gated_silu(gate, up)
    return out


@_gated_silu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _keep_gate(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


@once_differentiable
def _gate_gradients(ctx: Any, out_grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate_grad, up_grad = torch.ops.apt_cpu.gated_silu_backward(out_grad, *ctx.saved_tensors)
    return gate_grad, up_grad


_gated_silu.register_autograd(_gate_gradients, setup_context=_keep_gate)


def _cross_entropy_step(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    with_gradient: bool,
) -> None:
    """A `cross_entropy.Step`."""
    step = torch.ops.apt_cpu.cross_entropy_step if _serves(logits) else torch_step
    step(logits, targets, losses, ignore_index, z_loss, with_gradient)


linear_cross_entropy = define("apt::linear_cross_entropy", _cross_entropy_step)
"""On any device, by torch's own ops where there are none of ours."""
