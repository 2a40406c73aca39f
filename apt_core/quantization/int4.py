"""4 bits in groups along the inputs: value = scale * code + minimum, as in GGUF's Q4_1."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_core.quantization.rows import by_rows, narrow_groups
from apt_kernels.reference import dequantize_int4

GROUP_SIZE = 32
"""With a float16 scale and minimum each, 5 bits a weight."""
GROUP_SIZES = (128, 64, 32)
"""Groups that the packed products have, the leanest first."""
LARGEST_CODE = 15
SHRINKAGES = (1.0, 0.92)
"""Ranges that are tried, as parts of a group's own: cutting off an outlier can cost less than coarser steps. More of
them leave 2 % less squared error on normally distributed weights and take twice as long."""
ROWS_AT_ONCE = 256
"""Few enough that the search stays in the caches."""


@dataclass(frozen=True)
class Int4Tensor:
    """value = scale * code + minimum, scale and minimum of the code's group."""

    values: torch.Tensor
    """[out, in] uint8 in 0 .. 15."""
    scales: torch.Tensor
    """[out, groups] float16."""
    minima: torch.Tensor
    """[out, groups] float16."""

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.values.shape

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    def with_groups_of(self, size: int) -> Int4Tensor:
        """The same weights in groups of another size, which must divide this one's."""
        repeats = self.group_size // size
        return Int4Tensor(self.values, *(x.repeat_interleave(repeats, 1) for x in (self.scales, self.minima)))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See StoredWeight."""
        return by_rows(
            self.shape,
            dtype,
            self.values.device,
            lambda rows: dequantize_int4(self.values[rows], self.scales[rows], self.minima[rows]),
        )

    def narrow(self, dim: int, start: int, length: int) -> Int4Tensor:
        """See StoredWeight."""
        size = 1 if dim == 0 else self.group_size
        scales, minima = (narrow_groups(x, dim, size, start, length) for x in (self.scales, self.minima))
        return Int4Tensor(self.values.narrow(dim, start, length).clone(), scales, minima)

    def kernel_form(self) -> Int4Tensor:
        """See StoredWeight."""
        return self


def quantize_int4(weight: torch.Tensor, group_size: int = GROUP_SIZE) -> Int4Tensor | None:
    """A float weight [out, in]; None if no whole number of groups fits.

    Each group takes the range, of those in SHRINKAGES, and the fit to its codes that leave the least squared error.
    """
    if weight.shape[1] % group_size != 0:
        return None
    parts = [_quantize_rows(rows.float(), group_size) for rows in weight.detach().split(ROWS_AT_ONCE)]
    return Int4Tensor(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _quantize_rows(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, scales, minima) as in Int4Tensor."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.aminmax(dim=2, keepdim=True)
    best_error = torch.full_like(low, torch.inf)
    scales, minima = torch.zeros_like(low), torch.zeros_like(low)
    for shrinkage in SHRINKAGES:
        scale = (high - low) * (shrinkage / LARGEST_CODE)
        minimum = (high + low) / 2 - scale * (LARGEST_CODE / 2)
        fits = [(scale, minimum), _least_squares(groups, _codes(groups, scale, minimum))]
        for candidate_scale, candidate_minimum in fits:
            scale, minimum = candidate_scale.half().float(), candidate_minimum.half().float()
            difference = _codes(groups, scale, minimum).mul_(scale).add_(minimum).sub_(groups)
            error = difference.square_().sum(2, keepdim=True)
            is_better = error < best_error
            best_error = torch.where(is_better, error, best_error)
            scales, minima = torch.where(is_better, scale, scales), torch.where(is_better, minimum, minima)
    codes = _codes(groups, scales, minima).to(torch.uint8)
    return codes.flatten(1), scales.squeeze(2).half(), minima.squeeze(2).half()


def _codes(groups: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """The nearest codes, as floats; 0 where the scale is 0, as all values then equal the minimum."""
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    return ((groups - minimum) * inverse).round_().clamp_(0, LARGEST_CODE)


def _least_squares(groups: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum with the least squared error for these codes."""
    mean_code, mean = codes.mean(2, keepdim=True), groups.mean(2, keepdim=True)
    centred = codes - mean_code
    variance = centred.square().sum(2, keepdim=True)
    covariance = (centred * (groups - mean)).sum(2, keepdim=True)
    scale = torch.where(variance == 0, torch.zeros_like(variance), covariance / variance)
    return scale, mean - scale * mean_code
