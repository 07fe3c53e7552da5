"""allocate: the bits of each layer under a budget.

Sensitivity + Budget + ties ──► Choices ── rust/core/allocate.rs ──► bits ── swaps ──► Plan
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn

from turboquant_rs.errors import NoLayersMatched
from turboquant_rs.nn.convert import require_module
from turboquant_rs.nn.patterns import summary
from turboquant_rs.nn.speed import time_linear

from .choices import Choices, Cost, nbytes
from .losses import Forward, Loss
from .phased import PhasedPlan, allocate_phases
from .plan import Plan
from .sensitivity import LayerScores, PhasedSensitivity, Sensitivity
from .swaps import swapped
from .variants import at_bits

NANOSECONDS = 1e6  # in a millisecond


@dataclass(frozen=True)
class Budget:
    """What the planned weights may take; exactly one of

    bits: effective bits an element, scales and all counted (4 bits in groups of 64 are 4.25).
    bytes: of all planned weights.
    latency_ms: of one call of each planned layer with `batch` rows of input, by the kernels of this machine.

    Raises `ValueError` unless one is given, and for numbers not above 0.
    """

    bits: float | None = None
    bytes: int | None = None
    latency_ms: float | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if name != "batch" and value is not None}
        if len(given) != 1:
            raise ValueError(f"a budget is one of bits, bytes and latency_ms, got {given or 'none'}")
        for name, value in (*given.items(), ("batch", self.batch)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not isinstance(self.batch, int):
            raise TypeError(f"batch must be a whole number of rows, got {self.batch!r}")


@overload
def allocate(sensitivity: PhasedSensitivity, budget: Budget, **options: Any) -> PhasedPlan: ...
@overload
def allocate(sensitivity: Sensitivity, budget: Budget, **options: Any) -> Plan: ...
def allocate(  # type: ignore[misc]  # the overloads leave keywords to this one
    sensitivity: Sensitivity | PhasedSensitivity,
    budget: Budget,
    *,
    tie: Iterable[str] = (),
    floor: int = 2,
    ceiling: int = 8,
    refine: int = 0,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | Forward | None = None,
    progress: bool = True,
) -> Plan | PhasedPlan:
    """The bits for each layer with the least predicted KL within `budget`.

    sensitivity: what `tq.sensitivity` found. Of intervals: bits for each layer in each interval, and the
        budget is a mean over the forwards of a generation.
    tie: regular expressions over the end of a layer's name (`"q_proj|k_proj|v_proj"`); the layers that match
        within one parent module get the same bits, as fused kernels need it.
    floor, ceiling: bounds of the bits, among the choices that were scored.
    refine: how many swaps to try: one group of layers up, another down, within the budget, kept where the KL
        measured on `batches` with `model` falls (`loss` as in `tq.sensitivity`).
    progress: draw a bar on stderr while refining, if that is a terminal.

    The solution is within 1 % of the optimum, as a rule at it (`rust/core/allocate.rs`).

    Raises `ValueError` for a budget below what the floor costs (stating the feasible range), bounds that
    leave no choice, `refine` without batches and the float model that was scored; `NoLayersMatched` for a
    tie that ties nothing.
    """
    phased = sensitivity if isinstance(sensitivity, PhasedSensitivity) else None
    if phased is not None:
        sensitivity = phased.parts[0]  # layers and costs are the same in all
        if refine:
            raise ValueError("refine measures whole sequences, not intervals; leave it out")
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(f"sensitivity must be a tq.Sensitivity, got {type(sensitivity).__name__}")
    if not isinstance(budget, Budget):
        raise TypeError(f"budget must be a tq.Budget, such as tq.Budget(bits=4.0), got {budget!r}")
    for name, value in (("floor", floor), ("ceiling", ceiling), ("refine", refine)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
    if refine < 0:
        raise ValueError(f"refine must be a number of swaps, 0 or above, got {refine}")
    bits = sensitivity.within(floor, ceiling)
    if not bits:
        raise ValueError(
            f"no choice lies between floor={floor} and ceiling={ceiling}; scored were {sensitivity.choices}"
        )
    if refine and (model is None or batches is None):
        raise ValueError("refine measures KL: give it model= and batches= as well")
    if refine and model is not None:
        _require_float(model, sensitivity)
    groups = _tied(sensitivity, tie)
    cost, limit = _measure(sensitivity, budget)
    choices = Choices.of(sensitivity, bits, groups, cost)
    if limit < choices.least:
        raise ValueError(_infeasible(sensitivity, budget, choices))
    if phased is not None:
        return allocate_phases(phased, bits, groups, cost, limit)
    chosen = choices.solve(limit)
    if refine and model is not None and batches is not None:
        chosen = swapped(sensitivity, choices, chosen, limit, refine, model, batches, loss, progress)
    return Plan(sensitivity, choices.spread(chosen), choices.groups, min(bits), max(bits))


def tie_patterns(ties: Iterable[str]) -> tuple[str, ...]:
    """The argument `tie` as a tuple. Raises `TypeError` for what is no list of expressions."""
    if isinstance(ties, str):
        return (ties,)
    try:
        return tuple(ties)
    except TypeError as error:
        raise TypeError(
            f'tie must be regular expressions, such as ("q_proj|k_proj|v_proj",), got {ties!r}'
        ) from error


def _require_float(model: nn.Module, found: Sensitivity) -> None:
    """Raises `ValueError` where a layer that was scored is not in `model`, or has no float weight there."""
    require_module(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [layer.name for layer in found.layers if "weight" not in _parameters(modules.get(layer.name))]
    if missing:
        raise ValueError(
            f"swaps are measured on the float model that was scored, and {type(model).__name__} has no float "
            f"weight in {summary(missing)}; give refine the model as it was when tq.sensitivity scored it"
        )


def _parameters(module: nn.Module | None) -> Mapping[str, object]:
    return {} if module is None else module._parameters


def _tied(found: Sensitivity, ties: Iterable[str]) -> list[list[int]]:
    """Positions of layers in groups that share their bits: each in the first tie that it matches."""
    names = [layer.name for layer in found.layers]
    owner: dict[int, tuple[object, ...]] = {}
    for number, text in enumerate(tie_patterns(ties)):
        try:
            expression = re.compile(rf"(?:(?P<parent>.*)\.)?(?:{text})")
        except (re.error, TypeError) as error:
            raise ValueError(f"tie {text!r} is no regular expression: {error}") from error
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, layer in enumerate(found.layers):
            if (match := expression.fullmatch(layer.name)) and i not in owner:
                groups.setdefault((number, match["parent"], layer.rows[0]), []).append(i)
        if not any(len(group) > 1 for group in groups.values()):
            matched = summary([names[i] for group in groups.values() for i in group])
            raise NoLayersMatched(
                f"tie {text!r} ties no layers of one parent together; it matches "
                f"{matched or 'none'} of the {len(names)} layers: {summary(names)}"
            )
        owner.update((i, key) for key, group in groups.items() for i in group)
    gathered: dict[object, list[int]] = {}
    for i in range(len(names)):
        gathered.setdefault(owner.get(i, i), []).append(i)
    return list(gathered.values())


def _measure(found: Sensitivity, budget: Budget) -> tuple[Cost, int]:
    """How costs are counted, and how much may be spent."""
    if budget.latency_ms is not None:
        return _latency(found, budget.batch), int(budget.latency_ms * NANOSECONDS)
    if budget.bits is not None:
        return nbytes(found), int(budget.bits * _elements(found) / 8)
    assert budget.bytes is not None
    return nbytes(found), int(budget.bytes)


def _elements(found: Sensitivity) -> int:
    return sum(layer.elements for layer in found.layers)


def _latency(found: Sensitivity, batch: int) -> Cost:
    """Nanoseconds of a call of the kernel, measured once for each shape and number of bits."""
    known: dict[tuple[int, int, int], int] = {}

    def cost(layer: LayerScores, bits: int) -> int:
        key = (layer.rows[1] - layer.rows[0], layer.shape[1], bits)
        if key not in known:
            weight = torch.randn(key[:2], generator=torch.Generator().manual_seed(0))
            seconds, *_ = time_linear(weight, at_bits(found.scheme, bits), (torch.float32,), (batch,))[batch]
            known[key] = round(1e9 * seconds)
        return known[key]

    return cost


def _infeasible(found: Sensitivity, budget: Budget, choices: Choices) -> str:
    """What is wrong with a budget, in its own unit; bounds are rounded so that the lower one is feasible."""
    each, digits, unit = 1.0, 0, "bytes"
    if budget.latency_ms is not None:
        each, digits, unit = 1 / NANOSECONDS, 6, f"ms at {budget.batch} rows"
    elif budget.bits is not None:
        each, digits, unit = 8 / _elements(found), 4, "effective bits an element"
    step = 10.0**digits
    least, most = (math.ceil(step * each * cost) / step for cost in (choices.least, choices.most))
    given = budget.bits or budget.bytes or budget.latency_ms
    return (
        f"a budget of {given:g} {unit} is infeasible: with {choices.bits[0]} to {choices.bits[-1]} bits a "
        f"code the {len(found.layers)} layers take {least:.{digits}f} to {most:.{digits}f}; raise it, or "
        "allow fewer bits (choices= of tq.sensitivity, floor=)"
    )
