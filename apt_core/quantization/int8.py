"""int8: symmetric, one scale per output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from apt_core.quantization.rows import by_rows
from apt_kernels.reference import dequantize_int8

LARGEST = 127


@dataclass(frozen=True)
class Int8Tensor:
    """value = scale * int8."""

    values: torch.Tensor
    """[out, in] int8."""
    scales: torch.Tensor
    """[out] float32."""
    has_int8_inputs: bool = False
    """Whether the checkpoint was made for inputs in int8 as well, one scale a row. A GPU then does so; a processor
    always does, in finer groups."""
    input_scale: float | None = None
    """The scale of every row of these; None gives each row its own."""

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.values.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See StoredWeight."""
        return by_rows(
            self.shape,
            dtype,
            self.values.device,
            lambda rows: dequantize_int8(self.values[rows], self.scales[rows]),
        )

    def narrow(self, dim: int, start: int, length: int) -> Int8Tensor:
        """See StoredWeight; a row's scale is that of every part of it."""
        scales = self.scales.narrow(0, start, length) if dim == 0 else self.scales
        return replace(self, values=self.values.narrow(dim, start, length).clone(), scales=scales)

    def kernel_form(self) -> Int8Tensor:
        """See StoredWeight."""
        return self


def quantize_int8(weight: torch.Tensor) -> Int8Tensor:
    """A float weight [out, in], each output's largest magnitude at 127."""
    wide = weight.detach().float()
    scales = wide.abs().amax(1) / LARGEST
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
    values = (wide * inverse.unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Int8Tensor(values, scales)
