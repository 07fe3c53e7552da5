"""Does the predicted KL hold, and what does a mixed plan gain? Recorded in results/precision.json.

    python benches/precision.py                                        the sentence encoder of the demo
    python benches/precision.py --model DIR --calibration FILE --text FILE     and a causal language model

Scores come from the calibration text, every KL from the other one; weights only. Uniform precision is
interpolated to the bytes of a plan, straight in the logarithm of KL. Intervals are of 95 %, from 2,000
resamplings of the sequences. Peers of a plan at equal bytes: random ones, and outer layers first.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import machine
import turboquant_rs as tq
from quality import load_language
from turboquant_rs import quality
from turboquant_rs.demo import library_sentences, load_minilm
from turboquant_rs.demo.encoder import embed
from turboquant_rs.demo.sentences import SOURCE
from turboquant_rs.precision.choices import Choices, nbytes
from turboquant_rs.precision.losses import Loss
from turboquant_rs.precision.weights import Weights
from turboquant_rs.progress import Progress

RESULTS = Path(__file__).parent / "results" / "precision.json"
BUDGETS = (3.0, 3.25, 3.5, 4.0, 4.25, 5.0)
CALIBRATION, EVALUATION, PROBES = 16, 16, 4  # sequences
RANDOM_PLANS, RESAMPLINGS = 3, 2000
SENTENCES, SENTENCE_BATCH = 512, 16
Row = dict[str, Any]
Values = NDArray[np.float64]


@dataclass
class Job:
    """A model, what it is scored by, batches to score on and to measure KL on, the names of its tables."""

    model: nn.Module
    loss: Loss
    calibration: Sequence[Any]
    evaluation: Sequence[Any]
    tables: Sequence[str]
    originals: list[Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss: Loss,
        calibration: Sequence[Any],
        evaluation: Sequence[Any],
        tables: Sequence[str],
    ) -> Job:
        with torch.inference_mode():
            originals = [loss.outputs(model, batch) for batch in evaluation]
        return cls(model, loss, calibration, evaluation, tables, originals)

    @torch.inference_mode()
    def divergences(self) -> Values:
        """KL a sample of the model as it is now, one value for each evaluation batch."""
        pairs = zip(self.originals, self.evaluation, strict=True)
        return np.array(
            [self.loss.divergence(o, self.loss.outputs(self.model, b)) / len(o) for o, b in pairs]
        )


def interval(statistic: Callable[[NDArray[np.intp]], float], count: int) -> Row:
    """A statistic of sequences (given their indices), and its bootstrap interval."""
    generator = np.random.default_rng(0)
    draws = [statistic(generator.integers(0, count, count)) for _ in range(RESAMPLINGS)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"value": statistic(np.arange(count)), "low": float(low), "high": float(high)}


def ranks(values: Values) -> Values:
    return np.argsort(np.argsort(values)).astype(float)


def spearman(a: Values, b: Values) -> float:
    return float(np.corrcoef(ranks(a.ravel()), ranks(b.ravel()))[0, 1])


def scores(found: tq.Sensitivity) -> Values:
    """(layers, choices)"""
    return np.array([layer.scores for layer in found.layers])


def measure_score(job: Job, found: tq.Sensitivity, uniform: dict[int, Values]) -> Row:
    """Predicted against probed KL, layer by layer, and their sum against the joint KL."""
    batches = job.evaluation[:PROBES]
    probes = np.stack([scores(probe(job, batch)) for batch in batches])
    predicted = scores(found)

    def rank(chosen: NDArray[np.intp]) -> float:
        return spearman(predicted, probes[chosen].mean(0))

    joint = {
        str(bits): interval(
            lambda chosen, own=own, bits=bits: found.total(bits) / own[chosen].mean(), len(own)
        )
        for bits, own in uniform.items()
    }
    within = {
        str(bits): spearman(predicted[:, i], probes.mean(0)[:, i]) for i, bits in enumerate(found.choices)
    }
    logs = np.log(probes.mean(0) / np.array([[layer.elements] for layer in found.layers]))
    return {
        "probed_batches": len(batches),
        "spearman": interval(rank, len(batches)),
        "spearman_by_bits": within,
        "predicted_over_joint": joint,
        "sigma_predicted": {str(bits): found.spread(bits) for bits in found.choices},
        "sigma_probed": {str(bits): float(logs[:, i].std()) for i, bits in enumerate(found.choices)},
    }


def probe(job: Job, batch: Any) -> tq.Sensitivity:
    print("probe", file=sys.stderr, flush=True)
    return tq.sensitivity(job.model, [batch], score="probe", loss=job.loss, progress=False)


def measure_cost(job: Job, batches: Sequence[Any]) -> Row:
    """Processor seconds of scoring over those of one forward and backward over the same batches."""
    found: dict[str, float] = {}
    for name, run in (("training", lambda: train(job, batches)), ("scoring", lambda: score(job, batches))):
        start = time.process_time()
        run()
        found[name] = time.process_time() - start
    return found | {"ratio": found["scoring"] / found["training"]}


def train(job: Job, batches: Sequence[Any]) -> None:
    for batch in batches:
        job.loss.sample(job.model, batch, 0)[0].backward()
        job.model.zero_grad(set_to_none=True)


def score(job: Job, batches: Sequence[Any], **options: Any) -> tq.Sensitivity:
    return tq.sensitivity(job.model, batches, loss=job.loss, progress=False, **options)


def measure_plans(job: Job, found: tq.Sensitivity, uniform: dict[int, Values], peers: bool) -> list[Row]:
    """For every budget: a plan, and with `peers` others, against uniform precision at the same bytes."""
    weights = Weights(job.model, found, found.choices)
    size = nbytes(found)
    elements = sum(layer.elements for layer in found.layers)
    effective = [8 * sum(size(layer, b) for layer in found.layers) / elements for b in found.choices]
    table = np.stack(list(uniform.values()))
    rows = []
    for budget in BUDGETS:
        plan = tq.allocate(found, tq.Budget(bits=budget))
        kinds: list[tuple[str, tq.Plan]] = [("plan", plan), ("head and tail", outer_first(found, budget))]
        kinds += [("random", drawn(found, budget, seed)) for seed in range(RANDOM_PLANS)]
        for kind, own in kinds if peers else kinds[:1]:
            with weights.at(own.widths):
                values = job.divergences()

            def ratio(chosen: NDArray[np.intp], values: Values = values, own: tq.Plan = own) -> float:
                logs = np.log(table[:, chosen].mean(1))
                return float(values[chosen].mean() / np.exp(np.interp(own.effective_bits, effective, logs)))

            totals = [np.log(found.total(bits)) for bits in found.choices]
            predicted = own.predicted_kl / float(np.exp(np.interp(own.effective_bits, effective, totals)))
            row = {
                "kind": kind,
                "budget": budget,
                "effective_bits": own.effective_bits,
                "kl": interval(lambda chosen, v=values: float(v[chosen].mean()), len(values)),
                "predicted_kl": own.predicted_kl,
                "over_uniform": interval(ratio, len(values)),
                "predicted_over_uniform": predicted,
                "layers_by_bits": {str(b): own.widths.count(b) for b in sorted(set(own.widths))},
            }
            rows.append(row)
            kl, over = row["kl"]["value"], row["over_uniform"]
            print(
                f"{budget} {kind:14} KL {kl:.5f}, over uniform {over['value']:.3f} "
                f"({over['low']:.3f} to {over['high']:.3f}), predicted {predicted:.3f}",
                file=sys.stderr,
                flush=True,
            )
    return rows


def with_widths(found: tq.Sensitivity, widths: Sequence[int]) -> tq.Plan:
    alone = tuple((i,) for i in range(len(widths)))
    return tq.Plan(found, tuple(widths), alone, found.choices[0], found.choices[-1])


def outer_first(found: tq.Sensitivity, budget: float) -> tq.Plan:
    """The larger of the two widths around the budget for layers from both ends, while the bytes last."""
    uniform = [with_widths(found, [bits] * len(found.layers)) for bits in found.choices]
    low = max(i for i, plan in enumerate(uniform) if plan.effective_bits <= budget)
    widths = [found.choices[low]] * len(found.layers)
    for i in sorted(range(len(widths)), key=lambda i: min(i, len(widths) - 1 - i)):
        raised = [*widths[:i], found.choices[low + 1], *widths[i + 1 :]]
        if with_widths(found, raised).effective_bits > budget:
            break
        widths = raised
    return with_widths(found, widths)


def drawn(found: tq.Sensitivity, budget: float, seed: int) -> tq.Plan:
    """Random layers raised by one choice, from the lowest on, until none fits."""
    generator, size = random.Random(seed), nbytes(found)
    room = budget * sum(layer.elements for layer in found.layers) / 8
    widths = [found.choices[0]] * len(found.layers)
    room -= sum(size(layer, found.choices[0]) for layer in found.layers)
    open_ = list(range(len(widths)))
    while open_:
        i = generator.choice(open_)
        place = found.choices.index(widths[i]) + 1
        more = 0
        if place < len(found.choices):
            more = size(found.layers[i], found.choices[place]) - size(found.layers[i], widths[i])
        if not more or more > room:
            open_.remove(i)
            continue
        widths[i], room = found.choices[place], room - more
    return with_widths(found, widths)


def measure_solver(found: tq.Sensitivity) -> Row:
    """Score of the solver over that of exact dynamic programming, and its time for 10,000 items."""
    bits = found.choices
    choices = Choices.of(found, bits, [(i,) for i in range(len(found.layers))], nbytes(found))
    unit = int(np.gcd.reduce(choices.costs.ravel()))
    costs = (choices.costs // unit).astype(int)
    worst = 1.0
    for budget in np.linspace(costs.min(1).sum(), costs.max(1).sum(), 24).astype(int):
        chosen = choices.solve(int(budget) * unit)
        ours = choices.scores[np.arange(len(chosen)), chosen].sum()
        worst = max(worst, float(ours / exact(costs, choices.scores, int(budget))))
    generator = np.random.default_rng(0)
    sizes = generator.choice([1 << 16, 1 << 17, 1 << 18, 11 << 16], 10_000)
    large = Choices(
        bits,
        tuple((i,) for i in range(10_000)),
        np.stack([sizes * (4 * b + 1) // 32 for b in bits], 1).astype(np.uint64),
        np.stack([sizes * np.exp(generator.normal(0, 1.2, 10_000)) * 4.0**-b for b in bits], 1),
    )
    limit = int(large.costs.sum()) // 7
    times = []
    for _ in range(15):
        start = time.process_time()
        large.solve(limit)
        times.append(time.process_time() - start)
    return {"over_exact": worst, "items": 10_000, "milliseconds": 1e3 * float(np.median(times))}


def exact(costs: NDArray[np.int64], values: Values, budget: int) -> float:
    """The least sum of values whose costs are within the budget, by dynamic programming."""
    best = np.zeros(budget + 1)
    for row, own in zip(costs, values, strict=True):
        options = []
        for cost, value in zip(row, own, strict=True):
            option = np.full(budget + 1, np.inf)
            option[cost:] = best[: budget + 1 - cost] + value
            options.append(option)
        best = np.min(options, axis=0)
    return float(best[budget])


def measure(job: Job) -> Row:
    """All of it for one model: linear layers whole, in blocks of rows, and together with the tables."""
    everything = [name for name, module in job.model.named_modules() if isinstance(module, nn.Linear)]
    variants = {
        "layers": {},
        "blocks of 128 rows": {"granularity": "rows:128"},
        "layers and tables": {"layers": sorted({*everything, *job.tables})},
    }
    found = {name: score(job, job.calibration, **options) for name, options in variants.items()}
    uniform = {name: measure_uniform(job, own) for name, own in found.items()}
    whole = found["layers"]
    return {
        "samples": whole.samples,
        "uniform": {name: shown(own) for name, own in uniform.items()},
        "plans": {
            name: measure_plans(job, own, uniform[name], name == "layers") for name, own in found.items()
        },
        "solver": measure_solver(whole),
        "cost": measure_cost(job, job.calibration[:4]),
        "score": measure_score(job, whole, uniform["layers"]),
    }


def measure_uniform(job: Job, found: tq.Sensitivity) -> dict[int, Values]:
    """KL of every sequence with all layers at the same bits, for each choice."""
    weights = Weights(job.model, found, found.choices)
    uniform = {}
    for bits in found.choices:
        with weights.at([bits] * len(found.layers)):
            uniform[bits] = job.divergences()
        print(f"uniform {bits}: KL {uniform[bits].mean():.6f}", file=sys.stderr, flush=True)
    return uniform


def shown(uniform: dict[int, Values]) -> Row:
    return {
        str(bits): interval(lambda chosen, v=values: float(v[chosen].mean()), len(values))
        for bits, values in uniform.items()
    }


def encoder() -> Row:
    """MiniLM by its embeddings: KL is ½ ‖e − ê‖², which for unit vectors is 1 − cosine."""
    found = load_minilm()
    texts = library_sentences(2 * SENTENCES)
    batches = [found.tokenize(texts[i : i + SENTENCE_BATCH]) for i in range(0, len(texts), SENTENCE_BATCH)]
    half = len(batches) // 2
    tables = ["embeddings.word_embeddings"]
    job = Job.of(found.model, tq.Gaussian(embed), batches[:half], batches[half:], tables)
    return {"model": found.name, "text": f"{SENTENCES} + {SENTENCES} {SOURCE}"} | measure(job)


def language(folder: Path, calibration: Path, text: Path) -> Row:
    """A causal language model."""
    model, scored = load_language(folder, calibration)
    _, measured = load_language(folder, text)
    batches = (list(sequences(scored, CALIBRATION)), list(sequences(measured, EVALUATION)))
    job = Job.of(model, tq.Categorical(), *batches, ["model.embed_tokens", "lm_head"])
    return {"model": folder.name, "calibration": calibration.name, "text": text.name} | measure(job)


def sequences(tokens: Tensor, count: int) -> Iterator[Tensor]:
    return (window.unsqueeze(0) for window in quality.windows(tokens, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory of a causal language model (transformers)")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text to score on")
    parser.add_argument("--text", type=Path, help="UTF-8 text to measure on")
    parser.add_argument("--only", choices=("encoder", "language"), help="measure one section")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if len({options.model is None, options.calibration is None, options.text is None}) > 1:
        parser.error("--model, --calibration and --text go together")
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    sections: dict[str, Callable[[], Row]] = {"encoder": encoder}
    if options.model:
        sections["language"] = lambda: language(options.model, options.calibration, options.text)
    for name, section in sections.items():
        if options.only not in (None, name):
            continue
        start, before = time.perf_counter(), machine.processor_seconds()
        with Progress(name, 1):
            found = section()
        found |= {"machine": machine.describe(), "threads": torch.get_num_threads()}
        found |= {"seconds": round(time.perf_counter() - start), "others": machine.used_by_others(before)}
        record[name] = found
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
