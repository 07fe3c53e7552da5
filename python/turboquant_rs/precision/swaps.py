"""Swaps on top of a solution: one group of layers up, another down, kept where the measured KL falls."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from turboquant_rs.progress import Progress

from .choices import Choices
from .losses import Forward, Loss, iterate, resolve
from .sensitivity import Sensitivity, at_rest
from .weights import Weights


def swapped(
    found: Sensitivity,
    choices: Choices,
    chosen: Sequence[int],
    limit: int,
    count: int,
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | Forward | None,
    progress: bool,
) -> list[int]:
    """`chosen` after `count` swaps tried, those of the least predicted rise first.

    The outputs of the model for all batches are kept meanwhile.

    Raises ValueError for empty batches.
    """
    judge, best = resolve(loss), list(chosen)
    with (
        torch.no_grad(),
        at_rest(model),
        Progress("swaps", count, stream=None if progress else io.StringIO()) as bar,
    ):
        originals = [(batch, judge.outputs(model, batch)) for batch in iterate(batches)]
        if not originals:
            raise ValueError("batches is empty; give at least one batch to measure KL on")
        weights = Weights(model, found, choices.bits)

        def measure(solution: Sequence[int]) -> float:
            with weights.at(choices.spread(solution)):
                return sum(
                    judge.divergence(output, judge.outputs(model, batch)) for batch, output in originals
                )

        tried: set[tuple[int, ...]] = {tuple(best)}
        least = measure(best)
        for _ in range(count):
            candidate = _next(choices, best, limit, tried)
            if candidate is None:
                break
            tried.add(tuple(candidate))
            value = measure(candidate)
            if value < least:
                best, least = candidate, value
            bar.advance()
    return best


def _next(choices: Choices, chosen: list[int], limit: int, tried: set[tuple[int, ...]]) -> list[int] | None:
    """The swap within the limit, not tried yet, whose predicted score is the least."""
    cost, top = choices.cost(chosen), len(choices.bits) - 1
    scores, costs = choices.scores, choices.costs
    best, found = float("inf"), None
    for up, high in enumerate(chosen):
        if high == top:
            continue
        gain = scores[up, high + 1] - scores[up, high]
        price = int(costs[up, high + 1]) - int(costs[up, high])
        for down, low in enumerate(chosen):
            if down == up or low == 0:
                continue
            rise = gain + scores[down, low - 1] - scores[down, low]
            change = price + int(costs[down, low - 1]) - int(costs[down, low])
            if rise >= best or cost + change > limit:
                continue
            candidate = list(chosen)
            candidate[up], candidate[down] = high + 1, low - 1
            if tuple(candidate) not in tried:
                best, found = rise, candidate
    return found
