"""bench: is a quantized layer faster than the float one, on this machine, with the threads it has now?

    model ─► distinct shapes of linear layers ─► weights of each: ours, f32, bf16 take turns ─► Speeds

Between two calls of a layer a model reads all of its other weights. So each contender goes round as many
copies of a weight as would fill the model, and finds as much of them in the caches as it would find there.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turboquant_rs.errors import NoLayersMatched
from turboquant_rs.packed import PackedTensor, matmul, pack
from turboquant_rs.panels import Panels
from turboquant_rs.progress import Progress
from turboquant_rs.report import describe_scheme
from turboquant_rs.scheme import Rounding, Scheme
from turboquant_rs.table import table

from .linear import ACTIVATIONS, is_conv1d

__all__ = ["LayerSpeed", "Speeds", "bench", "take_turns", "time_linear"]

BATCHES = (1, 64)
REPEATS = 7
TURN = 1e-3  # seconds of calls in a turn: of small layers there are many
MOST_CALLS = 1000
MOST_BYTES = 2**28  # of floats that a contest goes round: more than caches hold, as a larger model would be

Call = Callable[[], object]


@dataclass(frozen=True)
class LayerSpeed:
    """Milliseconds a call of a layer of `shape` (out, in), of which the model has `count`, with `m` rows."""

    shape: tuple[int, int]
    count: int
    m: int
    milliseconds: float
    float32: float
    bfloat16: float

    @property
    def ratio(self) -> float:
        """How many times faster than the faster of the two float layers; below 1 it is slower."""
        return min(self.float32, self.bfloat16) / self.milliseconds

    def to_dict(self) -> dict[str, Any]:
        """All fields and the ratio, for JSON."""
        return {
            "shape": list(self.shape),
            "count": self.count,
            "m": self.m,
            "milliseconds": self.milliseconds,
            "float32": self.float32,
            "bfloat16": self.bfloat16,
            "ratio": self.ratio,
        }


@dataclass(frozen=True, repr=False)
class Speeds:
    """The result of `tq.bench`; prints as a table."""

    rows: tuple[LayerSpeed, ...]
    scheme: Scheme
    activations: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "scheme": self.scheme.to_dict(),
            "activations": self.activations,
            "threads": self.threads,
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __repr__(self) -> str:
        header = ("layer", "count", "m", "ms", "float32", "bfloat16", "faster than floats")
        rows = [
            (
                f"{row.shape[0]} x {row.shape[1]}", str(row.count), str(row.m), f"{row.milliseconds:.4f}",
                f"{row.float32:.4f}", f"{row.bfloat16:.4f}", f"{row.ratio:.2f}x",
            )
            for row in self.rows
        ]  # fmt: skip
        title = f"{describe_scheme(self.scheme)}, {self.activations} activations, {self.threads} threads"
        return f"{title}\n{table(header, rows)}"


def bench(
    model: nn.Module | Iterable[tuple[int, int]],
    scheme: Scheme | int = 4,
    *,
    batches: Sequence[int] = BATCHES,
    activations: str = "int8",
    repeats: int = REPEATS,
) -> Speeds:
    """Times each distinct shape of linear layer, quantized and as F.linear in f32 and bf16, here and now.

    model: its linear layers count; or the shapes themselves, (out_features, in_features) each.
    scheme: a `Scheme`, or a number of bits.
    batches: the numbers of rows m of the input.
    repeats: turns that each contender has; medians are given.
    Threads are torch's (`torch.set_num_threads`); weights are random and on the CPU, inputs are f32, those of
    bf16 layers bf16.

    Raises `NoLayersMatched` if there is no layer; `TypeError` or `ValueError` for arguments out of range.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations {activations!r} is unknown; use 'int8' or 'float'")
    if isinstance(scheme, bool) or not isinstance(scheme, Scheme | int):
        raise TypeError(f"scheme must be a tq.Scheme or a number of bits, got {scheme!r}")
    scheme = scheme if isinstance(scheme, Scheme) else Scheme(bits=scheme)
    batches = [_count(f"batches[{i}]", m) for i, m in enumerate(batches)]
    repeats = _count("repeats", repeats)
    if not batches:
        raise ValueError("batches is empty; give the numbers of input rows to time, such as (1, 64)")
    shapes = Counter(_shapes(model))
    if not shapes:
        what = type(model).__name__ if isinstance(model, nn.Module) else "the list of shapes"
        raise NoLayersMatched(f"{what} has no linear layer to time; give shapes, such as [(4096, 4096)]")
    generator = torch.Generator().manual_seed(0)
    resident = 4 * sum(n * k * count for (n, k), count in shapes.items())
    rows = []
    with Progress("bench", len(shapes)) as progress:
        for (n, k), count in shapes.items():
            progress.update(progress.done, f"{n} x {k}")
            weight = torch.randn(n, k, generator=generator)
            dtypes = (torch.float32, torch.bfloat16)
            timed = time_linear(
                weight, scheme, dtypes, batches, resident, activations=activations, repeats=repeats
            )
            rows += [LayerSpeed((n, k), count, m, *(1e3 * seconds for seconds in timed[m])) for m in batches]
            progress.advance()
    return Speeds(tuple(rows), scheme, activations, torch.get_num_threads())


def time_linear(
    weight: Tensor,
    scheme: Scheme,
    dtypes: Sequence[torch.dtype],
    batches: Sequence[int] = BATCHES,
    resident: int = 0,
    *,
    rounding: Rounding | None = None,
    activations: str = "int8",
    repeats: int = REPEATS,
) -> dict[int, tuple[float, ...]]:
    """For each m: median seconds of a layer with that weight (out, in), quantized, and in each of `dtypes`.

    resident: bytes of the float weights of the whole model, of which copies of this one take the place.
    The quantized layer is called with x of dtypes[0].
    """
    copies = max(1, min(resident, MOST_BYTES) // max(weight.nbytes, 1))
    packed = pack(weight, scheme=scheme, rounding=rounding or Rounding.nearest())
    quantized = [_quantized(packed, activations) for _ in range(copies)]
    floats = [[weight.to(dtype, copy=True) for _ in range(copies)] for dtype in dtypes]

    seconds = {}
    with torch.inference_mode():
        for m in batches:
            x = torch.randn(m, weight.shape[1], generator=torch.Generator().manual_seed(m))
            ours = _going_round(x.to(dtypes[0]), quantized)
            theirs = [
                _going_round(x.to(dtype), [partial(_linear, weight=w) for w in pool])
                for dtype, pool in zip(dtypes, floats, strict=True)
            ]
            seconds[m] = tuple(take_turns([ours, *theirs], repeats, TURN))
    return seconds


Layer = Callable[[Tensor], Tensor]


def _quantized(packed: PackedTensor, activations: str) -> Layer:
    """A layer with a copy of its own of that matrix, as QuantLinear has it on the CPU."""
    if not Panels.fits(packed):
        own = replace(packed, packed=packed.packed.clone(), trusted=True)
        return lambda x: matmul(x, own, activations=activations)
    panels = Panels.of(packed)
    return lambda x: panels.matmul(x, None, activations=activations, bits=packed.bits)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _going_round(x: Tensor, layers: Sequence[Layer]) -> Call:
    turn = itertools.cycle(layers)
    return lambda: next(turn)(x)


def take_turns(calls: Sequence[Call], repeats: int, least: float = 0.0) -> list[float]:
    """Median seconds of each call over `repeats` rounds in which they take turns, `least` seconds a turn."""
    counts = []
    for call in calls:  # the first round only warms up
        call()
        counts.append(min(MOST_CALLS, max(1, math.ceil(least / _seconds(call, 1)))) if least else 1)
    turns: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, count, mine in zip(calls, counts, turns, strict=True):
            mine.append(_seconds(call, count))
    return [statistics.median(mine) for mine in turns]


def _seconds(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return max(time.perf_counter() - start, 1e-9) / count


def _shapes(model: nn.Module | Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(out, in) of every linear layer that has elements."""
    if isinstance(model, nn.Module):
        sizes = (_size(module) for module in model.modules())
        return [size for size in sizes if size is not None and size[0] * size[1]]
    try:
        shapes = list(model)
    except TypeError as error:
        raise TypeError(
            f"model must be an nn.Module or shapes (out_features, in_features), got {type(model).__name__}"
        ) from error
    return [_shape(f"shape {i}", shape) for i, shape in enumerate(shapes)]


def _size(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if is_conv1d(module):
        weight: Any = module.weight
        return weight.shape[1], weight.shape[0]
    return None


def _shape(name: str, shape: Any) -> tuple[int, int]:
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise TypeError(f"{name} is {shape!r}; expected (out_features, in_features), such as (4096, 1024)")
    n, k = (_count(f"a side of {name}", side) for side in shape)
    return n, k


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number above 0, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be a whole number above 0, got {value}")
    return value
