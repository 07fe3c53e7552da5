"""RowPrecision: a layer reads few bits of its weight for most rows of x, more for those that need them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from turboquant_rs.ops.cuda.launcher import not_captured

_COUNTING = threading.Lock()


def _zeros(device: torch.device | str) -> Tensor:
    """Two counts, which forwards within and outside of inference mode add to."""
    with torch.inference_mode(False):
        return torch.zeros(2, dtype=torch.int64, device=device)


@dataclass(frozen=True, eq=False)
class RowPrecision:
    """Bits for the rows of x whose size is up to `threshold`, and for those above it.

    The size of a row is √ Σ s_x² over the scales of its groups as int8 activations, see
    `ops.reference.row_sizes`.
    counts: rows multiplied so far on the CPU, and how many of them were refined; i64.
    """

    read_bits: int
    refined_bits: int
    threshold: float
    counts: Tensor = field(default_factory=lambda: _zeros("cpu"))
    # On a GPU: rows that were not refined, and those that were.
    _kinds: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def count(self, rows: int, refined: int | Tensor) -> None:
        """Adds `rows` rows, `refined` of them (or those that it marks) at the higher precision."""
        if torch.compiler.is_compiling():  # within a graph, which keeps the order of its own
            self.counts[0].add_(rows)
            self.counts[1].add_(torch.as_tensor(refined).sum().cpu())
            return
        if isinstance(refined, Tensor) and refined.is_cuda:  # which nobody waits for
            kinds = refined.flatten().long()
            self._kinds_on(refined.device).index_add_(0, kinds, torch.ones_like(kinds))
            return
        count = refined if isinstance(refined, int) else int(refined.sum())
        with _COUNTING:
            counts = self.counts.numpy()
            counts[0] += rows
            counts[1] += count

    @property
    def mean_bits(self) -> float | None:
        """Bits read of a code, averaged over the rows so far; None before the first."""
        rows, refined = self._total().tolist()
        if not rows:
            return None
        return float(self.read_bits + (self.refined_bits - self.read_bits) * refined / rows)

    def _total(self) -> Tensor:
        """The counts of all devices."""
        total = self.counts.clone()
        for kinds in self._kinds.values():
            plain, refined = kinds.tolist()
            total += torch.tensor((plain + refined, refined))
        return total

    def _kinds_on(self, device: torch.device) -> Tensor:
        if device not in self._kinds:
            with _COUNTING, not_captured(device.index):
                self._kinds.setdefault(device, _zeros(device))
        return self._kinds[device]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"counts": self._total(), "_kinds": {}}
