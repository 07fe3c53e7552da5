"""Linear layers on a GPU beside what PyTorch has, and beside a plain read of the same bytes, in one process.

    python benches/cuda_matmul.py [--quick] [--results FILE]

Every contender is captured in a CUDA graph that goes round as many weights as fill the L2 cache three times;
the figure is the median over replays, divided by the calls in a graph. Weights and activations are random.
The read floor is the fastest of several kernels that only read as many bytes as the packed weight has: what a
product with one row of x cannot beat.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench_cuda import write
from turboquant_rs import Rounding, Scheme, ops
from turboquant_rs.ops.cuda.tiles import Product
from turboquant_rs.ops.tiles import tiles_nbytes

RESULTS = Path(__file__).parent / "results" / "cuda_matmul.json"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))
BANDS = ((1, 2, 4, 8, 16), (32, 64, 128), (256, 512), (1024, 4096))
"""Rows of x, timed band by band."""

ROUNDS = 30
ROTATED = 3
"""How many times over the weights of a graph fill the L2 cache."""

SCHEMES = {
    "w4 g128": Scheme(bits=4, group_size=128),
    "w4 g32 asymmetric": Scheme(bits=4, group_size=32, symmetric=False),
    "w8 g128": Scheme(bits=8, group_size=128),
    "w3 g128": Scheme(bits=3, group_size=128),
    "w2 g128": Scheme(bits=2, group_size=128),
}

Call = Callable[[], object]

READ = r"""
extern "C" __global__ void read(const uint4* from, unsigned* sink, unsigned long long count) {
  unsigned folded = 0;
  const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
  unsigned long long at = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
  for (; at + (UNROLL - 1) * step < count; at += UNROLL * step) {
    uint4 v[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[i].x), "=r"(v[i].y), "=r"(v[i].z), "=r"(v[i].w)
                   : "l"(from + at + i * step));
    }
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) folded ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  for (; at < count; at += step) folded ^= from[at].x ^ from[at].y ^ from[at].z ^ from[at].w;
  if (folded == 0x12345) *sink = folded;
}"""


def copies(nbytes: int) -> int:
    """How many weights of that size a graph goes round."""
    cache_size = torch.cuda.get_device_properties(0).L2_cache_size
    return max(3, -(-ROTATED * cache_size // nbytes))


def seconds(calls: list[Call], rounds: int = ROUNDS) -> float:
    """Seconds a call: the median over replays of a graph of all of them."""
    for call in calls:  # the first product with a weight is launched otherwise than those that follow
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 3)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(stop) for start, stop in itertools.pairwise(events[1:])]
    return statistics.median(times) / 1e3 / len(calls)


@cache
def read_kernel(unroll: int) -> Any:
    import cupy  # noqa: TID251 - a kernel of this bench alone

    return cupy.RawKernel(f"#define UNROLL {unroll}\n{READ}", "read")


def read_floor(nbytes: int) -> float:
    """Seconds of the fastest plain read of that many bytes."""
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    memory = [noise(nbytes) for _ in range(copies(nbytes))]

    class Stream:
        @property
        def ptr(self) -> int:
            return torch.cuda.current_stream().cuda_stream

    def reading(unroll: int, threads: int, blocks: int) -> list[Call]:
        kernel = read_kernel(unroll)
        kernel.compile()
        grid = (blocks * torch.cuda.get_device_properties(0).multi_processor_count,)
        return [
            lambda part=part: kernel.kernel(
                grid, (threads,), (part.data_ptr(), sink.data_ptr(), nbytes // 16), 0, Stream()
            )
            for part in memory
        ]

    ways = ((2, 256, 8), (2, 512, 4), (4, 256, 4), (4, 512, 4), (4, 1024, 2), (8, 256, 4), (8, 1024, 1))
    return min(seconds(reading(*way), 15) for way in ways)


def noise(nbytes: int) -> Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")


def weights(scheme: Scheme, n: int, k: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Random weights in tiles: any bits are a weight."""
    made = []
    groups = (-(-n // 16) * 16, scheme.groups(k))
    size = tiles_nbytes(n, k, scheme.bits)
    for _ in range(copies(size)):
        scales = (torch.randn(groups, device="cuda") * 0.02).to(scheme.scale_torch_dtype)
        zeros = noise(0 if scheme.symmetric else scales.numel()) % 2**scheme.bits
        made.append((noise(size), scales, zeros.view(groups) if zeros.numel() else zeros))
    return made


def ours(scheme: Scheme, x: Tensor, n: int, stored: list[tuple[Tensor, Tensor, Tensor]]) -> list[Call]:
    args = (*scheme.op_args(), *Rounding.nearest().op_args(), scheme.widths, scheme.bits, "float", "tiles", n)
    products = [Product(*parts, x.shape[1], *args) for parts in stored]
    out = x.new_empty(x.shape[0], n)

    def call(product: Product, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        """As a layer does."""
        if product(x, None) is None:
            ops.matmul_out(x, *parts, None, *args, out)

    return [partial(call, product, parts) for product, parts in zip(products, stored, strict=True)]


def tinygemm(n: int, k: int) -> list[tuple[Tensor, Tensor]]:
    """Weights of torch's own int4 product, groups of 128."""
    packed = [
        torch.ops.aten._convert_weight_to_int4pack(noise(n * k // 2).view(n, k // 2), 8)
        for _ in range(copies(n * k // 2))
    ]
    return [(part, torch.randn(k // 128, n, 2, device="cuda").bfloat16() * 0.02) for part in packed]


def table(shapes: tuple[tuple[int, int], ...], quick: bool) -> Iterator[dict[str, Any]]:
    """Fewer rows of x go first, for all shapes: many of them make a GPU so hot that its clock falls."""
    floors: dict[tuple[int, int], dict[str, float]] = {}
    for rows in BANDS:
        for n, k in shapes:
            yield from shape_rows(n, k, rows, floors.setdefault((n, k), {}), quick)


def shape_rows(
    n: int, k: int, rows: tuple[int, ...], floors: dict[str, float], quick: bool
) -> Iterator[dict[str, Any]]:
    """Those of one shape; fills the floors of its schemes, if they are not known yet."""
    times: dict[int, dict[str, float]] = {m: {} for m in rows}
    xs = {m: torch.randn(m, k, device="cuda").bfloat16() for m in rows}
    plain = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(copies(2 * n * k))]
    for m, x in xs.items():
        times[m]["bf16 linear"] = seconds([lambda x=x, w=w: F.linear(x, w) for w in plain])
    del plain
    for name, scheme in SCHEMES.items():
        stored = weights(scheme, n, k)
        if name not in floors:
            floors[name] = read_floor(sum(part.nbytes for part in stored[0]))
        for m, x in xs.items():
            times[m][name] = seconds(ours(scheme, x, n, stored))
        del stored
    if not quick and 1 in rows:
        tiny = tinygemm(n, k)
        for m in (1, 2, 8, 16):
            calls: list[Call] = [
                lambda x=xs[m], w=w, s=s: torch.ops.aten._weight_int4pack_mm(x, w, 128, s) for w, s in tiny
            ]
            times[m]["tinygemm g128"] = seconds(calls)
        del tiny
    for m in rows:
        yield {"n": n, "k": k, "m": m, "seconds": times[m], "read_floor": floors}


def line(row: dict[str, Any]) -> str:
    times, floors = row["seconds"], row["read_floor"]
    linear = times["bf16 linear"]
    shown = [f"{row['n']}x{row['k']} m {row['m']:4}  bf16 {linear * 1e6:7.2f} us "]
    for name, value in times.items():
        if name != "bf16 linear":
            floor = f", {value / floors[name]:.2f}x floor" if row["m"] == 1 and name in floors else ""
            shown.append(f"{name} {value * 1e6:.2f} ({linear / value:.2f}x{floor})")
    return "  ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the bf16 layer as a rival")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for row in table(SHAPES, options.quick):
        rows.append(row)
        print(line(row), flush=True)
    rows.sort(key=lambda row: (SHAPES.index((row["n"], row["k"])), row["m"]))
    write(options.results, rounds=ROUNDS, rows=rows)


if __name__ == "__main__":
    main()
