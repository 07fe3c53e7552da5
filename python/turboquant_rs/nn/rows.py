"""RowPrecision: a layer reads few bits of its weight for most rows of x, more for those that need them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

_COUNTING = threading.Lock()


@dataclass(frozen=True, eq=False)
class RowPrecision:
    """Bits for the rows of x whose size is up to `threshold`, and for those above it.

    The size of a row is √ Σ s_x² over the scales of its groups as int8 activations, see
    `ops.reference.row_sizes`.
    counts: rows multiplied so far, and how many of them were refined; i64 on the CPU.
    """

    read_bits: int
    refined_bits: int
    threshold: float
    counts: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))

    def count(self, rows: int, refined: int | Tensor) -> None:
        """Adds `rows` rows, `refined` of them (or those that it marks) at the higher precision."""
        if torch.compiler.is_compiling():  # within a graph, which keeps the order of its own
            self.counts[0].add_(rows)
            self.counts[1].add_(torch.as_tensor(refined).sum().cpu())
            return
        count = refined if isinstance(refined, int) else int(refined.sum())
        with _COUNTING:
            counts = self.counts.numpy()
            counts[0] += rows
            counts[1] += count

    @property
    def mean_bits(self) -> float | None:
        """Bits read of a code, averaged over the rows so far; None before the first."""
        rows, refined = self.counts.tolist()
        if not rows:
            return None
        return float(self.read_bits + (self.refined_bits - self.read_bits) * refined / rows)
