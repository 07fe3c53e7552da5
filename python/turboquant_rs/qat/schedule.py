"""PrecisionSchedule: bits that follow the gradients while a model trains.

backward ──► mean g² of each group, averaged over steps ──► score ½ Σ g²·(ŵ_b − w)² ──► allocate ──► layers
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from turboquant_rs.precision import Budget, LayerScores, Plan, Sensitivity, allocate
from turboquant_rs.precision.variants import at_bits

from .layers import Prepared, by_group, by_weight, prepared_layers
from .values import fake_quantize

CHOICES = (2, 3, 4, 5, 6, 8)


class PrecisionSchedule:
    """Re-scores the prepared layers of a model from running gradient statistics, and re-allocates their bits.

        schedule = tq.PrecisionSchedule(model, budget=tq.Budget(bits=4.25), every=100)
        loss.backward(); schedule.step(); optimizer.step(); optimizer.zero_grad()

    budget: of all prepared layers, as in `tq.allocate`. every: steps from one allocation to the next. decay:
    of the running mean of g². choices, tie, floor, ceiling: as in `tq.sensitivity` and `tq.allocate`.

    The score is the second-order loss with the empirical Fisher information, diagonal and constant within a
    group, of the gradients that training has anyway: relative between layers, not in nats. Memory: one f32 a
    group. Where the bits of a layer change, learned scales begin anew in the same Parameter, so that
    optimizers go on. Every process of a distributed training sees the same averaged gradients and decides the
    same.

    Raises `ValueError` for a model without prepared layers, with nested or learned bits, and numbers out of
    range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        budget: Budget,
        every: int,
        decay: float = 0.95,
        choices: Sequence[int] = CHOICES,
        tie: Iterable[str] = (),
        floor: int = 2,
        ceiling: int = 8,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of steps of at least 1, got {every!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        layers = prepared_layers(model)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no prepared layers; prepare it with tq.QAT first")
        for name, layer in layers.items():
            if layer.scheme.is_nested or layer.qat.bits is not None or layer.scheme.levels != "uniform":
                raise ValueError(
                    f"{name}: nested, learned and table bits are not the schedule's to change; prepare with "
                    "a uniform static scheme"
                )
        self._model, self._budget, self._every, self._decay = type(model).__name__, budget, every, decay
        self._choices, self._tie, self._bounds = tuple(sorted(choices)), tuple(tie), (floor, ceiling)
        self._groups = [[(name, layers[name]) for name in names] for names in by_weight(layers)]
        self._power: list[Tensor | None] = [None] * len(self._groups)
        self.steps = 0
        self.plan: Plan | None = None

    @torch.no_grad()
    def step(self) -> Plan | None:
        """Takes note of the gradients of this step; every so many steps allocates, and returns the plan.

        Raises `ValueError` where a weight has no gradient, or one that is not finite.
        """
        for number, group in enumerate(self._groups):
            name, layer = group[0]
            self._power[number] = self._averaged(name, layer, self._power[number])
        self.steps += 1
        if self.steps % self._every:
            return None
        floor, ceiling = self._bounds
        self.plan = allocate(self.scores(), self._budget, tie=self._tie, floor=floor, ceiling=ceiling)
        for group, bits in zip(self._groups, self.plan.widths, strict=True):
            for _, layer in group:
                if layer.scheme.bits != bits:
                    layer.set_scheme(at_bits(layer.scheme, bits))
        return self.plan

    def _averaged(self, name: str, layer: Prepared, before: Tensor | None) -> Tensor:
        """The running mean of g² (n, groups)."""
        gradient = layer.weight.grad
        if gradient is None:
            raise ValueError(
                f"{name}: its weight has no gradient; call step() between backward() and zero_grad()"
            )
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                f"{name}: its gradient is not finite; unscale it, and leave steps out that overflow"
            )
        rows = gradient.t() if layer.transposed else gradient
        power = by_group(rows.float().square(), layer.scheme).mean(-1)
        if before is None:
            return power
        return before.mul_(self._decay).add_(power, alpha=1 - self._decay)

    @torch.no_grad()
    def scores(self) -> Sensitivity:
        """The layers by bits, from the gradients so far. Raises `ValueError` before the first step."""
        start, scheme = time.perf_counter(), self._groups[0][0][1].scheme
        found = []
        for group, power in zip(self._groups, self._power, strict=True):
            if power is None:
                raise ValueError("no gradients have been seen; call step() after backward() first")
            (name, layer), *others = group
            weight = layer.logical.detach().float()
            values = []
            for bits in self._choices:
                error = fake_quantize(weight, at_bits(layer.scheme, bits)) - weight
                values.append(float((0.5 * power * by_group(error.square(), layer.scheme).sum(-1)).sum()))
            shape = (weight.shape[0], weight.shape[1])
            aliases = tuple(other for other, _ in others)
            found.append(LayerScores(name, shape, (0, shape[0]), tuple(values), aliases))
        seconds = time.perf_counter() - start
        return Sensitivity(
            self._model, "fisher", scheme, self._choices, tuple(found), max(self.steps, 1), seconds
        )
