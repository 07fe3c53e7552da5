"""The policy of run-time precision: signals in, a level out. No model, no clock, no thread.

    pressure p = max( (1 + queue/workers) · t / SLO,  queue / q*,  mem / mem* )
    down       p > 1:  at once to the first level that is predicted to have p ≤ 0.9
    up         p < θ for `dwell` periods, and p ≤ 0.9 predicted one level up:  one level

t is the mean time of a step, recent ones counting more, and (1 + queue/workers) · t what a request that comes
now will have waited when it is served. Everything in the system is in proportion to the time a step takes
(Little, "A proof for the queuing formula L = λW", 1961), so p is predicted to go with
t(ℓ) = c₀ + c₁ · bytes(ℓ), which is learned meanwhile; where a queue is reported, the work that comes over the
work that can be done is predicted likewise.

Why it does not chatter: going up multiplies p by t(ℓ−1)/t(ℓ) ≤ r, the largest such ratio of the ladder. With
θ ≤ 0.9/r the pressure afterwards is below 0.9, a tenth away from going down again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TARGET = 0.9  # the pressure that a move aims at
RECENT = 0.5  # share of the last period in the mean time of a step
COUNTED = 32  # periods that the load is a mean of, at most: it goes by counts, which are noisy
TELLING = 8  # periods before it is believed


@dataclass(frozen=True)
class SLO:
    """What is promised.

    p95_ms: milliseconds that 95 % of the steps, or where a queue is reported of the requests, may take.
    queue: steps of work that may wait. mem: what `mem` may reach, in its unit. None: not looked at.

    Raises `ValueError` for numbers not above 0.
    """

    p95_ms: float
    queue: float | None = None
    mem: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None and name != "p95_ms":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"SLO({name}=…) must be a number, got {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"SLO({name}=…) must be above 0, got {value}")


@dataclass(frozen=True)
class Event:
    """Something worth telling: "down", "up", "floor" or "quality floor", and the level from then on.

    The floors say that the pressure asks for fewer bits than floor_bits, or the errors of layers, allow.
    """

    time: float
    kind: str
    level: int
    pressure: float


class Latency:
    """t(ℓ) = c₀ + c₁ · bytes(ℓ) by recursive least squares that forget.

    Only what a new time says something about is forgotten (Cao and Schwartz, "A directional forgetting
    algorithm based on the decomposition of the information matrix", 2000), so that what was learned of c₁
    outlives any time spent at one level.
    """

    FORGET = 0.98
    FIXED = 0.25  # share of the first time that is taken for c₀ until a second level is known
    TRUST = 1e-2  # in this first guess, in observations

    def __init__(self, nbytes: Sequence[int]) -> None:
        self._x = [size / nbytes[0] for size in nbytes]
        self._c: tuple[float, float] | None = None
        self._information = (self.TRUST, 0.0, self.TRUST)  # a symmetric matrix: 00, 01, 11

    def __len__(self) -> int:
        return len(self._x)

    def learn(self, level: int, milliseconds: float) -> None:
        """Takes in one time at a level."""
        x = self._x[level]
        if self._c is None:
            self._c = (self.FIXED * milliseconds, (1 - self.FIXED) * milliseconds / x)
        a, b, d = self._information
        u, v = a + b * x, b + d * x  # the information about (1, x)
        lost = (1 - self.FORGET) / (u + v * x)
        a, b, d = a - lost * u * u + 1, b - lost * u * v + x, d - lost * v * v + x * x
        self._information = (a, b, d)
        error = milliseconds - (self._c[0] + self._c[1] * x)
        gain = error / (a * d - b * b)
        self._c = (self._c[0] + gain * (d - b * x), self._c[1] + gain * (a * x - b))

    def __call__(self, level: int) -> float:
        """Milliseconds of a step at a level. Neither c₀ nor c₁ is taken below 0: fewer bytes take no longer,
        and no less than in proportion."""
        if self._c is None:
            return 1.0
        fixed, slope = max(self._c[0], 0.0), max(self._c[1], 0.0)
        return max(fixed + slope * self._x[level], 1e-9)

    def ratio(self, to: int, level: int) -> float:
        """t(to) / t(level)."""
        return self(to) / self(level)

    def steepest(self, last: int) -> float:
        """The largest t(ℓ−1)/t(ℓ) of the levels up to `last`."""
        return max((self.ratio(level - 1, level) for level in range(1, last + 1)), default=1.0)


class Policy:
    """Which level to read, period by period (a period is a step); deterministic in what it is told.

    nbytes: of each level, from the highest precision (level 0) down. floor: the last level to be used.
    dwell: periods of low pressure before a level is taken up. workers: steps that run at the same time.
    """

    def __init__(
        self, nbytes: Sequence[int], slo: SLO, *, floor: int | None = None, dwell: int = 20, workers: int = 1
    ) -> None:
        self.slo, self.dwell, self.workers = slo, dwell, workers
        self.floor = len(nbytes) - 1 if floor is None else floor
        self.latency = Latency(nbytes)
        self.level = 0
        self.pressure = 0.0
        self._mean = 0.0  # milliseconds of a step at this level
        self._time: float | None = None
        self._queue: float | None = None
        self._arrived = self._elapsed = 0.0  # steps of work, and milliseconds, a period
        self._periods = 0  # these are means of, at most COUNTED
        self._calm = 0
        self._told = ""

    @property
    def threshold(self) -> float:
        """θ: below this pressure a period counts as calm."""
        return TARGET / self.latency.steepest(self.floor)

    def observe(
        self,
        time: float,
        latency_ms: float,
        queue: float | None = None,
        mem: float | None = None,
        limit: int | None = None,
    ) -> Event | None:
        """Takes in a step that ended at `time` (seconds) and moves `level`; gives what there is to tell.

        queue: steps of work that wait. mem: memory in use. limit: the last level that the errors of layers
        allow now.
        """
        self._measure(time, latency_ms, queue)
        waiting = queue or 0.0
        self.pressure = max(
            (1 + waiting / self.workers) * self._mean / self.slo.p95_ms,
            waiting / (self.slo.queue or math.inf),
            (mem or 0.0) / (self.slo.mem or math.inf),
        )
        if self.pressure > 1:
            self._calm = 0
            return self._down(time, limit)
        self._told = ""
        self._calm = self._calm + 1 if self.pressure < self.threshold else 0
        if self.level and self._calm >= self.dwell and self._predicted(self.level - 1) <= TARGET:
            return self._move(time, "up", self.level - 1)
        return None

    def _measure(self, time: float, latency_ms: float, queue: float | None) -> None:
        self.latency.learn(self.level, latency_ms)
        if self._time is None:
            self._mean = latency_ms
        else:
            self._mean += RECENT * (latency_ms - self._mean)
            if queue is not None and self._queue is not None:
                self._periods = min(self._periods + 1, COUNTED)
                came = 1 + queue - self._queue  # what was served, and what waits more
                self._arrived += (came - self._arrived) / self._periods
                self._elapsed += (1e3 * (time - self._time) - self._elapsed) / self._periods
        self._time, self._queue = time, queue

    def _load(self) -> float:
        """Work that comes, over work that could be done at this level: beyond 1 a queue grows without end."""
        if self._periods < TELLING or not self._elapsed:
            return 0.0
        return self._arrived * self.latency(self.level) / (self._elapsed * self.workers)

    def _predicted(self, level: int) -> float:
        """The pressure at another level, or the load there if that is more."""
        return max(self.pressure, self._load()) * self.latency.ratio(level, self.level)

    def _down(self, time: float, limit: int | None) -> Event | None:
        last = len(self.latency) - 1
        levels = range(self.level + 1, last + 1)
        enough = (level for level in levels if self._predicted(level) <= TARGET)
        wanted = next(enough, last + 1)  # none is enough: as low as it is allowed
        allowed = min(self.floor, self.floor if limit is None else max(limit, self.level))
        if wanted > allowed and self.level >= allowed:
            kind = "floor" if allowed == self.floor else "quality floor"
            if kind == self._told:
                return None
            self._told = kind
            return Event(time, kind, self.level, self.pressure)
        wanted = min(wanted, allowed)
        return self._move(time, "down", wanted) if wanted > self.level else None

    def _move(self, time: float, kind: str, level: int) -> Event:
        self._mean *= self.latency.ratio(level, self.level)  # so far spent at the other level
        self.level, self._calm, self._periods = level, 0, 0
        return Event(time, kind, level, self.pressure)
