"""Weights of linear layers in the forms that quantized checkpoints store them in.

Each dequantizes exactly and says what a packed product takes of it. Int8Tensor, Int4Tensor and Float8Weight are stored
weights too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from apt_core.quantization.float8 import Float8Weight
from apt_core.quantization.int4 import GROUP_SIZES, Int4Tensor
from apt_core.quantization.int8 import Int8Tensor
from apt_core.quantization.rows import by_rows, narrow_groups


class StoredWeight(Protocol):
    """A weight [out, in] in fewer bits; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Its values [out, in], computed in float32."""

    def narrow(self, dim: int, start: int, length: int) -> StoredWeight:
        """A copy of some of its outputs (dim 0) or inputs (dim 1); ValueError if that cuts a group of them."""

    def kernel_form(self) -> Int8Tensor | Int4Tensor | Float8Weight | None:
        """The same weight as a packed product takes it; None if there is no such product."""


_Stored = TypeVar("_Stored", bound=StoredWeight)


@dataclass(frozen=True)
class GroupedWeight:
    """value = scale * (code - zero), scale and zero of the input's group."""

    codes: torch.Tensor
    """[out, in] uint8, below 2 ** num_bits."""
    scales: torch.Tensor
    """[out, groups] of any float type."""
    zeros: torch.Tensor
    """[out, groups] uint8."""
    num_bits: int
    """4 or 8."""
    group_index: torch.Tensor | None = None
    """[in], the group of each input; None where groups are runs of as many inputs each."""

    @property
    def shape(self) -> torch.Size:
        """See StoredWeight."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See StoredWeight."""
        index = self.group_index
        if index is None:
            index = torch.arange(self.shape[1], device=self.codes.device) // (self.shape[1] // self.scales.shape[1])
        scales, zeros = self.scales.float(), self.zeros.float()
        return by_rows(
            self.shape,
            dtype,
            self.codes.device,
            lambda rows: self.codes[rows].float().sub_(zeros[rows][:, index]).mul_(scales[rows][:, index]),
        )

    def narrow(self, dim: int, start: int, length: int) -> GroupedWeight:
        """See StoredWeight."""
        codes = self.codes.narrow(dim, start, length).clone()
        index, scales, zeros = self.group_index, self.scales, self.zeros
        if dim == 1 and index is not None:
            index = index.narrow(0, start, length)  # groups lie anywhere: each part keeps the scales of all
        else:
            size = 1 if dim == 0 else self.shape[1] // scales.shape[1]
            scales, zeros = (narrow_groups(x, dim, size, start, length) for x in (scales, zeros))
        return replace(self, codes=codes, scales=scales, zeros=zeros, group_index=index)

    def kernel_form(self) -> Int8Tensor | Int4Tensor | None:
        """int4 for 4 bits, else int8 where a row has one scale; None for groups that no product has.

        The codes stay as they are. int4 rounds scale and scale * zero to float16.
        """
        if self.group_index is not None:
            return None
        return (self._int4() if self.num_bits == 4 else None) or self._int8()

    def _int4(self) -> Int4Tensor | None:
        num_groups = self.scales.shape[1]
        stored_size = self.shape[1] // num_groups
        size = next((size for size in GROUP_SIZES if stored_size % size == 0), None)
        if size is None:
            return None
        scales = self.scales.float()
        scales, minima = (x.half().repeat_interleave(stored_size // size, 1) for x in (scales, -scales * self.zeros))
        return Int4Tensor(self.codes, scales, minima) if bool((scales.isfinite() & minima.isfinite()).all()) else None

    def _int8(self) -> Int8Tensor | None:
        if self.scales.shape[1] != 1:
            return None
        values = self.codes.to(torch.int16) - self.zeros
        if not bool(((values >= -128) & (values <= 127)).all()):
            return None
        return Int8Tensor(values.to(torch.int8), self.scales.float().squeeze(1))


def moved(weight: _Stored, device: torch.device) -> _Stored:
    """The weight with its tensors on the device."""
    tensors = {f.name: value for f in fields(weight) if isinstance(value := getattr(weight, f.name), torch.Tensor)}
    return replace(weight, **{name: tensor.to(device) for name, tensor in tensors.items()})
