"""Linear layers after loading: fused with their neighbours, packed for a processor."""

from __future__ import annotations

import torch
from torch import nn

from apt_kernels import ops


class PackedLinear(nn.Module):
    """A linear layer whose weight lives only in the backend's packed layout; inference only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed_weight = ops.pack_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        return ops.packed_linear(x, self.packed_weight, self.bias)


def fused_linear(parts: list[nn.Linear]) -> nn.Linear:
    """One layer whose output is the outputs of the parts side by side; the parts' inputs must be the same."""
    first = parts[0]
    fused = nn.Linear(first.in_features, sum(p.out_features for p in parts), bias=first.bias is not None, device="meta")
    weight = torch.cat([p.weight.detach() for p in parts])
    fused.weight = nn.Parameter(weight, requires_grad=False)
    if first.bias is not None:
        fused.bias = nn.Parameter(torch.cat([p.bias.detach() for p in parts]), requires_grad=False)
    return fused
