"""x @ Wᵀ by us and by every peer that can be had, side by side in one process.

    python benches/linear.py [--quick] [--threads 1 2] [--only TEXT ...] [--results FILE]

Weights rotate through a pool that no cache holds, so every call streams its weight from memory, as a model
does; m = 1 is also timed hot, on one layer. All take turns, round by round; a turn starts with calls that are
not counted, until the threads of the turn before have gone to sleep. The peers (`peers/*_linear.py`) are
optional: who is missing, fails or errs is named in the record with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
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

RESULTS = Path(__file__).parent / "results" / "linear.json"
PACKAGES = ("onnx", "onnxruntime", "openvino", "bitsandbytes")  # of the peers; torch is the machine's
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
BATCHES = (1, 4, 16, 128, 512)
POOL = 256 << 20  # bytes of weights that every contender rotates through, at least
SETTLE = 0.015  # seconds of uncounted calls at the start of a turn: OpenMP's workers spin about that long
NO_PEAK = "no peak of the multipliers: nothing here measures it, and the best of the products is not it"


@dataclass(frozen=True)
class Effort:
    """How many turns each contender gets in a cell, and how many seconds a turn (one call at least)."""

    rounds: int
    turn: float


FULL, QUICK = Effort(rounds=5, turn=0.03), Effort(rounds=3, turn=0.01)


def quant_linear(
    scheme: tq.Scheme, bits: int | None, activations: str, weight: Tensor, threads: int
) -> Iterator[Layer]:
    """Ours, as users write it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    while True:
        layer = tq.nn.QuantLinear.from_float(linear, scheme, activations=activations)
        layer.read_bits = bits
        nbytes = layer.packed.nbytes
        yield Layer(lambda x, layer=layer: partial(layer, x), nbytes)


def ours(
    name: str, kind: str, scheme: tq.Scheme, bits: int | None = None, activations: str = "int8"
) -> Contender:
    # The error of few bits is the scheme's, not the product's.
    max_error = {2: 0.7, 3: 0.35}.get(scheme.bits, 0.2)
    return Contender(f"ours {name}", kind, partial(quant_linear, scheme, bits, activations), max_error)


W8, W4, W4_32 = (tq.Scheme(bits=bits, group_size=group) for bits, group in ((8, None), (4, 128), (4, 32)))
NESTED = tq.Scheme.nested(group_size=128)
OURS = [
    ours("W8", "W8", W8),
    ours("W4 g128", "W4 g128", W4),
    ours("W4 g32", "W4 g32", W4_32),
    ours("W3 g128", "W3", tq.Scheme(bits=3, group_size=128)),
    ours("W2 g128", "W2", tq.Scheme(bits=2, group_size=128)),
    ours("nested g128 at 8 bits", "nested", NESTED, bits=8),
    ours("nested g128 at 4 bits", "nested", NESTED, bits=4),
    ours("W4 g128 float activations", "W4 float", W4, activations="float"),
]
PEERS = [
    *torch_linear.CONTENDERS,
    *onnxruntime_linear.CONTENDERS,
    *openvino_linear.CONTENDERS,
    *bitsandbytes_linear.CONTENDERS,
]


@dataclass
class Record:
    """What a run has found so far."""

    cells: list[dict[str, Any]] = field(default_factory=list)
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    read: dict[int, list[float]] = field(default_factory=dict)

    def refuse(self, contender: Contender, reason: str) -> None:
        self.refused[contender.name] = reason.partition("\n")[0]
        print(f"refused: {contender.name}: {self.refused[contender.name]}", flush=True)

    def save(self, path: Path, effort: Effort) -> None:
        read = {str(threads): digits(statistics.median(seen)) for threads, seen in self.read.items()}
        record = {
            "machine": machine.describe(),
            "peers": {name: version for name in PACKAGES if (version := installed(name))},
            "pool": POOL,
            "effort": asdict(effort),
            "load": [round(average, 2) for average in os.getloadavg()],
            "limits": {"read_gigabytes_per_second": read, "note": NO_PEAK},
            "contenders": self.contenders,
            "refused": self.refused,
            "cells": self.cells,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def measure(record: Record, contenders: list[Contender], shape: tuple[int, int], effort: Effort) -> None:
    """All cells of one shape, with as many threads as torch has."""
    threads = torch.get_num_threads()
    record.read.setdefault(threads, []).append(read_bandwidth())
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    pools = {c: pool for c in contenders if (pool := make_pool(record, c, weight))}
    for m in BATCHES:
        x = torch.randn(m, shape[1], generator=generator)
        product = x @ weight.T
        pools = {c: pool for c, pool in pools.items() if verified(record, c, pool[0], x, product)}
        for hot in (False, True) if m == 1 else (False,):
            seconds = take_turns({c: pool[:1] if hot else pool for c, pool in pools.items()}, x, effort)
            cell = {"n": shape[0], "k": shape[1], "m": m, "threads": threads, "hot": hot}
            record.cells.append(cell | figures(seconds, 2 * m * weight.numel(), pools if m == 1 else {}))
            show(record.cells[-1])


def make_pool(record: Record, contender: Contender, weight: Tensor) -> list[Layer]:
    """Layers of one contender, none where it can make none."""
    try:
        layers = contender.layers(weight, torch.get_num_threads())
        first = next(layers)
        record.contenders[contender.name] = {"kind": contender.kind, "error": 0.0}
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
    entry = record.contenders[contender.name]
    entry["error"] = max(entry["error"], digits(error))
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
    """Calls in rotation, each made before: as many as a turn makes, so that none of it meets a layer twice.

    Between two turns the weights of all the others go through the caches.
    """
    first = pool[0].bind(x)
    first()
    start = time.perf_counter()
    first()
    seconds = time.perf_counter() - start
    enough = 2 + int(2 * (SETTLE + effort.turn) / seconds)
    calls = [first, *(layer.bind(x) for layer in pool[1:enough])]
    for call in calls:
        call()
    return itertools.cycle(calls)


def turn(calls: Iterator[Call], seconds: float) -> float:
    """The median time of the calls of one turn."""
    start = time.perf_counter()
    while time.perf_counter() < start + SETTLE:
        next(calls)()
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() < begin + seconds:
        call = next(calls)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth() -> float:
    """GB/s at which the core reads memory."""
    read = copies.plain_read(POOL)
    return POOL / statistics.median(seconds(read) for _ in range(9)) / 1e9


def figures(
    seconds: dict[Contender, float], operations: int, pools: dict[Contender, list[Layer]]
) -> dict[str, dict[str, float]]:
    """Milliseconds, GOP/s, and GB/s of stored weight where `pools` is given."""
    bandwidth = {c.name: digits(pools[c][0].nbytes / t / 1e9) for c, t in seconds.items() if c in pools}
    return {
        "milliseconds": {c.name: digits(1e3 * t) for c, t in seconds.items()},
        "gops": {c.name: digits(operations / t / 1e9) for c, t in seconds.items()},
    } | ({"gigabytes_per_second": bandwidth} if bandwidth else {})
