"""`turboquant-rs demo --adaptive`: a burst of requests against a real model, with fixed bits and controlled.

Requests come whether or not the one before is done (an open loop), three times as many during the burst. Each
asks for some bytes of a language model that was trained a moment ago. The same packed model serves them three
times: read at 8 bits, at 4 bits, and by a `PrecisionController`. Nothing here prints.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turboquant_rs.demo.language import TRAINING_STEPS as STEPS
from turboquant_rs.demo.language import ByteModel, contexts, encoded, generate, train
from turboquant_rs.demo.sentences import SOURCE, library_sentences
from turboquant_rs.nn import precision, quantize_
from turboquant_rs.picture import NO_MATPLOTLIB, can_draw
from turboquant_rs.precision import SLO, Budget, Categorical, Plan, PrecisionController, allocate, sensitivity
from turboquant_rs.progress import Progress
from turboquant_rs.table import table

from .adaptive_picture import draw

CORPUS, EVALUATED = 1024, 512  # sentences to train on, places to measure KL at
CHOICES, LEVELS = (4, 8), 12
BYTES = 12  # that a request asks for
CALM, BURST = 0.4, 1.2  # work that comes, over what 8 bits can do
PROMISE = 5  # times the median request at 8 bits
CONTROLLED = "controlled"


@dataclass(frozen=True)
class Served:
    """One request: seconds it came at, milliseconds until it was done, effective bits it was read at."""

    time: float
    latency_ms: float
    bits: float


@dataclass(frozen=True)
class Contender:
    """How one way to read the model did."""

    name: str
    served: tuple[Served, ...]
    kl: float

    @property
    def p95_ms(self) -> float:
        """The latency that 95 % of the requests keep."""
        return statistics.quantiles([request.latency_ms for request in self.served], n=20)[-1]

    @property
    def mean_bits(self) -> float:
        """Effective bits, mean over the requests."""
        return statistics.fmean(request.bits for request in self.served)

    def violations(self, slo_ms: float) -> int:
        """Requests that took longer than promised."""
        return sum(request.latency_ms > slo_ms for request in self.served)


@dataclass(frozen=True)
class AdaptiveResult:
    """What the demo measured; `str()` is the report for people, `to_dict()` the one for programs."""

    weights: int
    slo_ms: float
    seconds: tuple[float, float, float]
    contenders: tuple[Contender, ...]
    switches: int
    notes: tuple[str, ...]
    picture: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        figures = {
            own.name: {
                "p95_ms": own.p95_ms,
                "violations": own.violations(self.slo_ms),
                "requests": len(own.served),
                "mean_bits": own.mean_bits,
                "kl": own.kl,
            }
            for own in self.contenders
        }
        return asdict(self) | {"figures": figures}

    def __str__(self) -> str:
        calm, burst, _ = self.seconds
        rows = [
            [
                own.name,
                f"{own.p95_ms:.1f} ms",
                f"{own.violations(self.slo_ms) / len(own.served):.1%}",
                f"{own.mean_bits:.2f}",
                f"{own.kl:.5f}",
            ]
            for own in self.contenders
        ]
        lines = [
            f"a language model of {self.weights / 1e6:.0f} million weights, trained on {CORPUS} {SOURCE}",
            f"{len(self.contenders[0].served)} requests of {BYTES} bytes in {sum(self.seconds):g} s, three "
            f"times as many a second from {calm:g} s to {calm + burst:g} s; promised: {self.slo_ms:.0f} ms",
            *self.notes,
            "",
            table(["", "95 % within", "too late", "mean bits", "KL to f32"], rows),
            "",
            self._verdict(),
        ]
        return "\n".join([*lines, *(["", f"picture: {self.picture}"] if self.picture else [])])

    def _verdict(self) -> str:
        """One plain sentence: what control did here."""
        most, least, ours = self.contenders
        late, ours_late = (own.violations(self.slo_ms) for own in (most, ours))
        return (
            f"Control: {ours_late} late requests instead of {late} with {most.name}, at {ours.mean_bits:.2f} "
            f"mean bits instead of {least.mean_bits:.2f} with {least.name}; {self.switches} switches."
        )


def run(picture: Path | None = None, seconds: tuple[float, float, float] = (3, 3, 4)) -> AdaptiveResult:
    """Trains, packs, and serves the same requests three times: calm, burst and calm again, `seconds` each.

    Raises OSError where the picture cannot be written; without matplotlib a note says why there is none.
    """
    if picture and not picture.parent.is_dir():
        raise FileNotFoundError(f"{picture.parent} is no directory; create it before drawing {picture}")
    notes = []
    if picture and not can_draw():
        notes.append(f"No picture was drawn: {NO_MATPLOTLIB}.")
        picture = None
    data = encoded(" ".join(library_sentences(CORPUS)))
    with Progress("train a language model", STEPS) as bar:
        model = train(data, each=bar.update)
    prompts, _ = contexts(data, EVALUATED, seed=STEPS)
    ladder = _ladder(model, prompts)
    with torch.inference_mode():
        originals = Categorical().outputs(model, prompts)
    weights = sum(layer.elements for layer in ladder[0].sensitivity.layers)
    quantize_(model, ladder[0], nested=True, progress=False)
    divergences = [_divergence(model, plan, prompts, originals) for plan in ladder]
    at_best = _request_ms(model, prompts)
    slo = SLO(p95_ms=PROMISE * at_best)
    arrivals = _arrivals(at_best / 1e3, seconds)
    contenders = []
    with Progress("serve", 3 * len(arrivals)) as bar:
        for name, level in (("8 bits", 0), ("4 bits", len(ladder) - 1)):
            with precision(model, ladder[level].bits):
                contenders.append(_serve(name, model, prompts, arrivals, ladder, divergences, level, bar))
        with PrecisionController(model, ladder, slo=slo) as control:
            contenders.append(_serve(CONTROLLED, model, prompts, arrivals, ladder, divergences, control, bar))
    if picture:
        draw(contenders, slo.p95_ms, seconds, picture)
    switches = sum(event.kind in ("up", "down") for event in control.events)
    return AdaptiveResult(
        weights,
        slo.p95_ms,
        seconds,
        tuple(contenders),
        switches,
        tuple(notes),
        str(picture) if picture else None,
    )


def _ladder(model: ByteModel, prompts: torch.Tensor) -> tuple[Plan, ...]:
    """Plans from 8 bits for all layers to 4 bits for all layers."""
    batches = [prompts[i : i + 256] for i in range(0, len(prompts), 256)]
    found = sensitivity(model, batches, choices=CHOICES, skip=("head",))
    return allocate(found, Budget(bits=9)).ladder(LEVELS)


def _divergence(model: nn.Module, plan: Plan, prompts: torch.Tensor, originals: torch.Tensor) -> float:
    """KL to the model in floats, mean over the places."""
    loss = Categorical()
    with torch.inference_mode(), precision(model, plan.bits):
        return loss.divergence(originals, loss.outputs(model, prompts)) / len(prompts)


def _request_ms(model: nn.Module, prompts: torch.Tensor) -> float:
    """The median time of a request as the model is now."""
    times = []
    for prompt in prompts[:41]:
        start = time.perf_counter()
        generate(model, prompt, BYTES)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _arrivals(request: float, seconds: Sequence[float]) -> list[float]:
    """Seconds at which requests come, at random (a Poisson process, the same every time)."""
    draw, now, end, times = random.Random(0), 0.0, 0.0, []
    for duration, load in zip(seconds, (CALM, BURST, CALM), strict=True):
        now, end = end, end + duration
        while (now := now + draw.expovariate(load / request)) < end:
            times.append(now)
    return times


def _serve(
    name: str,
    model: nn.Module,
    prompts: torch.Tensor,
    arrivals: Sequence[float],
    ladder: Sequence[Plan],
    divergences: Sequence[float],
    level: int | PrecisionController,
    bar: Progress,
) -> Contender:
    """First come, first served, in real time."""
    served, lost, came = [], 0.0, 0
    start = time.perf_counter()
    for number, arrival in enumerate(arrivals):
        time.sleep(max(0.0, arrival - (time.perf_counter() - start)))
        while came < len(arrivals) and arrivals[came] <= time.perf_counter() - start:
            came += 1
        step: AbstractContextManager[None] = nullcontext()
        at = level
        if isinstance(level, PrecisionController):
            step, at = level.step(queue=max(0, came - number - 1)), level.level
        assert isinstance(at, int)
        with step:
            generate(model, prompts[number % len(prompts)], BYTES)
        latency = 1e3 * (time.perf_counter() - start - arrival)
        served.append(Served(arrival, latency, ladder[at].effective_bits))
        lost += divergences[at]
        bar.advance()
    return Contender(name, tuple(served), lost / len(served))
