"""What the solver sees: the cost and the score of every choice of bits, for every group of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turboquant_rs import ops

from .sensitivity import LayerScores, Sensitivity
from .variants import at_bits

Cost = Callable[[LayerScores, int], int]
"""What a layer costs at a number of bits, in whole units."""


@dataclass(frozen=True, eq=False)
class Choices:
    """Costs and scores (groups, choices) of groups of layers that share their bits.

    groups: the layers of each group, by position in the sensitivity. bits: the choices, ascending.
    """

    bits: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    costs: NDArray[np.uint64]
    scores: NDArray[np.float64]

    @classmethod
    def of(
        cls, found: Sensitivity, bits: Sequence[int], groups: Iterable[Sequence[int]], cost: Cost
    ) -> Choices:
        """The choices of `bits` for groups of the layers of `found`."""
        columns = [found.choices.index(width) for width in bits]
        members = tuple(tuple(group) for group in groups)
        costs = [[sum(cost(found.layers[i], width) for i in group) for width in bits] for group in members]
        scores = [[sum(found.layers[i].scores[c] for i in group) for c in columns] for group in members]
        shape = (len(members), len(columns))
        whole = np.array(costs, dtype=np.uint64).reshape(shape)
        return cls(tuple(bits), members, whole, np.array(scores, dtype=np.float64).reshape(shape))

    @property
    def least(self) -> int:
        """What the cheapest choices cost together."""
        return int(self.costs.min(axis=1).sum())

    @property
    def most(self) -> int:
        """What the dearest choices cost together."""
        return int(self.costs.max(axis=1).sum())

    def solve(self, budget: int) -> list[int]:
        """The choice of each group with the least sum of scores within `budget` (`rust/core/allocate.rs`)."""
        return ops.cpu.allocate(self.costs.reshape(-1), self.scores.reshape(-1), len(self.bits), budget)

    def ladder(self, budgets: Sequence[int]) -> list[list[int]]:
        """One solution a budget, nested: a larger budget lowers no group."""
        limits = np.array(budgets, dtype=np.uint64)
        flat = ops.cpu.ladder(self.costs.reshape(-1), self.scores.reshape(-1), len(self.bits), limits)
        count = len(self.groups)
        return [flat[count * rung : count * (rung + 1)] for rung in range(len(budgets))]

    def cost(self, chosen: Sequence[int]) -> int:
        """What a solution costs."""
        return int(self.costs[np.arange(len(chosen)), list(chosen)].sum())

    def spread(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """The bits of each layer, in the order of the sensitivity."""
        owner = {i: choice for group, choice in zip(self.groups, chosen, strict=True) for i in group}
        return tuple(self.bits[owner[i]] for i in range(len(owner)))


def nbytes(found: Sensitivity) -> Cost:
    """Bytes of a layer's planes, scales, zero points and table."""
    schemes = {bits: at_bits(found.scheme, bits) for bits in found.choices}
    return lambda layer, bits: schemes[bits].nbytes(layer.rows[1] - layer.rows[0], layer.shape[1], bits)
