"""Matrix product with weights packed once, in one of four formats.

`F.linear` packs the weight at every call, which halves the speed of a small batch. bfloat16, int8 and int4 weights are
packed for the C++ ops; float32 ones, and all where these ops are off, into oneDNN's blocked layout. A row's result does
not depend on how many other rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from apt_kernels.cpu import native
from apt_kernels.reference import dequantize_int4, dequantize_int8

PACK_BATCH = 32
"""oneDNN picks the layout for a batch size; this one's serves 1 row to hundreds within a few per cent of the best."""
PACKABLE_DTYPES = (torch.float32, torch.bfloat16)


class PackedWeight(Protocol):
    """A weight [out, in] in a layout of its own."""

    @property
    def out_features(self) -> int:
        """How many outputs it has."""

    @property
    def in_features(self) -> int:
        """How many inputs it has."""

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        """[T, in], float32 or bfloat16 -> [T, out] of out_dtype, the same two; bias [out] is float32.

        On a GPU float16 as well.
        """


@dataclass(frozen=True)
class OneDnnWeight:
    """float32 or bfloat16 in oneDNN's layout, opaque to every other op."""

    data: torch.Tensor
    out_features: int
    in_features: int

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        """See PackedWeight."""
        x = x.to(self.data.dtype)
        bias = None if bias is None else bias.to(self.data.dtype)
        if x.shape[0] == 1:
            # oneDNN sums a lone row in another order than a row among others: give it company.
            return self._linear(x.expand(2, -1), bias)[:1].to(out_dtype)
        return self._linear(x, bias).to(out_dtype)

    def _linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.data, bias, "none", [], "")
        return out


@dataclass(frozen=True)
class PlainWeight:
    """The weight as it is, where there is no packed layout."""

    data: torch.Tensor

    @property
    def out_features(self) -> int:
        """See PackedWeight."""
        return self.data.shape[0]

    @property
    def in_features(self) -> int:
        """See PackedWeight."""
        return self.data.shape[1]

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        """See PackedWeight."""
        bias = None if bias is None else bias.to(self.data.dtype)
        return F.linear(x.to(self.data.dtype), self.data, bias).to(out_dtype)


@dataclass(frozen=True)
class Bf16Weight:
    """bfloat16; x is rounded to it, sums are float32."""

    data: torch.Tensor
    out_features: int
    in_features: int

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        """See PackedWeight."""
        out: torch.Tensor = torch.ops.apt_cpu.linear_bf16(
            x.to(torch.bfloat16), self.data, self.out_features, bias, out_dtype
        )
        return out


@dataclass(frozen=True)
class Int8Weight:
    """int8 with one scale per output; see `reference.int8_linear`."""

    data: torch.Tensor
    scales: torch.Tensor
    out_features: int
    in_features: int

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        """See PackedWeight."""
        out: torch.Tensor = torch.ops.apt_cpu.linear_int8(x, self.data, self.scales, self.out_features, bias, out_dtype)
        return out


@dataclass(frozen=True)
class Int4Weight:
    """4 bits in groups with a scale and a minimum each; see `reference.int4_linear`."""

    data: torch.Tensor
    group_size: int
    out_features: int
    in_features: int

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        """See PackedWeight."""
        out: torch.Tensor = torch.ops.apt_cpu.linear_int4(
            x, self.data, self.group_size, self.out_features, bias, out_dtype
        )
        return out


PACKED_LAYOUT_VERSION = 1
"""Raised whenever packing the same values would give other bytes in one of PORTABLE_FORMATS."""
PORTABLE_FORMATS = (Bf16Weight, Int8Weight, Int4Weight)
"""Formats of the C++ ops: the same bytes for every instruction set. oneDNN's layout is its own affair."""
QUANTIZED_FORMATS = (Int8Weight, Int4Weight)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this weight has a packed layout on this machine."""
    if weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:
        return native.is_enabled() or _onednn_packs(weight.dtype)
    return _onednn_packs(weight.dtype)


def pack(weight: torch.Tensor) -> PackedWeight:
    """A weight [out, in] in its own precision."""
    if weight.dtype == torch.bfloat16 and native.is_enabled():
        return Bf16Weight(torch.ops.apt_cpu.pack_bf16(weight.contiguous()), *weight.shape)
    if _onednn_packs(weight.dtype):
        data = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_BATCH)
        return OneDnnWeight(data, *weight.shape)
    return PlainWeight(weight)


def pack_int8(weight: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
    """int8 [out, in] with float32 scales [out]. Without the C++ ops: what they stand for, in float32."""
    if not native.is_enabled():
        return pack(dequantize_int8(weight, scales))
    return Int8Weight(torch.ops.apt_cpu.pack_int8(weight.contiguous()), scales.contiguous(), *weight.shape)


def pack_int4(weight: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> PackedWeight:
    """uint8 in 0 .. 15 [out, in], scales and minima [out, in / group_size]; without the C++ ops as pack_int8."""
    if not native.is_enabled():
        return pack(dequantize_int4(weight, scales, minima))
    group_size = weight.shape[1] // scales.shape[1]
    factors = (x.to(torch.float16).contiguous() for x in (scales, minima))
    data = torch.ops.apt_cpu.pack_int4(weight.contiguous(), *factors, group_size)
    return Int4Weight(data, group_size, *weight.shape)


def _onednn_packs(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype in PACKABLE_DTYPES
