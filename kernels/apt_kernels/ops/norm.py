"""RMSNorm."""

from __future__ import annotations

import torch

from apt_kernels import reference
from apt_kernels.cpu import training as cpu_training
from apt_kernels.ops import backends

# Triton is for NVIDIA's GPUs here: a torch without CUDA does not import it.
if torch.version.cuda is not None:
    from apt_kernels.triton import norm as triton_norm


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, [..., C] -> [..., C]; see `reference.rms_norm`."""
    if backends.is_native(x, weight):
        out: torch.Tensor = torch.ops.apt_cpu.rms_norm(x, weight, eps)
        return out
    if backends.is_triton(x, weight):
        return triton_norm.rms_norm(x, weight, eps)
    if cpu_training.can_norm(x, weight):
        return cpu_training.add_rms_norm(x, None, weight, eps)[0]
    return reference.rms_norm(x, weight, eps)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of x + residual, x + residual), both [T, C]; see `reference.fused_add_rms_norm`."""
    if backends.is_native(x, weight, residual):
        normed, total = torch.ops.apt_cpu.fused_add_rms_norm(x, residual, weight, eps)
        return normed, total
    if backends.is_triton(x, weight, residual):
        return triton_norm.fused_add_rms_norm(x, residual, weight, eps)
    if cpu_training.can_norm(x, weight, residual):
        return cpu_training.add_rms_norm(x, residual, weight, eps)
    return reference.fused_add_rms_norm(x, residual, weight, eps)
