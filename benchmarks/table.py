"""Results as text."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns right-aligned under their heads."""
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A row of a table that is printed as it comes; a negative width aligns to the right."""
    texts = [cell.ljust(width) if width >= 0 else cell.rjust(-width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join(texts).rstrip()
