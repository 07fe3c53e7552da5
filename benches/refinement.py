"""Rows that choose their bits against layers that have theirs: recorded in results/refinement.json.

    python benches/refinement.py --model DIR --calibration FILE --text FILE

quality: KL to f32 of `tq.refine` and of a static plan of the same mean bits (`tq.allocate`, nested weights),
both with int8 activations; thresholds and scores from the calibration text, KL from the other. Intervals are
of 95 %, from 2,000 resamplings of the sequences, paired. rows: what else could choose the rows, the true
error of the layer among them: how well it predicts that error (R² of a straight line), and the KL where it
chooses (weights only). time: a refined layer against the same layer read statically, as often at the one
width and at the other as rows chose them; weights rotate through a pool that no cache holds, all take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import machine
import turboquant_rs as tq
from precision import Job, Row, Values, interval, sequences
from quality import load_language
from turboquant_rs import ops
from turboquant_rs.nn.rows import RowPrecision
from turboquant_rs.progress import Progress

RESULTS = Path(__file__).parent / "results" / "refinement.json"
TARGETS = (4.25, 4.8, 5.5, 6.0)
CALIBRATION, EVALUATION = 16, 16  # sequences
CHOICES = (4, 5, 6, 8)
PLANES = {"4 or 8 bits": (4, 4), "neighbouring widths": (4, 1, 1, 2)}
CHOSEN_AT = 4.8
SKETCH = 64  # rows of a random projection
SHAPE, POOL, BATCHES = (4096, 4096), 12, (1, 32)
ROUNDS, CALLS = 21, 24


def measure_quality(job: Job) -> list[Row]:
    """One row for each target and each way to spend it."""
    found = tq.sensitivity(
        job.model,
        job.calibration,
        scheme=tq.Scheme.nested(planes=(4, 1, 1, 2)),
        choices=CHOICES,
        progress=False,
    )
    float_model, rows = job.model, []
    for target in TARGETS:
        plan = tq.allocate(found, tq.Budget(bits=target + scale_bits(found.scheme)))
        job.model = copy.deepcopy(float_model)
        tq.quantize_(job.model, plan, nested=True, progress=False)
        static = job.divergences()
        own = {"target": target, "mean_bits": mean_bits(job.model), "kl": mean(static)}
        rows.append({"kind": "static plan"} | own)
        log(rows[-1])
        for kind, planes in PLANES.items():
            job.model = copy.deepcopy(float_model)
            names = [layer.name for layer in found.layers]
            tq.quantize_(job.model, dict.fromkeys(names, tq.Scheme.nested(planes=planes)), progress=False)
            report = tq.refine(job.model, target, job.calibration, progress=False)
            clear(job.model)
            values = job.divergences()

            def ratio(chosen: Any, values: Values = values, static: Values = static) -> float:
                return float(values[chosen].mean() / static[chosen].mean())

            fits = [layer.fit for layer in report.layers if layer.read_bits < layer.refined_bits]
            rows.append(
                {
                    "kind": kind,
                    "target": target,
                    "expected_bits": report.expected_bits,
                    "mean_bits": mean_bits(job.model),
                    "kl": mean(values),
                    "over_static": interval(ratio, len(values)),
                    "fit_median": statistics.median(fits) if fits else None,
                    "fits_from_0.9": sum(fit >= 0.9 for fit in fits),
                }
            )
            log(rows[-1])
    job.model = float_model
    return rows


def scale_bits(scheme: tq.Scheme) -> float:
    """What the scales add to a code."""
    return 8 * scheme.scale_torch_dtype.itemsize / (scheme.group_size or 1)


def mean(values: Values) -> Row:
    return interval(lambda chosen: float(values[chosen].mean()), len(values))


def layers_of(model: nn.Module) -> list[tq.nn.QuantLinear]:
    return [layer for layer in model.modules() if isinstance(layer, tq.nn.QuantLinear)]


def mean_bits(model: nn.Module) -> float:
    """Bits read of a code, over all weights, as counted."""
    sizes = [layer.in_features * layer.out_features for layer in layers_of(model)]
    return float(np.average([layer.mean_bits for layer in layers_of(model)], weights=sizes))


def clear(model: nn.Module) -> None:
    """Counts from here on."""
    for layer in layers_of(model):
        if layer._rows is not None:
            layer._rows.counts.zero_()


def log(row: Row) -> None:
    print(json.dumps(row), file=sys.stderr, flush=True)


# What chooses the rows


class Chooser:
    """A linear layer at 4 bits, and at the next width for the rows that an estimate puts first."""

    def __init__(self, layer: nn.Linear, scheme: tq.Scheme, bits: int, seed: int) -> None:
        packed = tq.pack(layer.weight.detach(), scheme=scheme)
        self.low, self.high = packed.dequantize(4), packed.dequantize(bits)
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(SKETCH, len(self.low), generator=generator) / SKETCH**0.5
        self.sketch, self.sketch_low = projection @ (self.high - self.low), projection @ self.low
        self.group, self.generator = scheme.group_size or 0, generator
        self.seen: list[dict[str, Tensor]] = []

    def estimates(self, x: Tensor) -> dict[str, Tensor]:
        low, difference = x @ self.low.T, x @ (self.high - self.low).T
        error, sketched = difference.norm(dim=-1), (x @ self.sketch.T).norm(dim=-1)
        return {
            "chance": torch.rand(x.shape[:-1], generator=self.generator),
            "size of the scales": ops.reference.row_sizes(x, self.group).float(),
            "norm": x.norm(dim=-1),
            "projection": sketched,
            "projection, relative": sketched / (x @ self.sketch_low.T).norm(dim=-1),
            "true error": error,
            "true error, relative": error / low.norm(dim=-1),
        }

    def output(self, x: Tensor, name: str, share: float) -> Tensor:
        threshold = torch.quantile(torch.cat([row[name].flatten() for row in self.seen]), 1 - share)
        chosen = self.estimates(x)[name] > threshold
        return torch.where(chosen.unsqueeze(-1), x @ self.high.T, x @ self.low.T)


@contextmanager
def replaced(
    choosers: dict[nn.Module, Chooser], output: Callable[[Chooser, Tensor], Tensor]
) -> Iterator[None]:
    """Layers give `output(chooser, x)` within the block."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        return output(choosers[module], args[0])

    with ExitStack() as handles:
        for layer in choosers:
            handles.enter_context(layer.register_forward_hook(hook))
        yield


@torch.no_grad()
def measure_rows(job: Job) -> Row:
    """4 and 5 bits: how well each estimate predicts the error of a row, and the KL where it chooses."""
    scheme = tq.Scheme.nested(planes=(4, 1, 1, 2))
    names = [layer.name for layer in tq.quantize_(job.model, scheme, dry_run=True).layers]
    layers = [job.model.get_submodule(name) for name in names]
    choosers = {layer: Chooser(layer, scheme, 5, i) for i, layer in enumerate(layers)}

    def note(chooser: Chooser, x: Tensor) -> Tensor:
        chooser.seen.append(chooser.estimates(x))
        return x @ chooser.high.T

    with replaced(choosers, note):
        for batch in job.calibration[: CALIBRATION // 2]:
            job.model(batch)
    found: Row = {}
    for name in choosers[layers[0]].seen[0]:
        fits = []
        for chooser in choosers.values():
            error = "true error, relative" if name.endswith("relative") else "true error"
            pair = [torch.cat([row[key].flatten() for row in chooser.seen]) for key in (name, error)]
            fits.append(float(torch.corrcoef(torch.stack(pair).double())[0, 1] ** 2))
        with replaced(choosers, lambda chooser, x, name=name: chooser.output(x, name, CHOSEN_AT - 4)):
            kl = mean(job.divergences())
        found[name] = {
            "fit_median": statistics.median(fits),
            "fits_from_0.9": sum(fit >= 0.9 for fit in fits) / len(fits),
            "kl": kl,
        }
        log({name: found[name]})
    return {"target": CHOSEN_AT, "layers": len(layers), "by": found}


# Time


def measure_time() -> list[Row]:
    """Seconds of a refined layer over those of static reads in the same proportions."""
    rows = []
    n, k = SHAPE
    generator = torch.Generator().manual_seed(0)
    for kind, planes in PLANES.items():
        scheme = tq.Scheme.nested(planes=planes)
        low, high = scheme.prefixes[:2]
        pool = []
        for _ in range(POOL):
            linear = nn.Linear(k, n, bias=False, device="meta")
            linear.weight = nn.Parameter(torch.randn(n, k, generator=generator), requires_grad=False)
            pool.append(tq.nn.QuantLinear.from_float(linear, scheme))
        for m in BATCHES:
            inputs = [torch.randn(m, k, generator=generator) for _ in range(CALLS)]
            sizes = torch.cat([ops.reference.row_sizes(x, scheme.group_size or 0) for x in inputs])
            for target in (t for t in TARGETS if low < t < high):
                share = (target - low) / (high - low)
                rows.append(time_one(pool, inputs, low, high, float(sizes.quantile(1 - share))))
                rows[-1] |= {"kind": kind, "target": target, "m": m, "shape": list(SHAPE)}
                log(rows[-1])
    return rows


def time_one(
    pool: Sequence[tq.nn.QuantLinear], inputs: Sequence[Tensor], low: int, high: int, threshold: float
) -> Row:
    def call_all() -> float:
        start = time.perf_counter()
        for i, x in enumerate(inputs):
            pool[i % len(pool)](x)
        return time.perf_counter() - start

    def static(bits: int) -> float:
        for layer in pool:
            layer.read_bits = bits
        return call_all()

    counts = torch.zeros(2, dtype=torch.int64)

    def refined() -> float:
        for layer in pool:
            layer._rows = RowPrecision(low, high, threshold, counts)
        return call_all()

    with torch.inference_mode():
        turns = [(static(low), static(high), refined()) for _ in range(ROUNDS + 2)][2:]
    rows, chosen = counts.tolist()
    share = chosen / rows
    times = [statistics.median(turn) for turn in zip(*turns, strict=True)]
    over = [own / ((1 - share) * a + share * b) for a, b, own in turns]
    return {
        "low_over_high": times[0] / times[1],
        "mean_bits": low + (high - low) * share,
        "microseconds": 1e6 * times[2] / len(inputs),
        "over_static": {
            "value": statistics.median(over),
            "low": float(np.quantile(over, 0.1)),
            "high": float(np.quantile(over, 0.9)),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a causal language model")
    parser.add_argument(
        "--calibration", type=Path, required=True, help="UTF-8 text for thresholds and scores"
    )
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--only", choices=("quality", "rows", "time"), help="measure one section")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, calibration = load_language(options.model, options.calibration)
    _, text = load_language(options.model, options.text)
    batches = (list(sequences(calibration, CALIBRATION)), list(sequences(text, EVALUATION)))
    job = Job.of(model, tq.Categorical(), *batches, [])
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    record |= {
        "model": options.model.name,
        "calibration": options.calibration.name,
        "text": options.text.name,
    }
    sections: dict[str, Callable[[], Any]] = {
        "quality": lambda: measure_quality(job),
        "rows": lambda: measure_rows(job),
        "time": measure_time,
    }
    for name, section in sections.items():
        if options.only not in (None, name):
            continue
        start, before = time.perf_counter(), machine.processor_seconds()
        with Progress(name, 1):
            found = {"found": section(), "machine": machine.describe(), "threads": torch.get_num_threads()}
        found |= {"seconds": round(time.perf_counter() - start), "others": machine.used_by_others(before)}
        record[name] = found
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
