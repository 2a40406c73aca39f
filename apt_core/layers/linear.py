"""Linear layers after loading: fused with their neighbours, packed for a processor."""

from __future__ import annotations

import torch
from torch import nn

from apt_kernels import ops


class Linear(nn.Linear):
    """A linear layer that is initialised only where it has memory: on the meta device that takes a second a model."""

    def reset_parameters(self) -> None:
        """Initialise as torch does."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """An embedding that is initialised only where it has memory."""

    def reset_parameters(self) -> None:
        """Initialise as torch does."""
        if not self.weight.is_meta:
            super().reset_parameters()


class PackedLinear(nn.Module):
    """A linear layer whose weight lives only in a packed layout of one of the formats; inference only."""

    def __init__(
        self, weight: ops.PackedWeight, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else bias.detach().float()
        self.out_dtype = out_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out], of out_dtype or else x's dtype."""
        return ops.packed_linear(x, self.weight, self.bias, self.out_dtype)

    def extra_repr(self) -> str:
        """Format and shape."""
        return f"{type(self.weight).__name__}, in={self.weight.in_features}, out={self.weight.out_features}"


def fused_linear(parts: list[nn.Linear]) -> nn.Linear:
    """One layer whose output is the outputs of the parts side by side; the parts' inputs must be the same."""
    first = parts[0]
    fused = nn.Linear(first.in_features, sum(p.out_features for p in parts), bias=first.bias is not None, device="meta")
    weight = torch.cat([p.weight.detach() for p in parts])
    fused.weight = nn.Parameter(weight, requires_grad=False)
    if first.bias is not None:
        fused.bias = nn.Parameter(torch.cat([p.bias.detach() for p in parts]), requires_grad=False)
    return fused
