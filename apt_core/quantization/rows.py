"""Parts of large matrices: made a few rows at a time, so that float32 intermediates stay small, or cut at groups."""

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


def narrow_groups(x: torch.Tensor, dim: int, size: int, start: int, length: int) -> torch.Tensor:
    """What belongs to the elements [start, start + length) of a dimension, of which groups of ``size`` share an entry.

    A single entry belongs to all of them. The last group may be cut off.

    Raises:
        ValueError: a group would be cut.
    """
    if x.shape[dim] == 1:
        return x
    first, end = start // size, min(-(-(start + length) // size), x.shape[dim])
    ends_within = (start + length) % size != 0 and end < x.shape[dim]
    if start % size != 0 or ends_within:
        raise ValueError(f"a group of {size} that share a scale would be cut")
    return x.narrow(dim, first, end - first)
