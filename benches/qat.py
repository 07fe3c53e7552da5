"""How much of what rounding loses training brings back, recorded in results/qat.json.

    python benches/qat.py --model DIR --text FILE --train FILE_OR_DIR [...]

A causal language model is prepared, distilled from itself in float on the training texts (loss: KL of the
float model's distribution and the prepared one's, nothing else), converted, and measured on --text: mean KL
to float and perplexity ratio, weights only, over the first 8 and the first 128 windows of 512 tokens.
Intervals are of 95 %, from 2,000 resamplings of the windows. Training sources that share long lines with
--text are left out.

Rows of variants that are not measured this time (--only) keep their record, each with the arguments it was
made with. Also recorded: whether the converted model equals the prepared one in evaluation bit for bit, int8
activations included, on the CPU; and the time of a training step of the prepared model over that of the float
one, on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import machine
import turboquant_rs as tq
from quality import load_language
from turboquant_rs import quality

RESULTS = Path(__file__).parent / "results" / "qat.json"
LENGTH, SHORT, LONG = 512, 8, 128  # tokens a window, windows
RESAMPLINGS = 2000
LONG_LINE, SHARED = 40, 0.02  # a line that says something; the share of them that marks a copy
NESTED = tq.Scheme.nested(planes=(2, 1, 1, 1, 1, 2))
NESTED_BITS = (2, 3, 4, 8)
LEARNED_BUDGET = 3.25  # effective bits: those of uniform 3-bit codes in groups of 64
Row = dict[str, Any]


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Texts


def sources(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*.py") if "site-packages" not in p.parts)
        else:
            yield path


def training_tokens(folder: Path, paths: Sequence[Path], text: Path) -> tuple[Tensor, Row]:
    """All training texts as tokens (n,), those left out that share lines with the text to measure on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = {line.strip() for line in text.read_text(encoding="utf-8").splitlines()}
    known = {line for line in known if len(line) >= LONG_LINE}
    kept, dropped, parts = 0, 0, []
    for path in sources(paths):
        content = path.read_text(encoding="utf-8", errors="ignore")
        lines = [line.strip() for line in content.splitlines() if len(line.strip()) >= LONG_LINE]
        if sum(line in known for line in lines) > SHARED * len(lines):
            dropped += 1
            continue
        kept += 1
        parts.append(tokenizer(content, add_special_tokens=False, return_tensors="pt").input_ids[0])
    tokens = torch.cat(parts)
    return tokens, {"files": kept, "files_left_out": dropped, "tokens": len(tokens)}


# Training


def scales_apart(model: nn.Module, rate: float, scale_rate: float, bits_rate: float) -> list[Row]:
    """Parameter groups: weights, learned scales, learned bits."""
    groups: dict[str, list[nn.Parameter]] = {"weight": [], "scale": [], "bits": []}
    for name, parameter in model.named_parameters():
        kind = name.rpartition("weight_")[2]
        groups[kind if kind in groups else "weight"].append(parameter)
    rates = {"weight": rate, "scale": scale_rate, "bits": bits_rate}
    return [{"params": own, "lr": rates[kind], "peak": rates[kind]} for kind, own in groups.items() if own]


def train(
    model: nn.Module, teacher: nn.Module, tokens: Tensor, steps: int, args: argparse.Namespace, rate: float
) -> Row:
    """Distils `teacher` into the prepared `model`: AdamW, linear warm-up over a tenth, cosine to 0."""
    groups = scales_apart(model, rate, rate * args.scale_rate, args.bits_rate)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    nested = any(layer.scheme.is_nested for layer in tq.qat.prepared_layers(model).values())
    generator = torch.Generator().manual_seed(args.seed)
    device, losses, start = next(model.parameters()).device, [], time.perf_counter()
    model.train()
    for step in range(steps):
        factor = min(1.0, (step + 1) / max(1, steps // 10)) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        at = torch.randint(0, len(tokens) - args.length, (args.batch,), generator=generator)
        batch = torch.stack([tokens[i : i + args.length] for i in at.tolist()]).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            goal = teacher(batch).logits.float().log_softmax(-1)
        for width in tq.sandwich(model, NESTED_BITS, step=step, seed=args.seed) if nested else (0,):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits = model(batch).logits
            loss = (
                F.kl_div(logits.float().log_softmax(-1), goal, log_target=True, reduction="none")
                .sum(-1)
                .mean()
            )
            loss.backward()
            if step % max(1, steps // 8) == 0:
                log(f"    step {step} bits {width or '-'} loss {float(loss.detach()):.4f}")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return {
        "steps": steps,
        "seconds": time.perf_counter() - start,
        "loss": statistics.fmean(tail),
        "rate": rate,
    }


# Measuring


@torch.no_grad()
def window_losses(model: nn.Module, windows: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
    """Log-probabilities of the first windows, and the mean negative log-likelihood of each of all."""
    device, kept, losses = next(model.parameters()).device, [], []
    for number, window in enumerate(windows):
        scores = model(window.to(device)[None]).logits[0].float().log_softmax(-1)
        losses.append(float(-scores[:-1].gather(1, window.to(device)[1:, None]).mean()))
        if number < SHORT:
            kept.append(scores)
    return kept, losses


class Judge:
    """The float model's answers, to hold others against."""

    def __init__(self, teacher: nn.Module, windows: Sequence[Tensor]) -> None:
        self.windows = windows
        self.scores, self.losses = window_losses(teacher, windows)

    def measure(self, model: nn.Module) -> Row:
        """KL (nats) over the first windows; perplexity ratios over the first and over all, with intervals."""
        scores, losses = window_losses(model, self.windows)
        kl = [
            float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())
            for p, q in zip(self.scores, scores, strict=True)
        ]
        rise = np.array(losses) - np.array(self.losses)
        generator = np.random.default_rng(0)

        def interval(values: Any, exp: bool) -> Row:
            values = np.asarray(values)
            draws = values[generator.integers(0, len(values), (RESAMPLINGS, len(values)))].mean(1)
            all_ = [values.mean(), *np.quantile(draws, [0.025, 0.975])]
            value, low, high = (float(math.exp(v)) if exp else float(v) for v in all_)
            return {"value": value, "low": low, "high": high}

        return {
            "kl": interval(kl, False),
            "perplexity_ratio": interval(rise[:SHORT], True),
            f"perplexity_ratio_{len(rise)}": interval(rise, True),
        }


def floats(model: nn.Module, bits: int | None = None) -> nn.Module:
    """A float copy of a packed model, read at `bits`: weights only."""
    ours = copy.deepcopy(model)
    if bits is not None:
        tq.set_precision(ours, bits)
    return tq.dequantize_(ours)


@torch.no_grad()
def converted(model: nn.Module, window: Tensor) -> Row:
    """Converts in place, on the CPU, and compares codes and logits before and after."""
    model.cpu().eval()
    before = model(window[None]).logits
    codes = {name: layer.packed.codes() for name, layer in tq.qat.prepared_layers(model).items()}
    report = tq.quantize_(model, tq.QAT(step="convert"), progress=False)
    after = model(window[None]).logits
    same = [torch.equal(own, model.get_submodule(name).packed.codes()) for name, own in codes.items()]
    elements = sum(own.numel() for own in codes.values())
    return {
        "equal_codes": sum(own.numel() for own, equal in zip(codes.values(), same, strict=True) if equal)
        / elements,
        "largest_difference_of_logits": float((before - after).abs().max()),
        "effective_bits": 8 * report.bytes_after / elements,
        "bytes": report.bytes_after,
    }


def variants(args: argparse.Namespace) -> Iterator[tuple[str, tq.QAT, float]]:
    """Name, recipe, and peak rate of the weights."""
    for bits, method in ((4, "lsq"), (3, "lsq"), (2, "lsq"), (2, "elastic"), (2, "ste")):
        yield f"{method} {bits}", tq.QAT(tq.Scheme(bits=bits), method=method), args.rates[bits]
    yield "lsq nested", tq.QAT(NESTED, method="lsq"), args.rates[3]


class Record:
    """The results file, written after every row: rows of the same name and bits are replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: Row = json.loads(path.read_text()) if path.exists() else {"rows": []}

    def add(self, row: Row) -> None:
        key = (row["name"], row["bits"])
        self.content["rows"] = [r for r in self.content["rows"] if (r["name"], r["bits"]) != key] + [row]
        self.write()

    def write(self, **facts: Any) -> None:
        self.content = {**facts, **self.content, **facts}
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def run(args: argparse.Namespace, results: Record) -> None:
    """Every variant that is asked for."""
    float_model, tokens = load_language(args.model, args.text)
    teacher = float_model.float().to(args.device).eval()
    judge = Judge(teacher, quality.windows(tokens, args.windows))
    text, facts = training_tokens(args.model, args.train, args.text)
    log(f"{facts}")
    results.write(model=args.model.name, text={"windows": args.windows, "length": LENGTH}, training=facts)
    window = judge.windows[0]

    def record(name: str, trained: nn.Module, row: Row, bits_of: float | None = None) -> None:
        row = {"name": name, "bits": bits_of, **row, **shown(args), "convert": converted(trained, window)}
        layers = [m for m in trained.modules() if isinstance(m, tq.nn.QuantLinear)]
        nested = layers[0].scheme.is_nested
        for bits in NESTED_BITS if nested else (None,):
            own = judge.measure(floats(trained, bits).to(args.device))
            results.add({**row, "bits": bits or bits_of or layers[0].scheme.bits, **own})
            kl, ratio = own["kl"]["value"], own["perplexity_ratio"]["value"]
            log(f"  {name} {bits or ''}: KL {kl:.5f}, perplexity x {ratio:.4f} {row['convert']}")

    for scheme in (*(tq.Scheme(bits=bits) for bits in (4, 3, 2)), NESTED):
        plain = copy.deepcopy(teacher)
        tq.quantize_(plain, scheme, progress=False)
        for bits in NESTED_BITS if scheme.is_nested else (None,):
            name = "rounded nested" if scheme.is_nested else "rounded"
            row = {"name": name, "bits": bits or scheme.bits, **judge.measure(floats(plain, bits))}
            results.add(row)
            log(
                f"{name} {row['bits']}: KL {row['kl']['value']:.5f}, "
                f"perplexity x {row['perplexity_ratio']['value']:.4f}"
            )
    for name, recipe, rate in variants(args):
        if args.only and name not in args.only:
            continue
        log(name)
        model = copy.deepcopy(teacher)
        tq.quantize_(model, recipe, activations="int8")
        record(name, model, train(model, teacher, text, args.steps, args, rate))
    if not args.only or "learned" in args.only:
        learned = learn_bits(teacher, text, args)
        log(f"learned: {learned}")
        model = copy.deepcopy(teacher)
        tq.quantize_(model, tq.QAT({name: tq.Scheme(bits=b) for name, b in learned["bits"].items()}))
        rest = args.steps - learned["steps"]
        found = train(model, teacher, text, rest, args, args.rates[3])
        record("learned bits, then lsq", model, {**found, "learned": learned}, LEARNED_BUDGET)


def learn_bits(teacher: nn.Module, text: Tensor, args: argparse.Namespace) -> Row:
    """Bits learned by noise, in the first third of the steps."""
    model = copy.deepcopy(teacher)
    recipe = tq.QAT(tq.Scheme(bits=3), method="pqn", seed=args.seed, budget=tq.Budget(bits=LEARNED_BUDGET))
    tq.quantize_(model, recipe)
    found = train(model, teacher, text, args.steps // 3, args, args.rates[3])
    layers = tq.qat.prepared_layers(model)
    elements = sum(layer.weight.numel() for layer in layers.values())
    nbytes = sum(layer.stored.nbytes for layer in layers.values())
    return {
        "bits": {name: layer.scheme.bits for name, layer in layers.items()},
        "effective_bits": 8 * nbytes / elements,
        "of_budget": 8 * nbytes / elements / LEARNED_BUDGET,
        **found,
    }


def step_times(args: argparse.Namespace) -> Row:
    """Seconds of a step (forward, backward, AdamW) of the prepared model over the float one, in turns."""
    float_model, _ = load_language(args.model, args.text)
    models = {"float": float_model.float().cpu().train()}
    for method in ("lsq", "ste", "pqn"):
        models[method] = copy.deepcopy(models["float"])
        tq.quantize_(models[method], tq.QAT(4, method=method))
    batch = torch.randint(0, 4096, (args.step_batch, LENGTH), generator=torch.Generator().manual_seed(0))
    optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-6) for name, model in models.items()}
    for model in models.values():
        model.train()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(args.turns + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(batch, labels=batch).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: statistics.median(o / f for o, f in zip(own, seconds["float"], strict=True))
        for name, own in seconds.items()
    }
    float_seconds = statistics.median(seconds["float"])
    return {"tokens": batch.numel(), "turns": args.turns, "float_seconds": float_seconds, "ratio": ratios}


def shown(args: argparse.Namespace) -> Row:
    kept = ("batch", "length", "scale_rate", "bits_rate", "seed", "amp", "device")
    return {name: getattr(args, name) for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument(
        "--train", type=Path, nargs="+", required=True, help="texts, and folders of Python sources"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=300, help="of training; 0 only times steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--windows", type=int, default=LONG)
    parser.add_argument("--rates", type=json.loads, default='{"2": 6e-4, "3": 2e-4, "4": 5e-5}')
    parser.add_argument("--scale-rate", type=float, default=0.05, help="of scales, over that of weights")
    parser.add_argument("--bits-rate", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--step-batch", type=int, default=4, help="sequences of a timed step")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each model; 0 times none")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.rates = {int(bits): float(rate) for bits, rate in args.rates.items()}
    results = Record(args.output)
    if args.steps:
        results.write(machine=machine.describe(), trained_on=device_name(args.device))
        run(args, results)
    if args.turns:
        found = {"machine": machine.describe(), **step_times(args)}
        results.write(step_time=found)
        log(f"{found['ratio']}")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else machine.cpu_model()


if __name__ == "__main__":
    main()
