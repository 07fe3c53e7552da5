"""x @ Wᵀ by us and by every peer that can be had, side by side in one process.

    python benches/linear.py [--quick] [--threads 1 2] [--only TEXT ...] [--results FILE]

Weights rotate through a pool that no cache holds, so every call streams its weight from memory, as a model
does; m = 1 is also timed hot, on one layer. All take turns, round by round; with several threads a turn waits
until the workers of the one before no longer spin, then wakes its own by calls that are not counted. Peers
are optional (`peers/*_linear.py`): who is missing, fails or errs is in the record with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import machine
import turboquant_rs as tq
from peers import bitsandbytes_linear, copies, onnxruntime_linear, openvino_linear, torch_linear
from peers.layer import Call, Contender, Layer
from turboquant_rs.ops import cpu

RESULTS = Path(__file__).parent / "results" / "linear.json"
PACKAGES = ("onnx", "onnxruntime", "openvino", "bitsandbytes")  # of the peers; torch is the machine's
POOL = 256 << 20  # bytes of weights that every contender rotates through, at least
WAKE = 0.01  # seconds of uncounted calls at the start of a turn of several threads
PEAK_ROUNDS = 100_000  # of multiplications in registers: some milliseconds


@dataclass(frozen=True)
class Effort:
    """The cells, how many turns each contender gets in one, and seconds a turn (one call at least)."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096), (4096, 14336))
    batches: tuple[int, ...] = (1, 4, 16, 128, 512)
    rounds: int = 5
    turn: float = 0.02


QUICK = Effort(shapes=((4096, 4096),), rounds=3, turn=0.01)


def quant_linear(
    scheme: tq.Scheme,
    bits: int | None,
    activations: str,
    dtype: torch.dtype,
    weight: Tensor,
    threads: int,
) -> Iterator[Layer]:
    """Ours, as users write it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)

    def bind(x: Tensor, layer: nn.Module) -> Call:
        return partial(layer, x.to(dtype))

    while True:
        layer = tq.nn.QuantLinear.from_float(linear, scheme, activations=activations)
        layer.read_bits = bits
        yield Layer(partial(bind, layer=layer), layer.packed.nbytes)


def ours(
    name: str,
    kind: str,
    scheme: tq.Scheme,
    bits: int | None = None,
    activations: str = "int8",
    dtype: torch.dtype = torch.float32,
) -> Contender:
    # The error of few bits is the scheme's, not the product's.
    max_error = {2: 0.7, 3: 0.35}.get(scheme.bits, 0.2)
    layers = partial(quant_linear, scheme, bits, activations, dtype)
    return Contender(f"ours {name}", kind, layers, max_error)


W8, W4, W4_32 = (tq.Scheme(bits=bits, group_size=group) for bits, group in ((8, None), (4, 128), (4, 32)))
NESTED = tq.Scheme.nested(group_size=128)
OURS = [
    ours("W8", "W8A8", W8),
    ours("W4 g128", "W4A8 g128", W4),
    ours("W4 g32", "W4A8 g32", W4_32),
    ours("W3 g128", "W3A8 g128", tq.Scheme(bits=3, group_size=128)),
    ours("W2 g128", "W2A8 g128", tq.Scheme(bits=2, group_size=128)),
    ours("nested g128 at 8 bits", "nested", NESTED, bits=8),
    ours("nested g128 at 4 bits", "nested", NESTED, bits=4),
    ours("W4 g128 f32 activations", "W4A32 g128", W4, activations="float"),
    ours("W4 g128 bf16 activations", "W4A16 g128", W4, activations="float", dtype=torch.bfloat16),
]
PEERS = [
    *torch_linear.CONTENDERS,
    *onnxruntime_linear.CONTENDERS,
    *openvino_linear.CONTENDERS,
    *bitsandbytes_linear.CONTENDERS,
]
# Who competes takes turns next to each other.
CONTENDERS = sorted(OURS + PEERS, key=lambda contender: contender.kind)


@dataclass
class Record:
    """What a run has found so far."""

    cells: list[dict[str, Any]] = field(default_factory=list)
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    limits: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def refuse(self, contender: Contender, reason: str) -> None:
        self.refused[contender.name] = reason.partition("\n")[0]
        print(f"refused: {contender.name}: {self.refused[contender.name]}", flush=True)

    def save(self, path: Path, effort: Effort) -> None:
        limits = {
            limit: {str(threads): digits(statistics.median(seen)) for threads, seen in by_threads.items()}
            for limit, by_threads in self.limits.items()
        }
        record = {
            "machine": machine.describe(),
            "peers": {name: version for name in PACKAGES if (version := installed(name))},
            "pool": POOL,
            "effort": asdict(effort),
            "load": [round(average, 2) for average in os.getloadavg()],
            "limits": limits,
            "contenders": self.contenders,
            "refused": self.refused,
            "cells": self.cells,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def measure(record: Record, contenders: list[Contender], shape: tuple[int, int], effort: Effort) -> None:
    """All cells of one shape, with as many threads as torch has."""
    threads = torch.get_num_threads()
    for limit, seen in limits().items():
        record.limits.setdefault(limit, {}).setdefault(threads, []).append(seen)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    pools = {c: pool for c in contenders if (pool := make_pool(record, c, weight))}
    for m in effort.batches:
        x = torch.randn(m, shape[1], generator=generator)
        product = x @ weight.T
        pools = {c: pool for c, pool in pools.items() if verified(record, c, pool[0], x, product)}
        for hot in (False, True) if m == 1 else (False,):
            before = machine.processor_seconds()
            seconds = take_turns({c: pool[:1] if hot else pool for c, pool in pools.items()}, x, effort)
            cell: dict[str, Any] = {"n": shape[0], "k": shape[1], "m": m, "threads": threads, "hot": hot}
            cell["others"] = machine.used_by_others(before)
            cell["milliseconds"] = {c.name: digits(1e3 * t) for c, t in seconds.items()}
            cell["gops"] = {c.name: digits(2e-9 * m * weight.numel() / t) for c, t in seconds.items()}
            if m == 1:
                stored = {c: pool[0].nbytes for c, pool in pools.items()}
                cell["gigabytes_per_second"] = {
                    c.name: digits(stored[c] / t / 1e9) for c, t in seconds.items()
                }
            record.cells.append(cell)
            show(cell)


def make_pool(record: Record, contender: Contender, weight: Tensor) -> list[Layer]:
    """Layers of one contender, none where it can make none."""
    try:
        layers = contender.layers(weight, torch.get_num_threads())
        first = next(layers)
        return [first, *itertools.islice(layers, -(-POOL // first.nbytes) - 1)]
    except Exception as error:
        record.refuse(contender, f"{type(error).__name__}: {error}")
        return []


def verified(record: Record, contender: Contender, layer: Layer, x: Tensor, product: Tensor) -> bool:
    """Whether the result is near the product of the floats; if not, the contender is out."""
    try:
        y = torch.as_tensor(layer.bind(x)()).float()
    except Exception as failure:
        record.refuse(contender, f"{type(failure).__name__}: {failure}")
        return False
    error = float((y - product).norm() / product.norm())
    if not error < contender.max_error:
        record.refuse(contender, f"relative error {error:.2f} at m = {len(x)}")
        return False
    bits = 8 * layer.nbytes / (product.shape[1] * x.shape[1])
    about = {"kind": contender.kind, "bits": digits(bits), "error": 0.0}
    found = record.contenders.setdefault(contender.name, about)
    found["error"] = max(found["error"], digits(error))
    return True


def take_turns(pools: dict[Contender, list[Layer]], x: Tensor, effort: Effort) -> dict[Contender, float]:
    """Seconds a call of each: the median of the medians of its turns."""
    calls = {contender: rotation(pool, x, effort) for contender, pool in pools.items()}
    turns: dict[Contender, list[float]] = {contender: [] for contender in calls}
    for _ in range(effort.rounds):
        for contender, seen in turns.items():
            seen.append(turn(calls[contender], effort.turn))
    return {contender: statistics.median(seen) for contender, seen in turns.items()}


def rotation(pool: list[Layer], x: Tensor, effort: Effort) -> Iterator[Call]:
    """Calls in rotation, each made once before: enough of them that no turn meets a layer twice.

    Between two turns the weights of all the others go through the caches.
    """
    first = pool[0].bind(x)
    start = time.perf_counter()
    first()
    enough = 2 + int(2 * (WAKE + effort.turn) / (time.perf_counter() - start))
    others = [layer.bind(x) for layer in pool[1:enough]]
    for call in others:
        call()
    return itertools.cycle((first, *others))


def turn(calls: Iterator[Call], seconds: float) -> float:
    """The median time of the calls of one turn."""
    if torch.get_num_threads() > 1:
        hush()
        awake = time.perf_counter() + WAKE
        while time.perf_counter() < awake:
            next(calls)()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        call = next(calls)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def hush() -> None:
    """Waits until no worker of the turn before spins: OpenMP's do for 10 ms, ONNX Runtime's for 40."""
    last = time.perf_counter() + 2
    while time.perf_counter() < last:
        before = time.process_time()
        time.sleep(0.005)
        if time.process_time() - before < 0.0005:
            return


def limits() -> dict[str, float]:
    """GB/s at which the core reads memory, GOP/s at which it multiplies in registers."""
    threads = torch.get_num_threads()

    def per_nanosecond(work: Callable[[], float]) -> float:
        rates = []
        for _ in range(9):
            start = time.perf_counter()
            done = work()
            rates.append(done / (time.perf_counter() - start) / 1e9)
        return statistics.median(rates)

    read = copies.plain_read(POOL)

    def read_pool() -> int:
        read()
        return POOL

    return {
        "read_gigabytes_per_second": per_nanosecond(read_pool),
        "int8_gops": per_nanosecond(lambda: 2 * cpu.multiply_peak("int8", PEAK_ROUNDS, threads)),
        "float_gops": per_nanosecond(lambda: 2 * cpu.multiply_peak("float", PEAK_ROUNDS, threads)),
    }


def digits(value: float) -> float:
    """Four of them."""
    return float(f"{value:.4g}")


def installed(package: str) -> str | None:
    """The version of a package, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def show(cell: dict[str, Any]) -> None:
    hot = " hot" if cell["hot"] else ""
    others = "" if cell["others"] is None else f", others at work on {cell['others']} cores"
    print(f"\n{cell['n']}x{cell['k']}, m = {cell['m']}{hot}, threads: {cell['threads']}{others}")
    bandwidth = cell.get("gigabytes_per_second", {})
    for name, milliseconds in cell["milliseconds"].items():
        read = f"{bandwidth[name]:8.1f} GB/s" if bandwidth else ""
        print(f"  {name:30} {milliseconds:10.3f} ms {cell['gops'][name]:8.1f} GOP/s {read}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one shape, fewer turns; recorded only by --results"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (1 2)")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="only contenders whose names contain a TEXT"
    )
    parser.add_argument("--results", type=Path, help=f"JSON file to record in (results/{RESULTS.name})")
    options = parser.parse_args()

    effort = QUICK if options.quick else Effort()
    path = options.results or (None if options.quick or options.only else RESULTS)
    chosen = [c for c in CONTENDERS if not options.only or any(text in c.name for text in options.only)]
    record = Record()
    with torch.no_grad():
        for threads, shape in itertools.product(sorted(options.threads), effort.shapes):
            torch.set_num_threads(threads)
            measure(record, chosen, shape, effort)
    if path:
        record.save(path, effort)


if __name__ == "__main__":
    main()
