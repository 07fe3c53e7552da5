"""PrecisionSchedule: bits that follow the gradients while a model trains.

backward ──► mean g² of each group, averaged over steps ──► score ½ Σ g²·(ŵ_b − w)² ──► allocate ──► layers
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turboquant_rs.errors import QuantizationFormatError
from turboquant_rs.nn.convert import require_module
from turboquant_rs.nn.patterns import summary
from turboquant_rs.precision import Budget, LayerScores, Plan, Sensitivity, allocate
from turboquant_rs.precision.allocate import tie_patterns
from turboquant_rs.precision.sensitivity import CHOICES, checked_choices
from turboquant_rs.precision.variants import at_bits
from turboquant_rs.scheme import Scheme

from .layers import Prepared, by_group, by_weight, prepared_layers, trained_scheme
from .values import fake_quantize


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
    same. A checkpoint holds `schedule.state_dict()` beside those of the model and the optimizer; a run that
    is resumed from it allocates the bits that the first one would have.

    Raises, before the first step, `ValueError` for a model without prepared layers, with nested, table or
    learned bits or with schemes that differ in more than bits, numbers out of range, choices that the scheme
    does not have, a budget that is infeasible (stating the feasible range), and one of time in a distributed
    training, where each process would measure its own; `NoLayersMatched` for a tie that ties nothing;
    `TypeError` for arguments of another kind.
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
        require_module(model)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of steps of at least 1, got {every!r}")
        if isinstance(decay, bool) or not isinstance(decay, int | float):
            raise TypeError(f"decay must be a number, got {decay!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        layers = prepared_layers(model)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no prepared layers; prepare it with tq.QAT first")
        self._groups = [[(name, layers[name]) for name in names] for names in by_weight(layers)]
        self._scheme = _scheme_of(layers)
        self._model, self._budget, self._every, self._decay = type(model).__name__, budget, every, decay
        self._choices, self._tie = checked_choices(choices, self._scheme), tie_patterns(tie)
        self._bounds = (floor, ceiling)
        self._power: list[Tensor] | None = None  # the running means of g², (n, groups) each
        self.steps = 0
        self.plan: Plan | None = None
        if isinstance(budget, Budget) and budget.latency_ms is not None and _processes() > 1:
            raise ValueError(
                f"each of the {_processes()} processes of this training would measure latency_ms by itself, "
                "and decide differently; give a budget of bits or bytes"
            )
        unknown = [(0.0,) * len(self._choices)] * len(self._groups)
        possible = self._allocated(self._sensitivity(unknown, 1, 0.0))  # whatever the scores will be
        _require_uniform(layers, possible.sensitivity.within(floor, ceiling))

    @torch.no_grad()
    def step(self) -> Plan | None:
        """Takes note of the gradients of this step; every so many steps allocates, and returns the plan.

        Raises `ValueError`, and takes note of nothing, where a weight has no gradient, or one that is not
        finite.
        """
        power = [self._averaged(number) for number in range(len(self._groups))]
        plan = None
        if (self.steps + 1) % self._every == 0:
            plan = self._allocated(self._scored(power, self.steps + 1))
        self._power, self.steps = power, self.steps + 1
        if plan is not None:
            self.plan = plan
            for group, bits in zip(self._groups, plan.widths, strict=True):
                _set_bits(group, bits)
        return plan

    def _allocated(self, found: Sensitivity) -> Plan:
        floor, ceiling = self._bounds
        return allocate(found, self._budget, tie=self._tie, floor=floor, ceiling=ceiling)

    def _averaged(self, number: int) -> Tensor:
        """The running mean of g² (n, groups) with the gradient of now."""
        name, layer = self._groups[number][0]
        gradient = layer.weight.grad
        if not layer.weight.requires_grad:
            raise ValueError(
                f"{name}: its weight requires no gradient, by which the schedule goes; call "
                "weight.requires_grad_(), or prepare the model without this layer (skip=)"
            )
        if gradient is None:
            raise ValueError(
                f"{name}: its weight has no gradient; call step() between backward() and zero_grad()"
            )
        rows = gradient.t() if layer.transposed else gradient
        power = by_group(rows.float().square(), layer.scheme).mean(-1)
        if not bool(power.isfinite().all()):
            raise ValueError(
                f"{name}: its gradient is not finite, or too large to be squared; unscale it, and leave out "
                "steps that overflow"
            )
        if self._power is None:
            return power
        before = self._power[number].to(power.device)
        return before.mul(self._decay).add_(power, alpha=1 - self._decay)

    def scores(self) -> Sensitivity:
        """The layers by bits, from the gradients so far. Raises `ValueError` before the first step."""
        if self._power is None:
            raise ValueError("no gradients have been seen; call step() after backward() first")
        return self._scored(self._power, self.steps)

    @torch.no_grad()
    def _scored(self, power: Sequence[Tensor], steps: int) -> Sensitivity:
        """The layers by bits, from running means of g²."""
        start, found = time.perf_counter(), []
        for group, mean in zip(self._groups, power, strict=True):
            _, layer = group[0]
            weight, values = layer.logical.detach().float(), []
            for bits in self._choices:
                with layer.naming():
                    error = fake_quantize(weight, at_bits(layer.scheme, bits)) - weight
                values.append(float((0.5 * mean * by_group(error.square(), layer.scheme).sum(-1)).sum()))
            found.append(tuple(values))
        return self._sensitivity(found, steps, time.perf_counter() - start)

    def _sensitivity(self, scores: Sequence[tuple[float, ...]], steps: int, seconds: float) -> Sensitivity:
        """The layers with these scores, one for each choice of bits."""
        found = []
        for group, values in zip(self._groups, scores, strict=True):
            (name, layer), *others = group
            n, k = layer.logical.shape
            found.append(LayerScores(name, (n, k), (0, n), values, tuple(other for other, _ in others)))
        return Sensitivity(self._model, "fisher", self._scheme, self._choices, tuple(found), steps, seconds)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, the last plan as JSON, and by layer its bits and the running mean of g²."""
        names = [group[0][0] for group in self._groups]
        return {
            "steps": self.steps,
            "bits": {group[0][0]: group[0][1].scheme.bits for group in self._groups},
            "power": {} if self._power is None else dict(zip(names, self._power, strict=True)),
            "plan": None if self.plan is None else self.plan.to_json(indent=None),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there, with the budget and the other arguments that this schedule was made with.

        The bits of the layers come back too. A state dict of the model holds them as well, with the scales
        that were learned at them; layers that have other bits by now begin their scales anew.

        Raises `QuantizationFormatError` for what `state_dict()` did not give, and `ValueError` for a state of
        other layers; nothing is changed then.
        """
        try:
            steps, text = int(state["steps"]), state["plan"]
            bits = {str(name): int(width) for name, width in state["bits"].items()}
            power: dict[str, Tensor] = dict(state["power"])
            shapes = {name: tuple(mean.shape) for name, mean in power.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise QuantizationFormatError(
                f"this is no state of a PrecisionSchedule ({type(error).__name__}: {error}); give what its "
                "state_dict() returned"
            ) from error
        plan = None if text is None else Plan.from_json(text)
        names = [group[0][0] for group in self._groups]
        for held in (bits, power) if power else (bits,):
            if different := sorted(set(held).symmetric_difference(names)):
                raise ValueError(
                    f"the state is that of other layers, {summary(different)} differ; make the schedule for "
                    "the model that was saved, prepared as it was"
                )
        for group in self._groups:
            name, layer = group[0]
            at_bits(layer.scheme, bits[name])
            expected = (layer.logical.shape[0], layer.scheme.groups(layer.logical.shape[1]))
            if power and shapes[name] != expected:
                raise ValueError(
                    f"{name}: the state holds means {shapes[name]}, this layer has groups {expected}; "
                    "prepare the model as the one that was saved"
                )
        self.steps, self.plan = steps, plan
        self._power = [power[name].detach().clone() for name in names] if power else None
        for group in self._groups:
            _set_bits(group, bits[group[0][0]])


def _set_bits(group: Sequence[tuple[str, Prepared]], bits: int) -> None:
    """Gives the layers of one weight that many bits, where they have others."""
    for _, layer in group:
        if layer.scheme.bits != bits:
            layer.set_scheme(at_bits(layer.scheme, bits))


def _scheme_of(layers: Mapping[str, Prepared]) -> Scheme:
    """The scheme of all layers, but for bits. Raises `ValueError` where a schedule cannot change those."""
    first, scheme = next((name, layer.scheme) for name, layer in layers.items())
    for name, layer in layers.items():
        own = layer.scheme
        if own.is_nested or layer.qat.bits is not None or own.levels != "uniform":
            raise ValueError(
                f"{name}: nested, learned and table bits are not the schedule's to change; prepare with "
                "a uniform static scheme"
            )
        if at_bits(own, scheme.bits) != scheme:
            raise ValueError(
                f"{name} is prepared with {own} and {first} with {scheme}, and the schedule changes bits "
                "alone; prepare all layers with schemes that are alike but for bits"
            )
    return scheme


def _require_uniform(layers: Mapping[str, Prepared], choices: Sequence[int]) -> None:
    """Raises `ValueError` where a method brings a table of levels at one of the choices."""
    for name, layer in layers.items():
        for bits in choices:
            if trained_scheme(at_bits(layer.scheme, bits), layer.qat.method).levels != "uniform":
                raise ValueError(
                    f"{name}: method={layer.qat.method!r} has a table of levels at {bits} bits, which is not "
                    f'the schedule\'s to change; use floor={bits + 1}, or prepare with method="lsq"'
                )


def _processes() -> int:
    """How many processes train together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
