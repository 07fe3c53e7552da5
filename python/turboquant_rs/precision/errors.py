"""The run-time error signal: how far a layer's output is from that of all its bits, for every level at once.

    ê = ‖y_all − y_b‖ / ‖y_b‖        y_all − y_b = lo · x: the part of the product that b bits leave out

One layer is looked at in a sampled forward, at each number of bits it has on the ladder: that many further
products of one layer, every so many steps. A model of 50 layers, four numbers of bits and one sample in 16
steps pays 4 / (50 · 16), half a percent.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
        number = isinstance(self.max_rel_err, int | float) and not isinstance(self.max_rel_err, bool)
        if not number or not 0 < self.max_rel_err < math.inf:
            raise ValueError(f"Quality(max_rel_err=…) must be a number above 0, got {self.max_rel_err!r}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"Quality(every=…) must be a whole number of steps above 0, got {self.every!r}")


class Errors:
    """What sampled forwards say about the levels of a model, layer after layer."""

    def __init__(self, model: nn.Module, levels: Sequence[dict[str, int]], quality: Quality) -> None:
        found = {name: model.get_submodule(name) for name in levels[0]}
        self._quality, self._steps = quality, 0
        self._lock, self._here = threading.Lock(), _Here()
        self._layers = [
            (layer, tuple(level[name] for level in levels))
            for name, layer in found.items()
            if isinstance(layer, QuantLinear)
        ]
        self._known: dict[int, dict[int, float]] = {}  # of a layer, by position: {bits: ê}
        self.limit: int | None = None
        self._hooks = [
            layer.register_forward_hook(partial(self._listen, position), with_kwargs=True)
            for position, (layer, _) in enumerate(self._layers)
        ]

    def close(self) -> None:
        """Looks at no layer any more."""
        for hook in self._hooks:
            hook.remove()

    def level(self, level: int) -> float:
        """The mean of the layers' errors at a level; 0 before the first sample."""
        known = [errors[self._layers[i][1][level]] for i, errors in list(self._known.items())]
        return sum(known) / max(len(known), 1)

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step; a sampled one listens to the next layer while it lasts, in this thread."""
        with self._lock:
            self._steps += 1
            steps = self._steps
        if not self._layers or steps % self._quality.every:
            yield
            return
        self._here.position = steps // self._quality.every % len(self._layers)
        try:
            yield
        finally:
            self._here.position = None
        with self._lock:
            self.limit = self._last_allowed()

    def _listen(
        self,
        position: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        if not torch.compiler.is_compiling() and self._here.position == position:
            self._hear(position, input_of(args, kwargs).detach())

    @torch.no_grad()
    def _hear(self, position: int, x: Tensor) -> None:
        layer, bits = self._layers[position]
        whole, errors = layer.product(x, layer._stored_bits), {}
        for width in sorted(set(bits)):
            part = layer.product(x, width)
            errors[width] = float((whole - part).float().norm() / part.float().norm().clamp_min(1e-30))
        if not all(map(math.isfinite, errors.values())):
            return  # rows that are not finite say nothing of the others
        with self._lock:
            known = self._known.setdefault(position, {})
            for width, error in errors.items():
                known[width] = error + (1 - RECENT) * (known.get(width, error) - error)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_here")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _here=_Here())

    def _last_allowed(self) -> int:
        levels = len(self._layers[0][1])
        within = (level for level in range(levels) if self.level(level) <= self._quality.max_rel_err)
        return max(within, default=0)


class _Here(threading.local):
    position: int | None = None
