"""Linear layers after loading: fused with their neighbours, packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from apt_core.quantization import StoredWeight
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


class QuantizedLinear(nn.Module):
    """A linear layer between loading and packing: its weight as the checkpoint stores it; inference only."""

    def __init__(self, parts: Sequence[torch.Tensor | StoredWeight], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.parts = tuple(parts)
        """Weights whose outputs lie side by side; more than one after fusing."""
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]; dequantizes at every call."""
        weights = [part if isinstance(part, torch.Tensor) else part.dequantize() for part in self.parts]
        return F.linear(x, torch.cat([weight.to(x.dtype) for weight in weights]), self.bias)

    def extra_repr(self) -> str:
        """Form and shape of each part."""
        return ", ".join(f"{type(part).__name__}{tuple(part.shape)}" for part in self.parts)


def fused_linear(parts: Sequence[nn.Linear | QuantizedLinear]) -> nn.Linear | QuantizedLinear:
    """One layer whose output is the outputs of the parts side by side; the parts' inputs must be the same.

    Parts on the meta device make one there, without torch.cat, at whose first call on it torch imports for seconds.
    """
    unloaded = [part for part in parts if isinstance(part, Linear) and part.weight.is_meta]
    if len(unloaded) == len(parts):
        first, num_outputs = unloaded[0], sum(part.out_features for part in unloaded)
        return Linear(first.in_features, num_outputs, bias=first.bias is not None, device="meta")
    biases = [part.bias for part in parts if part.bias is not None]
    bias = torch.cat([bias.detach() for bias in biases]) if biases else None
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    if len(linears) < len(parts):
        weights = [[part.weight.detach()] if isinstance(part, nn.Linear) else part.parts for part in parts]
        return QuantizedLinear([weight for each in weights for weight in each], bias)
    weight = torch.cat([linear.weight.detach() for linear in linears])
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        fused.bias = nn.Parameter(bias, requires_grad=False)
    return fused
