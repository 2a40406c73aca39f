"""Group sizes, as configurations state them."""

from __future__ import annotations

from apt_core.document import Document

SMALLEST = 32
"""Every packed product with groups has this size at least; larger ones must be multiples of it."""


def group_size_of(config: Document, key: str) -> int | None:
    """Inputs that share a scale; None for all inputs of an output (-1 in the file).

    Raises:
        CheckpointError: it is missing, or no multiple of the smallest group there is.
    """
    size = config.integer(key, minimum=-1)
    if size == -1:
        return None
    if size <= 0 or size % SMALLEST:
        raise config.error(key, f"{size} is not read; group sizes are multiples of {SMALLEST}, or -1")
    return size
