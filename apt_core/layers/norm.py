"""RMSNorm."""

from __future__ import annotations

import torch
from torch import nn

from apt_kernels import ops


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) over the last dimension, optionally adding a residual first."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual), both [T, C]."""
        return ops.fused_add_rms_norm(x, residual, self.weight, self.eps)
