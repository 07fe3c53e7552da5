"""The policy of run-time precision, on a virtual clock: no model, no waiting."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_rs.precision.policy import LATE, SLO, TARGET, Arrivals, Event, Latency, Policy

LEVELS = 12
BITS = [8.25 - 0.5 * level for level in range(LEVELS)]  # 8.25 to 2.75
NBYTES = [round(1e6 * bits) for bits in BITS]
FIXED, FULL = 2.0, 10.0  # milliseconds of a step: whatever the bits, and at level 0


def true_time(level: int) -> float:
    return FIXED + (FULL - FIXED) * NBYTES[level] / NBYTES[0]


@dataclass
class Run:
    """What a server of one worker did with requests: latencies, bits and events, by time."""

    latencies: list[tuple[float, float]] = field(default_factory=list)
    levels: list[tuple[float, int]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def violations(self, slo: float) -> int:
        return sum(latency > slo for _, latency in self.latencies)

    def mean_bits(self) -> float:
        """Over time; each level holds until the next."""
        spans = pairwise(self.levels)
        weighted = [(end - start, BITS[level]) for (start, level), (end, _) in spans]
        return sum(span * bits for span, bits in weighted) / sum(span for span, _ in weighted)


def serve(
    arrivals: list[float],
    policy: Policy | None,
    level: Callable[[float], int] = lambda _: 0,
    noise: float = 0.0,
) -> Run:
    """First come, first served, on a virtual clock in ms; without a policy at a level by time."""
    run, now, draw = Run(), 0.0, random.Random(1)
    for number, arrival in enumerate(arrivals):
        now = max(now, arrival)
        waiting = number + 1
        while waiting < len(arrivals) and arrivals[waiting] <= now:
            waiting += 1
        at = policy.level if policy else level(now)
        run.levels.append((now, at))
        cost = true_time(at) * (1 + draw.uniform(-noise, noise))
        now += cost
        run.latencies.append((arrival, now - arrival))
        if policy:
            event = policy.observe(now / 1e3, cost, queue=waiting - number - 1)
            run.events += [event] if event else []
    return run


def trace(rates: list[tuple[float, float]], draw: random.Random | None = None) -> list[float]:
    """Arrivals in ms: (duration in ms, load at level 0) by phase, evenly or exponentially spaced."""
    times, now, end = [], 0.0, 0.0
    for duration, load in rates:
        end += duration
        while now < end:
            times.append(now)
            gap = true_time(0) / load
            now += draw.expovariate(1 / gap) if draw else gap
    return times


BURST = [(20_000.0, 0.4), (20_000.0, 1.2), (20_000.0, 0.4)]  # the load steps up threefold and back
SLO_MS = 40.0


def moves(run: Run) -> list[Event]:
    return [event for event in run.events if event.kind in ("up", "down")]


def clairvoyant(now: float) -> int:
    """Knows the load: the first level that carries it with a tenth to spare."""
    load = 1.2 if 20_000 <= now < 40_000 else 0.4
    return next(level for level in range(LEVELS) if load * true_time(level) / true_time(0) <= TARGET)


def policy(**options: object) -> Policy:
    return Policy(NBYTES, SLO(p95_ms=SLO_MS), **options)


# The burst


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_threefold_load_costs_a_tenth_of_the_violations_of_fixed_bits_at_the_bits_of_a_clairvoyant(
    noise,
):
    arrivals = trace(BURST)
    fixed, adaptive = serve(arrivals, None, noise=noise), serve(arrivals, policy(), noise=noise)
    assert fixed.violations(SLO_MS) > 1000
    assert adaptive.violations(SLO_MS) <= 0.1 * fixed.violations(SLO_MS)
    best = serve(arrivals, None, clairvoyant, noise=noise)
    assert best.violations(SLO_MS) <= 0.01 * fixed.violations(SLO_MS)
    assert abs(adaptive.mean_bits() - best.mean_bits()) <= 0.25


def test_it_settles_within_three_periods_of_the_first_pressure_and_then_stays():
    run = serve(trace(BURST[:2]), policy())
    downs = [event for event in moves(run) if event.kind == "down"]
    assert 1 <= len(moves(run)) <= 2 and downs
    periods = [now for now, _ in run.levels]
    first, last = (sum(now / 1e3 <= event.time for now in periods) for event in (downs[0], downs[-1]))
    assert last - first <= 3


def test_random_arrivals_keep_the_promise_too():
    arrivals = trace(BURST, random.Random(0))
    fixed, adaptive = serve(arrivals, None), serve(arrivals, policy())
    assert adaptive.violations(SLO_MS) <= 0.1 * fixed.violations(SLO_MS)
    served = [latency for _, latency in adaptive.latencies]
    assert sorted(served)[round(0.95 * len(served))] <= SLO_MS


MINUTE = 60_000.0


@pytest.mark.parametrize("load", [0.5, 0.7, 0.9, 1.2])
def test_at_a_constant_load_random_arrivals_move_it_seldom_and_are_as_late_as_is_promised(load):
    """Bits are within one level of the most that would keep the promise throughout."""
    arrivals = trace([(2 * MINUTE, load)], random.Random(3))
    run = serve(arrivals, policy(), noise=0.05)
    late = LATE * len(arrivals)
    assert sum(event.time > MINUTE / 1e3 for event in moves(run)) <= 20  # in the second minute
    assert run.violations(SLO_MS) <= late
    kept = (serve(arrivals, None, lambda _, at=at: at, noise=0.05) for at in range(LEVELS))
    best = next(own for own in kept if own.violations(SLO_MS) <= late)
    assert run.mean_bits() >= best.mean_bits() - 0.5


def test_a_burst_of_random_arrivals_costs_no_more_bits_than_the_promise_asks_for():
    """A clairvoyant that goes by the load alone has more bits, and many times the late requests."""
    arrivals = trace(BURST, random.Random(0))
    run, best = serve(arrivals, policy()), serve(arrivals, None, clairvoyant)
    assert run.violations(SLO_MS) <= LATE * len(arrivals) < best.violations(SLO_MS)
    assert len(moves(run)) <= 24  # down at the first step of the load, and up level by level, twice


def test_after_random_arrivals_an_even_burst_is_met_as_ever():
    """What was learned of chance does not delay it by more than chance explains."""
    calm = trace([(MINUTE, 0.4)], random.Random(0))
    burst = [MINUTE + arrival for arrival in trace(BURST[1:2])]
    own = policy()
    run = serve(calm + burst, own)
    late = sum(arrival >= MINUTE and latency > SLO_MS for arrival, latency in run.latencies)
    assert late <= 30 and own.level > 0


def test_when_the_burst_is_over_full_precision_comes_back_one_level_at_a_time_after_the_dwell():
    run = serve(trace(BURST), policy(dwell=20))
    ups = [event for event in moves(run) if event.kind == "up"]
    assert ups and run.levels[-1][1] == 0
    for before, after in pairwise(ups):
        assert after.level == before.level - 1
        assert sum(before.time < now / 1e3 <= after.time for now, _ in run.levels) >= 20


# No chatter


@given(
    fixed=st.floats(0, 0.9),
    load=st.floats(0.05, 3.0),
    steps=st.lists(st.floats(0.02, 1.0), min_size=1, max_size=15),
    start=st.integers(0, 15),
    noise=st.floats(0, 0.05),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_at_a_constant_load_it_never_comes_down_after_it_went_up(fixed, load, steps, start, noise, seed):
    """Any ladder, any share of time that does not depend on bits, times within ±5 %."""
    nbytes = [1_000_000]
    for step in steps:
        nbytes.append(max(1, round(nbytes[-1] / (1 + step))))
    own, draw = Policy(nbytes, SLO(p95_ms=10), dwell=5), random.Random(seed)
    kinds = []
    for period in range(600):
        at = own.level
        cost = 10 * load * (fixed + (1 - fixed) * nbytes[at] / nbytes[0])
        event = own.observe(period, cost * (1 + draw.uniform(-noise, noise)))
        if event and event.kind in ("up", "down"):
            kinds.append(event.kind)
        if period == 100:  # a ladder climbed by hand: the policy goes on from there
            own.level, kinds = min(start, len(nbytes) - 1), []
    assert kinds == sorted(kinds)  # "down" before "up"


@given(ratio=st.floats(1.01, 4.0))
def test_the_threshold_leaves_room_for_the_largest_step_of_the_ladder(ratio):
    own = Policy([1_000_000, round(1_000_000 / ratio)], SLO(p95_ms=10))
    own.latency.FIXED = 0.0
    own.observe(0.0, 1.0)
    assert own.threshold * own.latency.steepest(1) <= TARGET * (1 + 1e-9)


# Arrivals


def learned(arrivals: list[float]) -> Arrivals:
    """From periods that end with the first arrival after a millisecond."""
    own, start, came = Arrivals(), arrivals[0], 0
    for now in arrivals[1:]:
        came += 1
        if now - start >= 1.0:
            own.learn(came, now - start)
            start, came = now, 0
    return own


@pytest.mark.parametrize("load", [0.3, 0.9])
def test_arrivals_are_told_apart_by_their_dispersion(load):
    even = learned(trace([(MINUTE, load)]))
    poisson = learned(trace([(MINUTE, load)], random.Random(0)))
    assert even.rate == pytest.approx(load / true_time(0), rel=0.01)
    assert poisson.rate == pytest.approx(load / true_time(0), rel=0.15)
    assert even.dispersion < 0.05
    assert poisson.dispersion == pytest.approx(1.0, abs=0.25)


def test_a_change_of_the_load_is_seen_within_the_recent_periods():
    own, draw = Arrivals(), random.Random(0)
    for rate in (1.0, 3.0):
        for _ in range(400):
            own.learn(draw.expovariate(1.0) * rate, 1.0)
        for _ in range(32):
            own.learn(rate, 1.0)
        assert own.rate == pytest.approx(rate, rel=0.2)


def test_without_a_queue_nothing_is_explained_by_chance():
    own = policy()
    for period in range(1000):
        own.observe(period, 10.0)
    assert (own.arrivals.rate, own.arrivals.dispersion) == (0.0, 0.0)
    assert own.observe(1000, 120.0).kind == "down"


# Signals


def test_down_goes_at_once_to_the_first_level_that_is_enough():
    own = policy()
    for period in range(3):
        own.observe(period, 10.0)
        assert own.level == 0
    event = own.observe(3, 10.0, queue=4)  # 5 steps of 10 ms are 1.25 of the promise
    assert event is not None and event.kind == "down" and event.pressure == pytest.approx(1.25)
    assert own.latency.ratio(own.level, 0) * 1.25 <= TARGET < own.latency.ratio(own.level - 1, 0) * 1.25


def test_each_signal_alone_is_enough():
    slo = SLO(p95_ms=100, queue=8, mem=1e9)
    for signals in ({"latency_ms": 101}, {"queue": 9}, {"mem": 1.1e9}):
        own = Policy(NBYTES, slo)
        event = own.observe(0.0, **({"latency_ms": 5} | signals))
        assert event is not None and event.kind == "down", signals


def test_several_workers_share_the_queue():
    one, four = policy(), policy(workers=4)
    for own in (one, four):
        own.observe(0.0, 10.0, queue=6)
    assert one.pressure == pytest.approx(7 * 10 / SLO_MS) and four.pressure == pytest.approx(
        2.5 * 10 / SLO_MS
    )


def test_the_floor_holds_and_is_told_once_an_episode():
    own = policy(floor=3)
    events = [own.observe(period, 400.0) for period in range(10)]
    assert own.level == 3
    assert [event.kind for event in events if event] == ["down", "floor"]
    for period in range(10, 20):
        own.observe(period, 1.0)
    assert own.observe(20, 4000.0).kind == "floor"


def test_errors_of_layers_hold_it_above_the_floor():
    own = policy()
    events = [own.observe(period, 400.0, limit=2) for period in range(10)]
    assert own.level == 2 and [event.kind for event in events if event] == ["down", "quality floor"]
    own.observe(10, 400.0, limit=0)  # worse than the level it is at: it goes no lower, and not up under load
    assert own.level == 2


def test_where_nothing_is_enough_it_goes_to_the_floor_and_says_so():
    own = policy()
    events = [own.observe(period, 10.0, queue=100) for period in range(3)]
    assert own.level == LEVELS - 1 and [event.kind for event in events if event] == ["down", "floor"]


# The latency model


def test_the_latency_model_finds_the_line_and_keeps_it_through_any_time_at_one_level():
    model = Latency(NBYTES)
    for period in range(200):
        model.learn(period % LEVELS, true_time(period % LEVELS))
    assert model(5) == pytest.approx(true_time(5), rel=1e-3)
    for _ in range(100_000):
        model.learn(0, true_time(0))
    assert model(LEVELS - 1) == pytest.approx(true_time(LEVELS - 1), rel=1e-2)


def test_the_latency_model_follows_a_machine_that_gets_slower():
    model = Latency(NBYTES)
    for scale in (1.0, 2.0):
        for period in range(400):
            model.learn(period % LEVELS, scale * true_time(period % LEVELS))
        assert model(0) == pytest.approx(scale * true_time(0), rel=0.05)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"p95_ms": 0}, ValueError), ({"p95_ms": -1}, ValueError), ({"p95_ms": float("nan")}, ValueError),
        ({"p95_ms": "20"}, TypeError), ({"p95_ms": True}, TypeError), ({"p95_ms": 9, "queue": 0}, ValueError),
    ],
)  # fmt: skip
def test_a_promise_is_above_zero(fields, error):
    with pytest.raises(error, match=r"SLO\((p95_ms|queue)=…\) must be"):
        SLO(**fields)
