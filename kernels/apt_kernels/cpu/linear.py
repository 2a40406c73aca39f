"""Matrix product with weights packed once into oneDNN's blocked layout.

`F.linear` packs the weight at every call, which halves the speed of a small batch. oneDNN picks the layout for a
batch size; the one for PACK_BATCH serves from 1 row to hundreds within a few per cent of the best, and a row's result
does not depend on how many other rows there are.
"""

from __future__ import annotations

import torch

PACK_BATCH = 32
PACKABLE_DTYPES = (torch.float32, torch.bfloat16)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a packed layout for this weight on this machine."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype in PACKABLE_DTYPES


def pack_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> the same weight in oneDNN's layout, opaque to every other op."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_BATCH)
    return packed


def packed_linear(x: torch.Tensor, packed_weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[T, in] -> [T, out]."""
    if x.shape[0] == 1:
        # oneDNN sums a lone row in another order than a row among others: give it company.
        return _linear(x.expand(2, -1), packed_weight, bias)[:1]
    return _linear(x, packed_weight, bias)


def _linear(x: torch.Tensor, packed_weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "")
    return out
