"""Which backend serves a tensor, by its device, its dtype and whether a gradient is wanted."""

from __future__ import annotations

import torch

from apt_kernels.cpu import native

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes the C++ ops know."""
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes the Triton kernels compute in."""


def is_native(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the C++ ops serve: plain tensors of a dtype they know, and no gradient wanted.

    Between two steps nothing of Python is in the processor's caches: every question here costs a microsecond or more.
    """
    if not native.is_enabled() or not x.is_cpu or x.dtype not in NATIVE_DTYPES or type(x) is not torch.Tensor:
        return False
    for other in others:
        if other.dtype != x.dtype:
            return False
    return not wants_gradient(x, *others)


def is_triton(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the Triton kernels serve: plain tensors of one dtype they know, on one of NVIDIA's GPUs."""
    if not is_on_gpu(x) or x.dtype not in TRITON_DTYPES or type(x) is not torch.Tensor:
        return False
    return all(other.dtype == x.dtype for other in others)


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether an op's result is differentiated."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_on_gpu(x: torch.Tensor) -> bool:
    """Whether a tensor is on one of NVIDIA's GPUs."""
    return torch.version.cuda is not None and x.is_cuda


def require(ok: bool, name: str, problem: str) -> None:
    """Raise the ValueError of an argument that does not fit, which names it, unless it does."""
    if not ok:
        raise ValueError(f"{name} {problem}")
