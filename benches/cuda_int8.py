"""Linear layers with int8 activations on a GPU beside the float layer and PyTorch's product of int8.

    python benches/cuda_int8.py [--quick] [--results FILE]

Timed as in `cuda_matmul.py`: graphs that go round as many weights as fill the L2 cache three times, medians
over replays, random data, one process. A layer of ours is x in bfloat16 to y in bfloat16: it quantizes x by
rows, or by groups of the weight, multiplies and scales. `_int_mm` multiplies int8 that is there already and
leaves int32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench_cuda import write
from cuda_matmul import Call, copies, noise, seconds
from turboquant_rs import Rounding, Scheme, ops
from turboquant_rs.ops.cuda import int8

RESULTS = Path(__file__).parent / "results" / "cuda_int8.json"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))
ROWS = (1, 16, 32, 64, 128, 256, 512, 2048, 4096)
ROUNDS = 20

SCHEMES = {
    "w8": Scheme(bits=8, group_size=None),
    "w8 g128": Scheme(bits=8, group_size=128),
    "w4 g128": Scheme(bits=4, group_size=128),
    "w4 g64": Scheme(bits=4, group_size=64),
}
SIZES = ((8192, 8192), (4096, 28672), (2048, 14336), (2048, 4096), (16, 4096))
"""Of activations that are quantized and nothing else."""


def weights(scheme: Scheme, n: int, k: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Random canonical weights: any bits are one."""
    size, groups = n * k * scheme.bits // 8, scheme.groups(k)
    none = torch.empty(0, dtype=torch.uint8, device="cuda")
    return [
        (noise(size), (torch.randn(n, groups, device="cuda") * 0.01).bfloat16(), none)
        for _ in range(copies(size))
    ]


def ours(scheme: Scheme, x: Tensor, n: int, stored: list[tuple[Tensor, Tensor, Tensor]]) -> list[Call]:
    args = (*scheme.op_args(), *Rounding.nearest().op_args(), scheme.widths, scheme.bits, "int8", "canonical")
    out = x.new_empty(x.shape[0], n)
    return [lambda parts=parts: ops.matmul_out(x, *parts, None, *args, n, out) for parts in stored]


def products(shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Seconds of every contender."""
    for n, k in shapes:
        times: dict[int, dict[str, float]] = {m: {} for m in rows}
        xs = {m: torch.randn(m, k, device="cuda").bfloat16() for m in rows}
        plain = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(copies(2 * n * k))]
        for m, x in xs.items():
            times[m]["bf16 linear"] = seconds([lambda x=x, w=w: F.linear(x, w) for w in plain], ROUNDS)
        del plain
        codes = [noise(n * k).view(torch.int8).view(n, k) for _ in range(copies(n * k))]
        for m in rows:
            if m > 16:  # _int_mm takes no fewer
                x = noise(m * k).view(torch.int8).view(m, k)
                times[m]["_int_mm"] = seconds([lambda x=x, w=w: torch._int_mm(x, w.T) for w in codes], ROUNDS)
        del codes
        for name, scheme in SCHEMES.items():
            stored = weights(scheme, n, k)
            for m, x in xs.items():
                times[m][name] = seconds(ours(scheme, x, n, stored), ROUNDS)
            del stored
        for m in rows:
            yield {"n": n, "k": k, "m": m, "seconds": times[m]}


def quantizing() -> Iterator[dict[str, Any]]:
    """Seconds of quantizing x, and of copying half as many bytes as it reads and writes to another place."""
    for m, k in SIZES:
        count = copies(3 * m * k)
        xs = [torch.randn(m, k, device="cuda").bfloat16() for _ in range(count)]
        halves = [noise(3 * m * k // 2) for _ in range(2 * count)]
        row: dict[str, Any] = {"m": m, "k": k, "seconds": {}}
        pairs = list(zip(halves[::2], halves[1::2], strict=True))
        row["copy"] = seconds([lambda a=a, b=b: b.copy_(a) for a, b in pairs], ROUNDS)
        for name, group in (("a row", 0), ("g128", 128), ("g64", 64)):
            columns = int8.Columns.of(k, group)
            codes = [noise(m * columns.stride).view(torch.int8) for _ in xs]
            terms = torch.empty(2, m * columns.groups, device="cuda")
            row["seconds"][name] = seconds(
                [
                    lambda x=x, q=q, terms=terms, columns=columns: int8.quantize(
                        x, q, terms[0].data_ptr(), terms[1].data_ptr(), columns, False, 0
                    )
                    for x, q in zip(xs, codes, strict=True)
                ],
                ROUNDS,
            )
        yield row


def line(row: dict[str, Any]) -> str:
    times = row["seconds"]
    linear, shown = times["bf16 linear"], [f"{row['n']}x{row['k']} m {row['m']:4}"]
    for name, value in times.items():
        shown.append(f"{name} {value * 1e6:.1f} ({linear / value:.2f}x)")
    return "  ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first and the last shape, few rows")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    quantize, rows = [], []
    for row in quantizing():
        quantize.append(row)
        shares = {name: f"{row['copy'] / value:.0%}" for name, value in row["seconds"].items()}
        print(f"quantize {row['m']}x{row['k']}: of a copy {shares}", flush=True)
    shapes = (SHAPES[0], SHAPES[-1]) if options.quick else SHAPES
    for row in products(shapes, (1, 16, 256, 2048) if options.quick else ROWS):
        rows.append(row)
        print(line(row), flush=True)
    write(options.results, rounds=ROUNDS, quantize=quantize, rows=rows)


if __name__ == "__main__":
    main()
