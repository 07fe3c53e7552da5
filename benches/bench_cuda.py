"""Packing and unpacking on a GPU beside a copy and beside torch.compile, in one process.

    python benches/bench_cuda.py [--quick] [--only TEXT] [--results FILE]

Every contender is captured in a CUDA graph and replayed; the figure is the median over replays, and a table's
rows take turns. A replay that counts comes right behind one of the same contender that does not: so nobody
waits for the GPU to wake, and everybody writes to memory what it has itself left in the L2 cache, which of a
copy is tens of megabytes. Tensors are random and several times the size of that cache. GB/s count each byte
that has to be read and written once. A rival does the same job by the textbook; its bits are its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import machine
import turboquant_rs as tq
from turboquant_rs import Rounding, Scheme, ops
from turboquant_rs.nn import QuantLinear

RESULTS = Path(__file__).parent / "results" / "cuda.json"
ROWS, K = 8192, 8192
ROUNDS = 40
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"

Call = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """A way of packing, or of unpacking, and how a rival does it."""

    name: str
    scheme: Scheme
    rounding: Rounding
    rival: Callable[..., Any] | None = None
    unpack: bool = False


# The rivals: what one writes in PyTorch -------------------------------------------------------------------


def symmetric(x: Tensor, bits: int, group: int, stochastic: bool) -> tuple[Tensor, Tensor]:
    groups, top = x.view(-1, group).float(), 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / top
    t = groups / scale
    t = (t + torch.rand_like(t)).floor() if stochastic else t.round()
    return t.clamp(-top - 1, top).to(torch.int8), scale.bfloat16()


def asymmetric(x: Tensor, bits: int, group: int, stochastic: bool) -> tuple[Tensor, Tensor, Tensor]:
    groups, top = x.view(-1, group).float(), 2**bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / top).clamp(min=1e-30)
    zero = (-low / scale).round()
    t = groups / scale
    t = (t + torch.rand_like(t)).floor() if stochastic else t.round()
    codes = (t + zero).clamp(0, top).to(torch.uint8)
    packed, fields = codes[..., :: 8 // bits], range(1, 8 // bits)
    for i in fields:
        packed = packed | codes[..., i :: 8 // bits] << bits * i
    return packed, scale.bfloat16(), zero.to(torch.uint8)


def signs(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.view(-1, 128).float()
    bits = (groups >= 0).view(-1, 16, 8).to(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=x.device)
    return (bits << shifts).sum(-1, dtype=torch.uint8), (2 * groups.abs().mean(-1)).bfloat16()


def unpacked(packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    codes = torch.stack((packed & 15, packed >> 4), -1).view(packed.shape[0], -1)
    return ((codes.float() - zero.float()) * scale.float()).bfloat16()


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.float() * scale.float()).bfloat16()


def pack_rival(function: Callable[..., Any], *args: Any) -> Callable[[Tensor], Any]:
    return lambda x: function(x, *args)


G128, IID = Scheme(bits=4, group_size=128, symmetric=False), Rounding.stochastic(1)
INT8 = Scheme(bits=8, group_size=128)
NEAREST = Rounding.nearest()
JOBS = (
    Job("int8 g128", INT8, NEAREST, pack_rival(symmetric, 8, 128, False)),
    Job("int8 g128, iid", INT8, IID, pack_rival(symmetric, 8, 128, True)),
    Job("int8 per row", Scheme(bits=8, group_size=None), NEAREST, pack_rival(symmetric, 8, K, False)),
    Job("int4 g128 asymmetric", G128, NEAREST, pack_rival(asymmetric, 4, 128, False)),
    Job("int4 g128 symmetric", Scheme(bits=4, group_size=128), NEAREST),
    Job("int4 g32 asymmetric", Scheme(bits=4, group_size=32, symmetric=False), NEAREST,
        pack_rival(asymmetric, 4, 32, False)),
    Job("int4 g128 asymmetric, iid", G128, IID, pack_rival(asymmetric, 4, 128, True)),
    Job("int4 g128 asymmetric, systematic", G128, Rounding.stochastic(1, mode="systematic")),
    Job("int4 g128 asymmetric, stratified", G128, Rounding.stochastic(1, mode="stratified")),
    Job("int4 g128 symmetric, mean+var", Scheme(bits=4, group_size=128),
        Rounding.stochastic(1, preserve="mean+var")),
    Job("int4 g64 mse", Scheme(bits=4, scale="mse"), NEAREST),
    Job("int3 g64", Scheme(bits=3), NEAREST),
    Job("int2 g64 asymmetric", Scheme(bits=2, group_size=64, symmetric=False), NEAREST,
        pack_rival(asymmetric, 2, 64, False)),
    Job("1 bit g128", Scheme(bits=1, group_size=128), NEAREST, signs),
    Job("nested (4, 4) g64", Scheme.nested(), NEAREST),
    Job("nf4 g64", Scheme(levels="nf4"), NEAREST),
    Job("unpack int4 g128 to bf16", G128, NEAREST, unpacked, unpack=True),
    Job("unpack int8 g128 to bf16", INT8, NEAREST, dequantized, unpack=True),
    Job("unpack int3 g64 to bf16", Scheme(bits=3), NEAREST, unpack=True),
    Job("unpack nested (4, 4) to bf16", Scheme.nested(), NEAREST, unpack=True),
    Job("unpack int4 g128 subtractive", Scheme(bits=4, group_size=128),
        Rounding.stochastic(1, mode="subtractive"), unpack=True),
)  # fmt: skip


# Timing ----------------------------------------------------------------------------------------------------


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """The call as a graph, after two calls that compile and allocate."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Seconds a replay of each, in turns."""
    graphs = {name: captured(call) for name, call in calls.items()}
    seen: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 3):
        for name, graph in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if turn >= 3:
                seen[name].append(start.elapsed_time(stop) / 1e3)
    return {name: statistics.median(times) for name, times in seen.items()}


def calls_of(job: Job, x: Tensor, eager: bool) -> tuple[dict[str, Call], int]:
    """The contenders of a job by name, and the bytes that have to be moved."""
    args = (*job.scheme.op_args(), *job.rounding.op_args(), list(job.scheme.planes or ()))
    stored = ops.pack(x, *args, False)
    moved = x.nbytes + sum(part.nbytes for part in stored)
    inputs: tuple[Tensor, ...]
    if job.unpack:
        out = torch.empty_like(x)
        calls: dict[str, Call] = {"ours": lambda: ops.unpack_out(*stored, *args, job.scheme.bits, out)}
        form = asymmetric if job.rival is unpacked else symmetric
        inputs = form(x, job.scheme.bits, 128, False)
    else:
        calls = {"ours": lambda: ops.pack_out(x, *args, False, *stored)}
        inputs = (x,)
    if job.rival is not None:
        rival = job.rival
        compiled = torch.compile(rival, dynamic=False)
        calls["torch.compile"] = lambda: compiled(*inputs)
        if eager:
            calls["torch eager"] = lambda: rival(*inputs)
    return calls, moved


def rows(jobs: Iterator[Job], rounds: int, eager: bool) -> Iterator[dict[str, Any]]:
    x = torch.randn(ROWS, K, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
    target = torch.empty_like(x)
    for job in jobs:
        calls, moved = calls_of(job, x, eager)
        times = medians({"copy": lambda: target.copy_(x), **calls}, rounds)
        copy = 2 * x.nbytes / times.pop("copy")
        speed = {name: moved / seconds for name, seconds in times.items()}
        yield {
            "row": job.name,
            "seconds": times["ours"],
            "copy_gigabytes_per_second": copy / 1e9,
            "gigabytes_per_second": {name: value / 1e9 for name, value in speed.items()},
            "of_copy": {name: value / copy for name, value in speed.items()},
        }


def eager_calls() -> dict[str, float]:
    """Microseconds of the CPU that a call costs which the GPU finishes at once."""
    x = torch.randn(16, 128, device="cuda")
    p = tq.pack(x)
    out = torch.empty_like(x)
    args = (*p.scheme.op_args(), *p.rounding.op_args(), list(p.scheme.widths), 4)
    stored = (p.packed, p.scales, p.packed.new_empty(0))
    calls: dict[str, Call] = {
        "unpack_out": lambda: ops.unpack_out(*stored, *args, out),
        "dequantize": p.dequantize,
        "pack, which waits": lambda: tq.pack(x),
        "torch.add": lambda: torch.add(x, x, out=out),
        **row_calls(),
    }
    with torch.no_grad():
        return {name: microseconds(call) for name, call in calls.items()}


def row_calls() -> dict[str, Call]:
    """Products of one row of x, with bias: called as a layer calls them, layers, and the bf16 layer."""
    linear = torch.nn.Linear(1024, 1024, device="cuda", dtype=torch.bfloat16)
    x, bias = torch.randn(1, 1024, device="cuda").bfloat16(), linear.bias
    scheme = Scheme(bits=4, group_size=128)
    args = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths)
    tiles = ops.to_tiles(*ops.pack(linear.weight.detach(), *args, False), scheme.widths, 1024)
    product = ops.cuda.Product(*tiles, 1024, *args, 4, "float", "tiles", 1024).__call__
    layers = {how: QuantLinear.from_float(linear, scheme, activations=how) for how in ("float", "int8")}
    return {
        "product of one row": lambda: product(x, bias),
        **{f"layer, one row, {how}": partial(layer, x) for how, layer in layers.items()},
        "bf16 layer, one row": partial(linear, x),
    }


def microseconds(call: Call, count: int = 500) -> float:
    import time

    for _ in range(50):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    stop = time.perf_counter()
    torch.cuda.synchronize()
    return 1e6 * (stop - start) / count


def clocks() -> str:
    """Clocks, temperature and power as nvidia-smi tells them now."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def write(path: Path, **found: Any) -> None:
    """Records what was found beside the machine and its GPU as it is now."""
    gpu = {"gpu": torch.cuda.get_device_name(), "clocks": {CLOCKS: clocks()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine.describe(), **gpu, **found}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no rivals")
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch._dynamo.config.cache_size_limit = 64
    jobs = (job for job in JOBS if options.only in job.name)
    if options.quick:
        jobs = (Job(job.name, job.scheme, job.rounding, None, job.unpack) for job in jobs)
    recorded = []
    for row in rows(jobs, ROUNDS, eager=not options.quick):
        recorded.append(row)
        shares = "  ".join(f"{name} {share:6.1%}" for name, share in row["of_copy"].items())
        print(f"{row['row']:36} {row['seconds'] * 1e6:8.1f} us   of copy: {shares}", flush=True)
    eager = eager_calls()
    print(eager)
    write(options.results, shape=[ROWS, K], rounds=ROUNDS, rows=recorded, eager_call_microseconds=eager)


if __name__ == "__main__":
    main()
