"""What intervals and run-time control gain, and what they cost. Recorded in results/control.json.

    python benches/control.py --model DIR --calibration FILE --text FILE [--only SECTION]

phases      KL a generated token: bits by interval against the same bits throughout, at equal bytes a forward
nested      bytes and KL of one nested pack against packs of their own, weights only, over the first 8 and the
            first 128 windows of 512 tokens
switching   10,000 random switches under 8 threads: every forward that of one plan; microseconds, bytes
speed       tokens a second of layers that no cache holds, m = 1, against plain 8 bits
burst       the adaptive demo

Sequences of 512 tokens, half of them prompt. Intervals are of 95 %, from 2,000 resamplings of the sequences.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import machine
import turboquant_rs as tq
from precision import Values, interval, sequences
from quality import load_language
from turboquant_rs import quality
from turboquant_rs.demo import adaptive
from turboquant_rs.nn.speed import take_turns
from turboquant_rs.precision import LayerScores, PhasedSensitivity
from turboquant_rs.precision.weights import Weights

RESULTS = Path(__file__).parent / "results" / "control.json"
CALIBRATION, EVALUATION, FIRST, WINDOWS = 16, 16, 8, 128  # sequences
BUDGETS = (3.0, 3.5, 4.0)
PHASES = {"prefill and decode": (0, None), "prefill, 32 tokens, the others": (0, 32, None)}
SWITCHES, THREADS = 10_000, 8
SIDE, LAYERS = 4096, 24  # of the layers that are timed: 403 MB at 8 bits
NESTED = (tq.Scheme.nested(), tq.Scheme.nested(planes=(2, 1, 1, 1, 1, 2)))
Row = dict[str, Any]


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Intervals


def log_probabilities(model: nn.Module, phases: tq.Phases, data: Sequence[Tensor]) -> list[Tensor]:
    """(tokens generated + 1, words) of each sequence."""
    start = phases.prompt_of(data[0].shape[1]) - 1
    return [torch.log_softmax(model(tokens).logits[0, start:].float(), dim=-1) for tokens in data]


@torch.inference_mode()
def divergences(
    model: nn.Module,
    own: tq.PhasedPlan,
    weights: Weights,
    data: Sequence[Tensor],
    originals: Sequence[Tensor],
) -> Values:
    """KL a generated token, one value a sequence: each interval reads its plan, the cache goes along."""
    from transformers import DynamicCache

    places = own.phases.of(data[0].shape[1])
    start = own.phases.prompt_of(len(places)) - 1
    caches = [DynamicCache() for _ in data]
    parts: list[list[Tensor]] = [[] for _ in data]
    for k, plan in enumerate(own.plans):
        with weights.at(plan.widths):
            for tokens, cache, mine in zip(data, caches, parts, strict=True):
                mine.append(model(tokens[:, places == k], cache=cache).logits[0])
    values = []
    for p, mine in zip(originals, parts, strict=True):
        q = torch.log_softmax(torch.cat(mine)[start:].float(), dim=-1)
        values.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return np.array(values)


def throughout(found: PhasedSensitivity, budget: tq.Budget) -> tq.PhasedPlan:
    """The best plan that is the same in every interval, by the same scores."""
    first = found.parts[0]
    scores = np.sum([[layer.scores for layer in part.layers] for part in found.parts], axis=0)
    layers = [
        LayerScores(x.name, x.shape, x.rows, tuple(s), x.aliases)
        for x, s in zip(first.layers, scores.tolist(), strict=True)
    ]
    summed = tq.Sensitivity(
        first.model, first.score, first.scheme, first.choices, tuple(layers), first.samples, first.seconds
    )
    plan = tq.allocate(summed, budget)
    return tq.PhasedPlan(found.phases, (plan,) * len(found.parts), found.forwards)


def measure_phases(model: nn.Module, scored: Sequence[Tensor], measured: Sequence[Tensor]) -> Row:
    rows = []
    for name, decode in PHASES.items():
        phases = tq.Phases(decode=decode)
        found = tq.sensitivity(model, scored, intervals=phases, progress=False)
        weights = Weights(model, found.parts[0], found.parts[0].choices)
        with torch.inference_mode():
            originals = log_probabilities(model, phases, measured)
        for bits in BUDGETS:
            budget = tq.Budget(bits=bits)
            plans = [tq.allocate(found, budget), throughout(found, budget)]
            by_phase, alike = (divergences(model, own, weights, measured, originals) for own in plans)

            def ratio(chosen: NDArray[np.intp], a: Values = by_phase, b: Values = alike) -> float:
                return float(a[chosen].mean() / b[chosen].mean())

            rows.append(
                {
                    "intervals": name,
                    "budget": bits,
                    "forwards": list(found.forwards),
                    "bits": [plan.effective_bits for plan in plans[0].plans],
                    "mean_bits": [own.effective_bits for own in plans],
                    "kl": [float(values.mean()) for values in (by_phase, alike)],
                    "ratio": interval(ratio, len(measured)),
                    "predicted_ratio": plans[0].predicted_kl
                    / sum(
                        part.layers[i].scores[part.choices.index(width)]
                        for part in found.parts
                        for i, width in enumerate(plans[1].plans[0].widths)
                    ),
                }
            )
            log(f"{name} at {bits}: {rows[-1]['kl']}, ratio {rows[-1]['ratio']}")
    return {"prompt": measured[0].shape[1] // 2, "length": measured[0].shape[1], "rows": rows}


# Nested storage


@torch.inference_mode()
def measure_nested(model: nn.Module, windows: Tensor, device: str) -> Row:
    model, windows = copy.deepcopy(model).to(device), windows.to(device)

    def answers(own: nn.Module) -> Iterator[Tensor]:
        for part in windows.split(FIRST):
            yield torch.log_softmax(own(input_ids=part).logits[:, :-1].float(), dim=-1)

    originals = list(answers(model))

    def kl(scheme: tq.Scheme, bits: int) -> tuple[Values, int]:
        """Of each window, and the bytes stored."""
        ours = copy.deepcopy(model)
        tq.quantize_(ours, scheme, activations="float", progress=False)
        stored = sum(layer.packed.nbytes for layer in ours.modules() if isinstance(layer, tq.nn.QuantLinear))
        if scheme.is_nested:
            tq.set_precision(ours, bits)
        pairs = zip(originals, answers(tq.dequantize_(ours)), strict=True)
        values = torch.cat([(p.exp() * (p - q)).sum(-1).mean(-1) for p, q in pairs])
        return values.double().cpu().numpy(), stored

    plain = {bits: kl(tq.Scheme(bits=bits), bits) for bits in (8, 4, 3)}
    rows = []
    for scheme in NESTED:
        for bits in (width for width in (8, 4, 3) if width in scheme.prefixes):
            values, stored = kl(scheme, bits)

            def ratio(chosen: NDArray[np.intp], a: Values = values, b: Values = plain[bits][0]) -> float:
                return float(a[chosen].mean() / b[chosen].mean())

            row: Row = {"planes": scheme.planes, "bits": bits, "bytes_over_plain_8": stored / plain[8][1]}
            for count in (FIRST, len(values)):
                row |= {
                    f"kl_{count}": float(values[:count].mean()),
                    f"over_plain_{count}": interval(ratio, count),
                }
            rows.append(row)
            log(f"nested {rows[-1]}")
    kept = {
        str(bits): {str(n): float(own[:n].mean()) for n in (FIRST, WINDOWS)}
        for bits, (own, _) in plain.items()
    }
    return {"device": device, "plain": kept, "rows": rows}


# Switching


def measure_switching(model: nn.Module, scored: Sequence[Tensor], tokens: Tensor) -> Row:
    found = tq.sensitivity(model, scored[:2], progress=False)
    ladder = tq.allocate(found, tq.Budget(bits=8.25)).ladder(16)
    known = {}
    with torch.inference_mode():
        for plan in ladder:
            alone = copy.deepcopy(model)
            tq.quantize_(alone, plan, nested=True, progress=False)
            known[alone(tokens).logits.numpy().tobytes()] = plan
    ours = copy.deepcopy(model)
    tq.quantize_(ours, ladder[0], nested=True, progress=False)
    control = tq.PrecisionController(ours, ladder, slo=tq.SLO(p95_ms=1e6))
    done, seen, foreign, forwards = threading.Event(), set(), 0, 0

    def serve() -> None:
        nonlocal foreign, forwards
        with torch.inference_mode():
            while not done.is_set():
                logits = ours(tokens).logits.numpy().tobytes()
                forwards += 1
                foreign += logits not in known
                seen.add(logits)

    threads = [threading.Thread(target=serve) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    draw, times = random.Random(0), []
    for _ in range(SWITCHES):
        level = draw.randrange(len(ladder))
        start = time.perf_counter()
        control.level = level
        times.append(time.perf_counter() - start)
        time.sleep(0.002)
    done.set()
    for thread in threads:
        thread.join()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    for level in [draw.randrange(len(ladder)) for _ in range(SWITCHES)]:
        control.level = level
    after = tracemalloc.take_snapshot()
    tracemalloc.stop()
    package = str(Path(tq.__file__).parent)
    changes = after.compare_to(before, "filename")
    allocated = sum(s.size_diff for s in changes if s.traceback[0].filename.startswith(package))
    return {
        "levels": len(ladder),
        "switches": SWITCHES,
        "threads": THREADS,
        "forwards": forwards,
        "levels_seen": len(seen),
        "forwards_of_no_plan": foreign,
        "microseconds": {
            "median": 1e6 * float(np.median(times)),
            "p99": 1e6 * float(np.quantile(times, 0.99)),
        },
        "bytes_allocated": allocated,
    }


# Speed


def measure_speed() -> Row:
    x = torch.randn(1, SIDE, generator=torch.Generator().manual_seed(0))

    def layers(scheme: tq.Scheme) -> list[tq.nn.QuantLinear]:
        return [tq.nn.QuantLinear(SIDE, SIDE, bias=False, scheme=scheme) for _ in range(LAYERS)]

    def call(stack: list[tq.nn.QuantLinear], bits: int) -> Callable[[], object]:
        def run() -> None:
            for layer in stack:
                layer.read_bits = bits
                layer(x)

        return run

    plain = call(layers(tq.Scheme(bits=8)), 8)
    rows = []
    with torch.inference_mode():
        for scheme in NESTED:
            stack = layers(scheme)
            widths = [bits for bits in scheme.prefixes if bits > 1]
            seconds = take_turns([plain, *(call(stack, bits) for bits in widths)], 7)
            for bits, own in zip(widths, seconds[1:], strict=True):
                rows.append({"planes": scheme.planes, "bits": bits, "over_plain_8": seconds[0] / own})
                log(f"speed {rows[-1]}")
    return {"side": SIDE, "layers": LAYERS, "rows": rows}


# The burst


def measure_burst(picture: Path | None) -> Row:
    start = time.perf_counter()
    found = adaptive.run(picture)
    figures: Row = found.to_dict()["figures"]
    return figures | {"switches": found.switches, "slo_ms": found.slo_ms, "wall": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a causal language model")
    parser.add_argument("--calibration", type=Path, required=True, help="UTF-8 text to score on")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--only", nargs="+", metavar="SECTION")
    parser.add_argument("--device", default="cpu", help="that the section nested computes on")
    parser.add_argument("--picture", type=Path, help="PNG of the burst")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, calibration = load_language(options.model, options.calibration)
    _, text = load_language(options.model, options.text)
    scored, measured = list(sequences(calibration, CALIBRATION)), list(sequences(text, EVALUATION))
    windows = quality.windows(text, WINDOWS)
    sections: dict[str, Callable[[], Row]] = {
        "phases": lambda: measure_phases(model, scored, measured),
        "nested": lambda: measure_nested(model, windows, options.device),
        "switching": lambda: measure_switching(model, scored, text[:8].unsqueeze(0)),
        "speed": measure_speed,
        "burst": lambda: measure_burst(options.picture),
    }
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.only or sections:
        start, before = time.perf_counter(), machine.processor_seconds()
        found = sections[name]() | {"machine": machine.describe(), "threads": torch.get_num_threads()}
        found |= {"seconds": round(time.perf_counter() - start), "others": machine.used_by_others(before)}
        record[name] = found
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
