"""PrecisionController: reads fewer bits while the load asks for it, more when it is gone.

with ctl.step(queue=…): model(x) ─► time, queue ─► Policy (policy.py) ─► level ─► Switch (nn/switch.py)
                           └─ now and then ─► Errors (errors.py) ─► last level ┘
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

from turboquant_rs.nn.convert import require_module
from turboquant_rs.nn.precision import switchable

from .errors import Errors, Quality
from .history import History, Settings
from .plan import Plan
from .policy import SLO, Event

if TYPE_CHECKING:
    from typing_extensions import Self

EVENTS = 4096  # kept, the last ones


class PrecisionController:
    """Moves a model along a ladder of plans so that a latency promise holds with as many bits as it allows.

    model: quantized with `nested=True` by a plan of the ladder.
    ladder: plans from the most bits (level 0) to the fewest, as `plan.ladder()` gives them.
    slo: what is promised. floor_bits: no plan of fewer effective bits is read.
    quality: a bound on the layers' errors, sampled in steps; None: not looked at.
    dwell: steps of low pressure before one level is taken up. workers: steps that run at the same time.
    clock: seconds that never go back.

    Each forward of the model reads one plan from its first layer to its last, in every thread; switching
    stores one integer. Use it as a context manager, or `close()` it, to let the model go.

    Raises `ValueError` for a ladder that does not fall, a plan made for another model, a model that cannot be
    read at the bits of the ladder (not packed nested), one that has a controller, follows a `PhasedPlan` or
    is refined (`tq.refine`), and a floor above the ladder; the model is as it was then.
    """

    def __init__(
        self,
        model: nn.Module,
        ladder: Sequence[Plan],
        *,
        slo: SLO,
        floor_bits: float = 3,
        quality: Quality | None = None,
        dwell: int = 20,
        workers: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        require_module(model)
        plans = _checked(ladder)
        if not isinstance(slo, SLO):
            raise TypeError(f"slo must be a tq.SLO, such as tq.SLO(p95_ms=20), got {slo!r}")
        if quality is not None and not isinstance(quality, Quality):
            raise TypeError(f"quality must be a tq.Quality, such as tq.Quality(0.05), got {quality!r}")
        if not callable(clock):
            raise TypeError(f"clock must be a function that gives seconds, got {clock!r}")
        if isinstance(floor_bits, bool) or not isinstance(floor_bits, int | float):
            raise TypeError(f"floor_bits must be a number of bits, got {floor_bits!r}")
        for name, value in (("dwell", dwell), ("workers", workers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}")
        plans[0].require(model)
        bits = tuple(plan.effective_bits for plan in plans)
        allowed = [level for level, width in enumerate(bits) if width >= floor_bits]
        if not allowed:
            raise ValueError(f"floor_bits={floor_bits} is above the ladder, which begins at {bits[0]:.2f}")
        levels = [plan.by_name for plan in plans]
        nbytes = tuple(plan.nbytes for plan in plans)
        self.ladder = plans
        self.history = History(Settings(nbytes, bits, slo, allowed[-1], dwell, workers))
        self._events: list[Event] = []
        self._policy = self.history.settings.policy()
        self._clock, self._last = clock, -math.inf
        self._lock = threading.Lock()
        self._switch = switchable(model, levels)
        self._errors = Errors(model, levels, quality) if quality else None

    @property
    def level(self) -> int:
        """The level that forwards read which begin from now on. Setting it switches by hand; the policy goes
        on from there."""
        return self._switch.level

    @level.setter
    def level(self, level: int) -> None:
        self._switch.level = level
        self._policy.level = level

    @property
    def plan(self) -> Plan:
        """The plan of that level."""
        return self.ladder[self.level]

    @property
    def pressure(self) -> float:
        """That of the last step: above 1 the promise does not hold."""
        return self._policy.pressure

    @property
    def events(self) -> list[Event]:
        """What happened, the last 4,096 of it."""
        return list(self._events)

    def relative_error(self, level: int) -> float:
        """The mean of the layers' errors at a level, as sampled so far.

        Raises `ValueError` without `quality`, and for a level that does not exist.
        """
        if not 0 <= level < len(self.ladder):
            raise ValueError(f"there is no level {level}; there are 0 to {len(self.ladder) - 1}")
        if self._errors is None:
            raise ValueError("no errors are sampled; give the controller quality=tq.Quality(max_rel_err=…)")
        return self._errors.level(level)

    @contextmanager
    def step(self, queue: float | None = None, mem: float | None = None) -> Iterator[None]:
        """Times the block as one step and then decides.

        queue: steps of work that wait as the block begins. mem: memory in use, in the unit of `SLO(mem=…)`.

        An exception in the block passes, and the step is not counted. Raises as `observe` does, for `queue`
        and `mem` before the block begins.
        """
        self._check(queue=queue, mem=mem)
        with self._errors.step() if self._errors else nullcontext():
            start = self._clock()
            yield
            milliseconds = 1e3 * (self._clock() - start)
        self.observe(latency_ms=milliseconds, queue=queue, mem=mem)

    def observe(self, *, latency_ms: float, queue: float | None = None, mem: float | None = None) -> int:
        """Takes in a step that has just ended and was timed elsewhere; the level from now on.

        Raises `ValueError`, and nothing is taken in, for a number below 0 or not finite, for `mem` without a
        bound in the SLO, and where the clock went back.
        """
        self._check(latency_ms=latency_ms, queue=queue, mem=mem)
        with self._lock:
            now = self._clock()
            if now < self._last:
                raise ValueError(
                    f"the clock went back from {self._last} to {now}; use one that does not, such as "
                    "time.perf_counter"
                )
            limit = self._errors.limit if self._errors else None
            event = self._policy.observe(now, latency_ms, queue, mem, limit)
            self._last = now
            level = self._switch.level = self._policy.level
            self.history.append((now, latency_ms, queue, mem, limit, level))
            if event is not None:
                self._events = [*self._events[1 - EVENTS :], event]
        return level

    def _check(self, **numbers: float | None) -> None:
        for name, value in numbers.items():
            if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
                hint = "; does the clock go back? use time.perf_counter" if name == "latency_ms" else ""
                raise ValueError(f"{name} must be a finite number, 0 or above, got {value!r}{hint}")
        if numbers.get("mem") is not None and self.history.settings.slo.mem is None:
            raise ValueError("mem says nothing without a bound; give the controller slo=tq.SLO(…, mem=…)")

    def close(self) -> None:
        """Lets the model go: its layers keep the bits of the level that holds."""
        self._switch.remove()
        if self._errors is not None:
            self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked(ladder: Sequence[Plan]) -> tuple[Plan, ...]:
    """The plans of a ladder, nested and falling."""
    try:
        plans = tuple(ladder)
    except TypeError:
        plans = ()
    if len(plans) < 2 or not all(isinstance(plan, Plan) for plan in plans):
        raise TypeError(f"ladder must be two plans or more, as plan.ladder() gives them, got {ladder!r:.80}")
    for number, (above, below) in enumerate(pairwise(plans), 1):
        if list(above.bits) != list(below.bits):
            raise ValueError(f"level {number} of the ladder is a plan for other layers; use plan.ladder()")
        rising = [name for name, bits in below.bits.items() if bits > above.bits[name]]
        if rising or below.nbytes >= above.nbytes:
            what = f"{rising[0]} has more bits" if rising else "nothing has fewer bits"
            raise ValueError(
                f"a ladder falls: at level {number} {what} than at level {number - 1}; use plan.ladder()"
            )
    return plans
