"""GPTQ (arXiv 2210.17323): each input's rounding error is made up for by the inputs that are still to be rounded."""

from __future__ import annotations

import torch

from apt_train.quantize.rounding import Rounder
from apt_train.quantize.settings import GPTQSettings

MAX_DAMPING = 1.0


@torch.no_grad()
def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, rounder: Rounder, settings: GPTQSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] rounded such that outputs, not weights, change little.

    Args:
        weight: layers that read the same input may lie one above the other: rows do not depend on each other.
        hessian: [in, in], the sum of x x^T over the inputs of calibration.
        rounder: what values there are; its group size must divide in.
        settings: how.

    Returns:
        Codes [out, in] as floats, and scales [out, groups], whose products are the values.
    """
    num_inputs = weight.shape[1]
    group_size = rounder.group_size(num_inputs)
    order = torch.arange(num_inputs)
    if settings.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = inverse_factor(hessian[order][:, order], settings.damping)
    rows = weight.detach().float().T[order].contiguous()  # [in, out]: an input's weights lie side by side
    rounding = _Rounding(rows, order // group_size, rounder, is_static=settings.act_order)
    for first in range(0, num_inputs, settings.block):
        block = slice(first, min(first + settings.block, num_inputs))
        errors = _round_block(rows, block, inverse, rounding)
        rows[block.stop :].addmm_(inverse[block, block.stop :].T, errors, alpha=-1)
    codes = torch.empty_like(rounding.codes)
    codes[order] = rounding.codes
    return codes.T.contiguous(), rounding.scales.T.contiguous()


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
    """Codes [in, out] and scales [groups, out], made input by input in the order in which these are rounded."""

    def __init__(self, rows: torch.Tensor, groups: torch.Tensor, rounder: Rounder, *, is_static: bool) -> None:
        """Static: scales are those of the weights as they were; else of the weights when a group is begun."""
        self.codes = torch.empty_like(rows)
        self._group_size = rounder.group_size(len(rows))
        self.scales = torch.empty(len(rows) // self._group_size, rows.shape[1])
        self._groups, self._rounder, self._is_static = groups.tolist(), rounder, is_static
        if is_static:
            for group in range(len(self.scales)):
                self.scales[group] = rounder.scales(rows[groups == group].T)

    def round(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """Values [out] that an input's weights are rounded to."""
        group = self._groups[index]
        if not self._is_static and index % self._group_size == 0:
            self.scales[group] = self._rounder.scales(rows[index : index + self._group_size].T)
        self.codes[index] = self._rounder.codes(rows[index], self.scales[group])
        return self.codes[index] * self.scales[group]


def _round_block(rows: torch.Tensor, block: slice, inverse: torch.Tensor, rounding: _Rounding) -> torch.Tensor:
    """Round the inputs of a block and correct those of it that follow.

    Returns:
        [block, out] errors, each divided by its input's pivot.
    """
    errors = torch.empty(block.stop - block.start, rows.shape[1])
    for index in range(block.start, block.stop):
        error = (rows[index] - rounding.round(rows, index)) / inverse[index, index]
        rows[index : block.stop].addr_(inverse[index, index : block.stop], error, alpha=-1)
        errors[index - block.start] = error
    return errors
