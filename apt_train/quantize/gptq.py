"""GPTQ (arXiv 2210.17323): each input's rounding error is made up for by the inputs that are still to be rounded."""

from __future__ import annotations

import torch

from apt_core.quantization import GroupedWeight
from apt_core.quantization.grouped import ZERO, grouped_weight, symmetric_codes, symmetric_scales
from apt_train.quantize.settings import GPTQSettings

MAX_DAMPING = 1.0


@torch.no_grad()
def quantize_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, group_size: int, settings: GPTQSettings
) -> GroupedWeight:
    """A weight [out, in] in 4 bits such that outputs, not weights, change little.

    Args:
        weight: layers that read the same input may lie one above the other: rows do not depend on each other.
        hessian: [in, in], the sum of x x^T over the inputs of calibration.
        group_size: inputs that share a scale; must divide in.
        settings: how.
    """
    num_inputs = weight.shape[1]
    order = torch.arange(num_inputs)
    if settings.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = inverse_factor(hessian[order][:, order], settings.damping)
    weight = weight.detach().float()[:, order].clone()
    rounding = _Rounding(weight, order // group_size, group_size, is_static=settings.act_order)
    for first in range(0, num_inputs, settings.block):
        block = slice(first, min(first + settings.block, num_inputs))
        errors = _round_block(weight, block, inverse, rounding)
        weight[:, block.stop :] -= errors @ inverse[block, block.stop :]
    codes = torch.empty_like(rounding.codes)
    codes[:, order] = rounding.codes
    return grouped_weight(codes, rounding.scales)


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor [in, in] of the damped Hessian's inverse, in float32; more damping if it takes that."""
    wide = hessian.double()
    mean = wide.diagonal().mean().item() or 1.0
    eye = torch.eye(len(wide), dtype=torch.float64)
    while True:
        factor, fault = torch.linalg.cholesky_ex(wide + damping * mean * eye)
        if not fault or damping >= MAX_DAMPING:
            break
        damping *= 10
    if fault:
        raise ValueError("the Hessian is no sum of squares: are the activations finite?")
    inverse: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return inverse.float()


class _Rounding:
    """Codes and scales, made column by column in the order in which inputs are rounded."""

    def __init__(self, weight: torch.Tensor, groups: torch.Tensor, group_size: int, *, is_static: bool) -> None:
        """Static: scales are those of the weights as they were; else of the weights when a group is begun."""
        self.codes = torch.empty_like(weight, dtype=torch.uint8)
        self.scales = torch.empty(len(weight), weight.shape[1] // group_size)
        self._groups, self._group_size, self._is_static = groups.tolist(), group_size, is_static
        if is_static:
            for group in range(self.scales.shape[1]):
                self.scales[:, group] = symmetric_scales(weight[:, groups == group])

    def round(self, weight: torch.Tensor, column: int) -> torch.Tensor:
        """Values [out] that a column of weights is rounded to."""
        group = self._groups[column]
        if not self._is_static and column % self._group_size == 0:
            self.scales[:, group] = symmetric_scales(weight[:, column : column + self._group_size])
        scales = self.scales[:, group]
        codes = symmetric_codes(weight[:, column], scales)
        self.codes[:, column] = codes.to(torch.uint8)
        return (codes - ZERO) * scales


def _round_block(weight: torch.Tensor, block: slice, inverse: torch.Tensor, rounding: _Rounding) -> torch.Tensor:
    """Round the columns of a block and correct those of it that follow.

    Returns:
        [out, block] errors, each divided by its column's pivot.
    """
    errors = torch.empty(len(weight), block.stop - block.start)
    for column in range(block.start, block.stop):
        error = (weight[:, column] - rounding.round(weight, column)) / inverse[column, column]
        weight[:, column : block.stop] -= torch.outer(error, inverse[column, column : block.stop])
        errors[:, column - block.start] = error
    return errors
