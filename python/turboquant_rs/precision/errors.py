"""The run-time error signal: how far a layer's output is from that of all its bits, for every level at once.

    ê = ‖y_all − y_b‖ / ‖y_b‖        y_all − y_b = lo · x: the part of the product that b bits leave out

One layer is looked at in a sampled forward, at each number of bits it has on the ladder: that many further
products of one layer, every so many steps. A model of 50 layers, four numbers of bits and one sample in 16
steps pays 4 / (50 · 16), half a percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turboquant_rs.nn import QuantLinear

from .variants import input_of

RECENT = 0.25  # share of the last sample in a mean


@dataclass(frozen=True)
class Quality:
    """The largest mean of the layers' relative errors that a level may have, looked at every `every` steps.

    Raises `ValueError` for numbers not above 0.
    """

    max_rel_err: float
    every: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.max_rel_err < math.inf:
            raise ValueError(f"Quality(max_rel_err=…) must be above 0, got {self.max_rel_err}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"Quality(every=…) must be a whole number of steps above 0, got {self.every!r}")


class Errors:
    """What sampled forwards say about the levels of a model, layer after layer."""

    def __init__(self, model: nn.Module, levels: Sequence[dict[str, int]], quality: Quality) -> None:
        found = {name: model.get_submodule(name) for name in levels[0]}
        self._quality, self._steps = quality, 0
        self._layers = [
            (layer, tuple(level[name] for level in levels))
            for name, layer in found.items()
            if isinstance(layer, QuantLinear)
        ]
        self._known: dict[int, dict[int, float]] = {}  # of a layer, by position: {bits: ê}
        self.limit: int | None = None

    def level(self, level: int) -> float:
        """The mean of the layers' errors at a level; 0 before the first sample."""
        known = [errors[self._layers[i][1][level]] for i, errors in self._known.items()]
        return sum(known) / max(len(known), 1)

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step; a sampled one listens to the next layer while it lasts."""
        self._steps += 1
        if not self._layers or self._steps % self._quality.every:
            yield
            return
        position = self._steps // self._quality.every % len(self._layers)
        layer, bits = self._layers[position]

        @torch.no_grad()
        def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._hear(position, layer, sorted(set(bits)), input_of(args, kwargs).detach())

        with layer.register_forward_hook(listen, with_kwargs=True):
            yield
        self.limit = self._last_allowed()

    def _hear(self, position: int, layer: QuantLinear, widths: Sequence[int], x: Tensor) -> None:
        whole = layer.product(x, layer._stored_bits)
        known = self._known.setdefault(position, {})
        for bits in widths:
            part = layer.product(x, bits)
            error = float((whole - part).float().norm() / part.float().norm().clamp_min(1e-30))
            known[bits] = error + (1 - RECENT) * (known.get(bits, error) - error)

    def _last_allowed(self) -> int:
        levels = len(self._layers[0][1])
        within = (level for level in range(levels) if self.level(level) <= self._quality.max_rel_err)
        return max(within, default=0)
