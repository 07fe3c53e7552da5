"""PhasedPlan: a plan for each time interval, out of one budget for all of them.

    min Σ_k Σ_l score_lk(b_lk)     with    Σ_k f_k Σ_l bytes_l(b_lk)  ≤  budget · Σ_k f_k

f_k is how many forwards of a generation fall into interval k. One knapsack over layers × intervals, so that
bits go where the KL falls most for the bytes that are read: prefill is a single forward, and nearly free.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from turboquant_rs.nn.precision import switchable
from turboquant_rs.scheme import Scheme

from . import picture
from .choices import Choices, Cost
from .phases import Phases, Position
from .plan import Plan
from .record import Record, reading, record_of
from .sensitivity import PhasedSensitivity

KIND, VERSION = "turboquant_rs phased plan", 1

MOST_FORWARDS = 2**63 - 1
"""Forwards that a record counts, at most: means over more are no floats."""


@dataclass(frozen=True, repr=False)
class PhasedPlan:
    """What `tq.allocate` returns for intervals; `tq.quantize_` packs once and switches by position.

    plans: one an interval of `phases`. forwards: how many of a generation fall into each.
    """

    phases: Phases
    plans: tuple[Plan, ...]
    forwards: tuple[int, ...]

    @property
    def bits(self) -> dict[str, dict[str, int]]:
        """{interval: {layer: bits}}"""
        return {name: plan.bits for name, plan in zip(self.phases.names, self.plans, strict=True)}

    @property
    def nbytes(self) -> float:
        """Bytes of the planned weights that a forward reads, mean over a generation."""
        return self._mean([plan.nbytes for plan in self.plans])

    @property
    def effective_bits(self) -> float:
        """Bits an element that a forward reads, mean over a generation."""
        return self._mean([plan.effective_bits for plan in self.plans])

    @property
    def predicted_kl(self) -> float:
        """KL a generated token to expect, in nats."""
        return sum(plan.predicted_kl for plan in self.plans)

    def _mean(self, values: Sequence[float]) -> float:
        pairs = zip(values, self.forwards, strict=True)
        return sum(value * count for value, count in pairs) / sum(self.forwards)

    def __repr__(self) -> str:
        parts = "\n".join(
            f"{name} ({count} of {sum(self.forwards)} forwards): {plan!r}"
            for name, plan, count in zip(self.phases.names, self.plans, self.forwards, strict=True)
        )
        return f"{self.effective_bits:.3f} bits a forward, predicted KL {self.predicted_kl:.3g}\n{parts}"

    def prescribe(self, model: nn.Module, nested: bool) -> tuple[dict[str, Scheme], dict[str, int]]:
        """As `Plan.prescribe`; always nested, as its layers are read at several bits."""
        return self.plans[0].prescribe(model, nested=True)

    def follow(self, model: nn.Module) -> None:
        """From now on each forward of the packed `model` reads the plan of the interval that it is in."""
        switchable(model, [plan.by_name for plan in self.plans], Position(self.phases))

    def plot(self, path: str | Path) -> None:
        """Writes a picture of the bits, layer by layer, an interval beside the other, as PNG.

        Raises BackendUnavailable without matplotlib, OSError where `path` cannot be written.
        """
        picture.draw_plans(self.plans, self.phases.names, path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "kind": KIND,
            "version": VERSION,
            "prefill": self.phases.prefill,
            "decode": list(self.phases.decode),
            "prompt": self.phases.prompt,
            "forwards": list(self.forwards),
            "plans": [plan.to_dict() for plan in self.plans],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PhasedPlan:
        """What `to_json` wrote. Raises QuantizationFormatError for anything else."""
        record = Record(record_of(text, KIND, VERSION))
        with reading("PhasedPlan"):
            decode = (bound.value for bound in record["decode"].each())
            phases = Phases(record["prefill"].value, tuple(decode), record["prompt"].value)
            plans = tuple(Plan.read(plan) for plan in record["plans"].each())
            forwards = tuple(count.whole(0, MOST_FORWARDS) for count in record["forwards"].each())
            if not len(phases.names) == len(plans) == len(forwards):
                raise ValueError(
                    f"{len(phases.names)} intervals, {len(plans)} plans, forwards of {len(forwards)}"
                )
            if not sum(forwards):
                raise ValueError(f"{record['forwards'].name} are none")
            _require_alike(plans)
            return cls(phases, plans, forwards)


def _require_alike(plans: Sequence[Plan]) -> None:
    """Refuses plans of other layers, or another scheme, than the first one's."""
    first = plans[0]
    for at, plan in enumerate(plans):
        if plan.bits.keys() != first.bits.keys() or plan.scheme != first.scheme:
            raise ValueError(f"plans[{at}] is one of other layers or another scheme than plans[0]")


def allocate_phases(
    found: PhasedSensitivity, bits: Sequence[int], groups: Sequence[Sequence[int]], cost: Cost, limit: int
) -> PhasedPlan:
    """The plans with the least sum of scores within a mean cost of `limit` a forward."""
    parts = [Choices.of(part, bits, groups, cost) for part in found.parts]
    weighted = [part.costs * np.uint64(count) for part, count in zip(parts, found.forwards, strict=True)]
    size = len(parts[0].groups)
    joint = Choices(
        parts[0].bits,
        tuple((i,) for i in range(size * len(parts))),
        np.concatenate(weighted),
        np.concatenate([part.scores for part in parts]),
    )
    chosen = joint.solve(limit * sum(found.forwards))
    plans = []
    for k, (part, choices) in enumerate(zip(found.parts, parts, strict=True)):
        widths = choices.spread(chosen[size * k : size * (k + 1)])
        plans.append(Plan(part, widths, choices.groups, min(bits), max(bits)))
    return PhasedPlan(found.phases, tuple(plans), found.forwards)
