"""The policy of run-time precision: signals in, a level out. No model, no clock, no thread.

    pressure p = max( (1 + queue/workers) · t / SLO,  queue / q*,  mem / mem* )
    down       p > 1, and more than chance explains:  at once to the first level predicted to have p ≤ 0.9
               more than 5 % of the requests predicted to be late:  to the first level where 2 % are
    up         p < θ for `dwell` periods, and p ≤ 0.9 and 2 % late predicted one level up:  one level

t is the mean time of a step, recent ones counting more, and (1 + queue/workers) · t what a request that comes
now will have waited when it is served. Everything in the system is in proportion to the time a step takes
(Little, "A proof for the queuing formula L = λW", 1961), so p is predicted to go with
t(ℓ) = c₀ + c₁ · bytes(ℓ), which is learned meanwhile; where a queue is reported, the work that comes over the
work that can be done, ρ, is predicted likewise.

Requests that come at random wait now and then at any load, and that is no reason to move. In heavy traffic
the wait is exponential with mean t · I · ρ / (2 (1 − ρ)) (Kingman, "On queues in heavy traffic", 1962), where
I is the index of dispersion of what comes: 0 evenly, 1 for a Poisson process. That says how many requests a
level makes late, and how much pressure comes about by chance: once in 10,000 periods. More than that, or
ρ > 0.9, is a change of the load.

Why it does not chatter: going up multiplies p by t(ℓ−1)/t(ℓ) ≤ r, the largest such ratio of the ladder. With
θ ≤ 0.9/r the pressure afterwards is below 0.9, a tenth away from going down again; and a level that is taken
up for having 2 % late, and left for 5 %, is not left at the same load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TARGET = 0.9  # the pressure that a move aims at
RECENT = 0.5  # share of the last period in the mean time of a step
LATE, AIM, RARE = 0.05, 0.02, 1e-4  # odds: of a late request that is promised, that is aimed at; of chance


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


class Arrivals:
    """The work that comes: how much, and how unevenly."""

    KEPT, RECENT = 512, 32  # periods that the means are of: counts are noisy, and a change is to be seen soon
    TELLING, SPREAD = 8, 256  # periods before the rate is believed, and the dispersion
    SURPRISE = 4.0  # standard deviations of a recent mean that are a change
    LEAST = 0.1  # variance of a count, at least

    def __init__(self) -> None:
        self._variance = self._counted = 0.0  # of counts about what the rate lets expect; their mean
        self._compared = 0  # periods that these are means of
        self.forget()

    def forget(self) -> None:
        """The load has changed: the rate is learned anew, the dispersion stays."""
        self._came = self._elapsed = 0.0  # steps of work, and milliseconds, a period
        self._surplus = 0.0  # of what came over what was expected, recently
        self._periods = 0

    def learn(self, came: float, elapsed: float) -> None:
        """Takes in a period: steps of work that came, and milliseconds."""
        if self._periods >= self.TELLING:
            surplus = came - self.rate * elapsed
            self._compared += 1
            weight = 1 / min(self._compared, self.KEPT)
            self._variance += weight * (surplus * surplus - self._variance)
            self._counted += weight * (came - self._counted)
            self._surplus += (surplus - self._surplus) / self.RECENT
            variance = max(self._variance, self.LEAST) / (2 * self.RECENT)  # of an exponential mean
            if abs(self._surplus) > self.SURPRISE * math.sqrt(variance):
                self.forget()
        self._periods += 1
        weight = 1 / min(self._periods, self.KEPT)
        self._came += weight * (came - self._came)
        self._elapsed += weight * (elapsed - self._elapsed)

    @property
    def rate(self) -> float:
        """Steps of work a millisecond; 0 before it is known."""
        known = self._periods >= self.TELLING and self._elapsed > 0
        return self._came / self._elapsed if known else 0.0

    @property
    def dispersion(self) -> float:
        """Variance of what comes over its mean: 0 evenly, 1 for a Poisson process; 0 until it is known."""
        known = self._compared >= self.SPREAD and self._counted > 0
        return self._variance / self._counted if known else 0.0


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
        self.latency, self.arrivals = Latency(nbytes), Arrivals()
        self.level = 0
        self.pressure = 0.0
        self._mean = 0.0  # milliseconds of a step at this level
        self._time: float | None = None
        self._queue: float | None = None
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
        bounded = max(waiting / (self.slo.queue or math.inf), (mem or 0.0) / (self.slo.mem or math.inf))
        self.pressure = max((1 + waiting / self.workers) * self._mean / self.slo.p95_ms, bounded)
        late = self._by_chance(self.level, LATE) > 1
        explained = 1.0 if late else max(1.0, self._by_chance(self.level, RARE))
        pressed = self.pressure > explained or bounded > 1
        if pressed or late:
            self._calm = 0
            return self._down(time, limit, self.pressure if pressed else 0.0)
        self._told = ""
        self._calm = self._calm + 1 if self.pressure < self.threshold else 0
        if self.level and self._calm >= self.dwell and self._enough(self.level - 1, self.pressure):
            return self._move(time, "up", self.level - 1)
        return None

    def _measure(self, time: float, latency_ms: float, queue: float | None) -> None:
        self.latency.learn(self.level, latency_ms)
        if self._time is None:
            self._mean = latency_ms
        else:
            self._mean += RECENT * (latency_ms - self._mean)
            if queue is not None and self._queue is not None:  # what was served, and what waits more
                self.arrivals.learn(1 + queue - self._queue, 1e3 * (time - self._time))
        self._time, self._queue = time, queue

    def _load(self, level: int) -> float:
        """ρ: work that comes, over work that could be done at a level; beyond 1 a queue grows without end."""
        return self.arrivals.rate * self.latency(level) / self.workers

    def _by_chance(self, level: int, odds: float) -> float:
        """The pressure that the waits of random arrivals exceed with these odds; 0 where the load is too much
        for the level, or not known, and chance explains nothing."""
        load = self._load(level)
        if not 0 < load <= TARGET:
            return 0.0
        wait = self.arrivals.dispersion * load / (2 * (1 - load) * self.workers)
        return self.latency(level) / self.slo.p95_ms * (1 - math.log(odds) * wait)

    def _enough(self, level: int, pressure: float) -> bool:
        """Whether a level is predicted to bring this pressure of now, and the load, down to the target."""
        most = max(pressure * self.latency.ratio(level, self.level), self._load(level))
        return most <= TARGET and self._by_chance(level, AIM) <= 1

    def _down(self, time: float, limit: int | None, pressure: float) -> Event | None:
        last = len(self.latency) - 1
        levels = range(self.level + 1, last + 1)
        enough = (level for level in levels if self._enough(level, pressure))
        wanted = next(enough, last + 1)  # none is enough: as low as it is allowed
        allowed = min(self.floor, self.floor if limit is None else max(limit, self.level))
        if wanted > allowed and self.level >= allowed:
            if not pressure:
                return None
            kind = "floor" if allowed == self.floor else "quality floor"
            if kind == self._told:
                return None
            self._told = kind
            return Event(time, kind, self.level, self.pressure)
        wanted = min(wanted, allowed)
        if wanted <= self.level:
            return None
        if pressure:
            self.arrivals.forget()
        return self._move(time, "down", wanted)

    def _move(self, time: float, kind: str, level: int) -> Event:
        self._mean *= self.latency.ratio(level, self.level)  # so far spent at the other level
        self.level, self._calm = level, 0
        return Event(time, kind, level, self.pressure)
