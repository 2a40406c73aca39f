"""float8 e4m3: symmetric, with one scale per block of outputs and inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from apt_core.quantization.rows import by_rows, narrow_groups
from apt_kernels import ops

LARGEST = 448.0
"""Of e4m3 (arXiv 2209.05433, table 1)."""


@dataclass(frozen=True)
class Float8Weight:
    """value = scale * float8, one scale per block of outputs and inputs."""

    values: torch.Tensor
    """[out, in] float8."""
    scales: torch.Tensor
    """[row blocks, column blocks] float32."""
    block: tuple[int, int]
    """Outputs and inputs that share a scale; the last blocks may be cut off."""

    @property
    def shape(self) -> torch.Size:
        """See StoredWeight."""
        return self.values.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See StoredWeight."""
        row_blocks, column_blocks = (
            torch.arange(n, device=self.values.device) // size for n, size in zip(self.shape, self.block, strict=True)
        )
        return by_rows(
            self.shape,
            dtype,
            self.values.device,
            lambda rows: self.values[rows].float().mul_(self.scales[row_blocks[rows]][:, column_blocks]),
        )

    def narrow(self, dim: int, start: int, length: int) -> Float8Weight:
        """See StoredWeight."""
        scales = narrow_groups(self.scales, dim, self.block[dim], start, length)
        return replace(self, values=self.values.narrow(dim, start, length).clone(), scales=scales)

    def kernel_form(self) -> Float8Weight | None:
        """On a GPU as it is, if its scales cover whole tiles of inputs; a processor has no product."""
        if not self.values.is_cuda or self.values.dtype != torch.float8_e4m3fn:
            return None
        num_columns = self.scales.shape[1]
        return self if num_columns == 1 or self.block[1] % ops.FLOAT8_BLOCK_IN == 0 else None

    def output_scales(self) -> torch.Tensor | None:
        """[out], if no output has more than one scale."""
        if self.scales.shape[1] > 1:
            return None
        return self.scales.squeeze(1).repeat_interleave(self.block[0])[: len(self.values)]


def quantize_float8(weight: torch.Tensor) -> Float8Weight:
    """A float weight [out, in], each output's largest magnitude at 448."""
    wide = weight.detach().float()
    scales = wide.abs().amax(1, keepdim=True) / LARGEST
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
    values = (wide * inverse).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return Float8Weight(values, scales, (1, weight.shape[1]))
