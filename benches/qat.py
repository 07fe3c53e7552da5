"""How much of what rounding loses training brings back, recorded in results/qat.json.

    python benches/qat.py --model DIR --text FILE --train FILE_OR_DIR [...]

A causal language model is prepared, distilled from itself in float on the training texts (loss: KL of the
float model's distribution and the prepared one's, nothing else), converted, and measured on --text: mean KL
to float, the share of what rounding to the same bits loses that it wins back, and perplexity ratio, weights
only, over the first 8 and the first 128 windows of 512 tokens. Intervals are of 95 %, from 2,000 resamplings
of the windows. Passages of the training texts that share runs of words with --text are left out.

Every row is written as soon as it is measured, and several processes may share one file. Rows of variants
that are not measured this time (--only) keep their record, each with the arguments it was made with. Also
recorded: whether the converted model equals the prepared one in evaluation bit for bit, int8
activations included, on the CPU; and the time of a training step of the prepared model over that of the float
one, on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import machine
import turboquant_rs as tq
from precision import Values, interval
from quality import load_language
from turboquant_rs import quality

RESULTS = Path(__file__).parent / "results" / "qat.json"
LENGTH, SHORT, LONG = 512, 8, 128  # tokens a window, windows
PASSAGE, RUN, SHARED = 100, 8, 0.02  # lines, words of a run, and the share of runs that marks a copy
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


def runs(text: str) -> set[int]:
    """Hashes of all runs of consecutive words."""
    words = text.split()
    return {hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)}


def training_tokens(folder: Path, paths: Sequence[Path], text: Path) -> tuple[Tensor, Row]:
    """All training texts as tokens (n,), without the passages that share runs of words with `text`."""
    from tokenizers import Tokenizer

    known = runs(text.read_text(encoding="utf-8"))
    kept, files, passages = [], 0, 0
    for path in sources(paths):
        lines = path.read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True)
        files += 1
        for start in range(0, len(lines), PASSAGE):
            passage = "".join(lines[start : start + PASSAGE])
            own = runs(passage)
            passages += 1
            if len(own & known) <= SHARED * len(own):
                kept.append(passage)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode_batch(kept, add_special_tokens=False)
    tokens = torch.from_numpy(np.concatenate([np.array(own.ids, np.int64) for own in encoded]))
    facts = {"files": files, "passages": len(kept), "passages_left_out": passages - len(kept)}
    return tokens, facts | {"tokens": len(tokens)}


# Training


def scales_apart(model: nn.Module, rate: float, scale_rate: float, bits_rate: float) -> list[Row]:
    """Parameter groups: weights, learned scales, learned bits. Rates are tensors: a graph reads them anew."""
    groups: dict[str, list[nn.Parameter]] = {"weight": [], "scale": [], "bits": []}
    for name, parameter in model.named_parameters():
        kind = name.rpartition("weight_")[2]
        groups[kind if kind in groups else "weight"].append(parameter)
    rates, device = {"weight": rate, "scale": scale_rate, "bits": bits_rate}, next(model.parameters()).device
    return [
        {"params": own, "lr": torch.zeros((), device=device), "peak": rates[kind]}
        for kind, own in groups.items()
        if own
    ]


class Step:
    """A step of training: gradients of all widths add up, then the parameters move.

    A step is thousands of launches, so on a GPU it is captured as a CUDA graph, one for each choice of widths
    that the sandwich may draw; noise is drawn by the host, and is not.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace
    ) -> None:
        self.model, self.teacher, self.optimizer, self.args = model, teacher, optimizer, args
        layers = tq.qat.prepared_layers(model).values()
        self.nested = any(layer.scheme.is_nested for layer in layers)
        self.device = next(model.parameters()).device
        self.batch = torch.zeros(args.batch, args.length, dtype=torch.int64, device=self.device)
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if self.device.type == "cuda" and not any(layer.qat.rounding.is_stochastic for layer in layers):
            for step in range(64):  # enough to draw every choice
                if (widths := tuple(self.widths(step))) not in self.graphs:
                    self.graphs[widths] = self.captured(step)

    def widths(self, step: int) -> Iterator[int]:
        """The layers read these bits, one after the other; 0 for all there are."""
        if not self.nested:
            return iter((0,))
        return tq.sandwich(self.model, NESTED_BITS, step=step, seed=self.args.seed)

    def run(self, step: int) -> Tensor:
        """The step itself; gives the loss of the last width."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp)
        with torch.no_grad(), autocast:
            goal = self.teacher(self.batch).logits.float().log_softmax(-1)
        for width in self.widths(step):
            with autocast:
                logits = self.model(self.batch).logits
            loss = divergence(goal, logits.float().log_softmax(-1)).mean()
            (loss * self.args.shares.get(width, 1.0)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def captured(self, step: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step as a graph, and where its loss will be. Rates are 0 meanwhile; AdamW remembers nothing."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run(step)
                self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            loss = self.run(step)
        self.optimizer.zero_grad(set_to_none=True)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        return graph, loss

    def __call__(self, batch: Tensor, step: int) -> Tensor:
        """Trains on a batch; gives the loss of the last width."""
        self.batch.copy_(batch)
        if not self.graphs:
            loss = self.run(step)
            self.optimizer.zero_grad(set_to_none=True)
            return loss
        graph, loss = self.graphs[tuple(self.widths(step))]
        graph.replay()
        return loss.clone()


def train(
    model: nn.Module, teacher: nn.Module, tokens: Tensor, steps: int, args: argparse.Namespace, rate: float
) -> Row:
    """Distils `teacher` into the prepared `model`: AdamW, linear warm-up over a tenth, cosine to 0."""
    model.train()
    groups = scales_apart(model, rate, rate * args.scale_rate, args.bits_rate)
    device, start = next(model.parameters()).device, time.perf_counter()
    betas, graphs = tuple(args.betas), device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=0.0, fused=True, capturable=graphs)
    one_step = Step(model, teacher, optimizer, args)
    generator = torch.Generator().manual_seed(args.seed)
    tokens, window, losses = tokens.to(device), torch.arange(args.length, device=device), []
    for step in range(steps):
        factor = min(1.0, (step + 1) / max(1, steps // 10)) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"].fill_(group["peak"] * factor)
        at = torch.randint(0, len(tokens) - args.length, (args.batch, 1), generator=generator)
        losses.append(one_step(tokens[at.to(device) + window], step))
        if step % max(1, steps // 8) == 0:
            log(f"    step {step} loss {float(losses[-1]):.5f} {time.perf_counter() - start:.1f} s")
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return {
        "steps": steps,
        "tokens": steps * args.batch * args.length,
        "loss": float(torch.stack(tail).mean()),
        "seconds": time.perf_counter() - start,
        "rate": rate,
    }


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL in nats of each prediction, from log-probabilities (..., words)."""
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


# Measuring


@torch.no_grad()
def answers(model: nn.Module, windows: Tensor) -> Iterator[Tensor]:
    """Log-probabilities (windows, tokens, words), a few windows at a time."""
    device = next(model.parameters()).device
    for part in windows.split(SHORT):
        yield model(part.to(device)).logits.float().log_softmax(-1)


class Judge:
    """The float model's answers, to hold others against."""

    def __init__(self, teacher: nn.Module, windows: Tensor) -> None:
        self.windows = windows
        self.scores = list(answers(teacher, windows))

    def divergences(self, model: nn.Module) -> tuple[Values, Values]:
        """Of each window: the mean KL, and by how much the negative log-likelihood of its text rose."""
        kl, rise = [], []
        for p, q, window in zip(
            self.scores, answers(model, self.windows), self.windows.split(SHORT), strict=True
        ):
            kl += divergence(p, q).mean(-1).tolist()
            following = window[:, 1:, None].to(q.device)
            rise += (p - q)[:, :-1].gather(2, following).mean((1, 2)).tolist()
        return np.array(kl), np.array(rise)

    def measure(self, model: nn.Module, rounded: Values | None = None) -> tuple[Row, Values]:
        """KL (nats), perplexity ratio and, against the KL of rounding, the share that is won back, over the
        first windows and over all, with intervals; and the KL of each window."""
        kl, rise = self.divergences(model)
        found: Row = {}
        for count, tail in ((SHORT, ""), (len(kl), f"_{len(kl)}")):
            found[f"kl{tail}"] = interval(lambda chosen: float(kl[chosen].mean()), count)
            found[f"perplexity_ratio{tail}"] = interval(lambda c: math.exp(rise[c].mean()), count)
            if rounded is not None:
                found[f"recovered{tail}"] = interval(
                    lambda c: float(1 - kl[c].mean() / rounded[c].mean()), count
                )
        return found, kl


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


def variants(args: argparse.Namespace) -> Iterator[tuple[str, tq.Scheme, str, float]]:
    """Name, scheme, method, and peak rate of the weights."""
    for bits, method in ((4, "lsq"), (3, "lsq"), (2, "lsq"), (2, "elastic"), (2, "ste")):
        yield f"{method} {bits}", tq.Scheme(bits=bits), method, args.rates[bits]
    yield "lsq nested", NESTED, "lsq", args.rates[3]


class Record:
    """The results file, written after every row: rows of the same name and bits are replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, row: Row) -> None:
        with self.locked() as content:
            key = (row["name"], row["bits"])
            rows = content.setdefault("rows", [])
            content["rows"] = [r for r in rows if (r["name"], r["bits"]) != key] + [row]

    def write(self, **facts: Any) -> None:
        with self.locked() as content:
            content.update(facts)

    @contextmanager
    def locked(self) -> Iterator[Row]:
        """What the file holds; changes go back into it, those of one process at a time."""
        with self.path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = json.loads(file.read() or "{}")
            yield content
            file.seek(0)
            file.truncate()
            file.write(json.dumps(content, indent=1) + "\n")


def run(args: argparse.Namespace, results: Record) -> None:
    """Every variant that is asked for."""
    float_model, tokens = load_language(args.model, args.text)
    teacher = float_model.float().to(args.device).eval()
    judge = Judge(teacher, quality.windows(tokens, args.windows))
    text, facts = training_tokens(args.model, args.train, args.text)
    log(f"{facts}")
    results.write(model=args.model.name, text={"windows": args.windows, "length": LENGTH}, training=facts)

    def note(row: Row) -> None:
        results.add(row)
        figures = {key: own["value"] for key, own in row.items() if isinstance(own, dict) and "value" in own}
        log(f"  {row['name']} {row['bits']}: {', '.join(f'{key} {x:.5f}' for key, x in figures.items())}")

    known: dict[tuple[str, int], Values] = {}  # name and bits to the KL of each window

    def rounded(scheme: tq.Scheme, bits: int) -> Values:
        """The KL of rounding alone, measured once."""
        name = "rounded nested" if scheme.is_nested else "rounded"
        if (name, bits) not in known:
            plain = copy.deepcopy(teacher)
            tq.quantize_(plain, scheme, progress=False)
            own, known[name, bits] = judge.measure(floats(plain, bits if scheme.is_nested else None))
            note({"name": name, "bits": bits, **own})
        return known[name, bits]

    def record(
        name: str, trained: nn.Module, scheme: tq.Scheme, row: Row, effective: float | None = None
    ) -> None:
        """Measures a trained model against rounding with `scheme`."""
        row = {"name": name, **row, **shown(args), "convert": converted(trained, judge.windows[0])}
        log(f"  {name}: {row['convert']}")
        for bits in NESTED_BITS if scheme.is_nested else (scheme.bits,):
            ours = floats(trained, bits if scheme.is_nested else None).to(args.device)
            own, _ = judge.measure(ours, rounded(scheme, bits))
            note({**row, "bits": effective or bits, **own})

    for name, scheme, method, rate in variants(args):
        if args.only is not None and name not in args.only:
            continue
        log(name)
        model = copy.deepcopy(teacher)
        tq.quantize_(model, tq.QAT(scheme, method=method), activations="int8")
        record(name, model, scheme, train(model, teacher, text, args.steps, args, rate))
    if args.only is None or "learned" in args.only:
        learned, model = learn_bits(teacher, text, args)
        log(f"learned: {learned}")
        schemes = {name: tq.Scheme(bits=bits) for name, bits in learned["bits"].items()}
        plain = copy.deepcopy(teacher)
        tq.quantize_(plain, schemes, progress=False)
        own, _ = judge.measure(floats(plain), rounded(tq.Scheme(bits=3), 3))
        note({"name": "rounded, learned bits", "bits": LEARNED_BUDGET, **own})
        tq.quantize_(model, tq.QAT(schemes))
        found = train(model, teacher, text, args.steps - learned["steps"], args, args.rates[3])
        uniform = tq.Scheme(bits=3)
        record("learned bits, then lsq", model, uniform, {**found, "learned": learned}, LEARNED_BUDGET)
    if args.only is None:
        for scheme in (*(tq.Scheme(bits=bits) for bits in (4, 3, 2)), NESTED):
            for bits in NESTED_BITS if scheme.is_nested else (scheme.bits,):
                rounded(scheme, bits)


def learn_bits(teacher: nn.Module, text: Tensor, args: argparse.Namespace) -> tuple[Row, nn.Module]:
    """Bits learned by noise in the first sixth of the steps, and the float model that was trained by then."""
    model = copy.deepcopy(teacher)
    recipe = tq.QAT(tq.Scheme(bits=3), method="pqn", seed=args.seed, budget=tq.Budget(bits=LEARNED_BUDGET))
    tq.quantize_(model, recipe)
    found = train(model, teacher, text, args.steps // 6, args, args.rates[3])
    layers = tq.qat.prepared_layers(model)
    elements = sum(layer.weight.numel() for layer in layers.values())
    nbytes = sum(layer.stored.nbytes for layer in layers.values())
    trained = copy.deepcopy(teacher)
    names = trained.state_dict().keys()
    trained.load_state_dict({name: x for name, x in model.state_dict().items() if name in names})
    return {
        "bits": {name: layer.scheme.bits for name, layer in layers.items()},
        "effective_bits": 8 * nbytes / elements,
        "of_budget": 8 * nbytes / elements / LEARNED_BUDGET,
        **found,
    }, trained


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
    kept = ("batch", "length", "betas", "scale_rate", "bits_rate", "shares", "seed", "amp")
    return {name: getattr(args, name) for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument(
        "--train", type=Path, nargs="+", required=True, help="texts, and folders of Python sources"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=1365, help="of training; 0 only times steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--windows", type=int, default=LONG)
    parser.add_argument("--rates", type=json.loads, default='{"2": 3e-4, "3": 1e-4, "4": 5e-5}')
    parser.add_argument("--scale-rate", type=float, default=0.05, help="of scales, over that of weights")
    parser.add_argument("--betas", type=float, nargs=2, default=(0.95, 0.99))
    parser.add_argument("--bits-rate", type=float, default=0.03)
    parser.add_argument(
        "--shares", type=json.loads, default='{"2": 0.1, "3": 0.5}', help="of the bits in a sandwich's loss"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--step-batch", type=int, default=4, help="sequences of a timed step")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each model; 0 times none")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    for name in ("rates", "shares"):
        setattr(args, name, {int(bits): float(value) for bits, value in getattr(args, name).items()})
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
