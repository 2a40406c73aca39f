"""Large matrices made a few rows at a time, so that their float32 intermediates stay small."""

from __future__ import annotations

from collections.abc import Callable

import torch

ROWS_AT_ONCE = 256


def by_rows(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """A matrix of this shape and dtype from a function that gives its values for a range of rows."""
    out = torch.empty(shape, dtype=dtype, device=device)
    for first in range(0, shape[0], ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        out[rows] = values(rows)
    return out
