"""Tensors of any size as blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

__all__ = ["BLOCK_ELEMENTS", "row_blocks"]

BLOCK_ELEMENTS = 1 << 21
"""Elements in memory at a time: small against any tensor that matters, large against every overhead."""


def row_blocks(rows: int, row_shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive runs of rows, about BLOCK_ELEMENTS elements each, at least one row."""
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(row_shape)))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
