"""`turboquant-rs bench`: this machine in a minute. Every job and its rivals take turns; medians are shown.

The recorded, many-sided measurement is `make bench`; this is the short one a user runs on a new machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from turboquant_rs.checkpoint import inspect_checkpoint
from turboquant_rs.checkpoint.select import select
from turboquant_rs.nn.speed import BATCHES, Speeds, bench, take_turns
from turboquant_rs.packed import PackedTensor, matmul, pack, unpack
from turboquant_rs.progress import Progress
from turboquant_rs.scheme import Rounding, Scheme

__all__ = ["Timing", "run", "run_model"]

GROUP = 64

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One job: median seconds of ours, of a plain copy moving as many bytes, and of torch without us.

    `moved` is the bytes the job has to read and write at least; `copy_seconds` and `torch_seconds` are None
    where there is nothing to compare with.
    """

    job: str
    seconds: float
    moved: int
    copy_seconds: float | None
    torch_seconds: float | None

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes moved over time, in 10⁹ bytes a second."""
        return self.moved / self.seconds / 1e9

    def to_dict(self) -> dict[str, object]:
        """All fields and the bandwidth, for JSON."""
        return asdict(self) | {"gigabytes_per_second": self.gigabytes_per_second}


@dataclass(frozen=True)
class _Job:
    name: str
    ours: Call
    moved: int
    rival: Call | None
    streams: bool = True


def run(rows: int, columns: int, bits: Sequence[int], repeats: int) -> list[Timing]:
    """Times pack, unpack and matmul of an f32 weight (rows, columns) at each of `bits`, in `repeats` rounds.

    Raises ValueError for bits outside 1…8.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    jobs = [job for b in bits for job in _jobs(weight, Scheme(bits=b, group_size=GROUP), generator)]
    timings = []
    with Progress("bench", len(jobs)) as progress:
        for job in jobs:
            progress.update(progress.done, job.name)
            timings.append(_time(job, repeats))
            progress.advance()
    return timings


def run_model(path: Path, bits: Sequence[int], batches: Sequence[int], repeats: int) -> list[Speeds]:
    """Times the shapes of the matrices that `turboquant-rs quantize` would quantize, at each of `bits`.

    Reads headers only. Raises NoLayersMatched if there is no such matrix, and what opening the files raises.
    """
    tensors = {t.name: (getattr(torch, t.dtype), t.shape) for t in inspect_checkpoint(path).tensors}
    matrices = [tensors[name][1] for name, reason in select(tensors).items() if not reason]
    shapes = [(n, k) for n, k in matrices]
    return [bench(shapes, Scheme(bits=b, group_size=GROUP), batches=batches, repeats=repeats) for b in bits]


def _jobs(weight: Tensor, scheme: Scheme, generator: torch.Generator) -> list[_Job]:
    """The jobs of one scheme; outputs exist beforehand, so no page faults are timed."""
    bits = scheme.bits
    packed = pack(weight, scheme=scheme)
    values = torch.empty_like(weight)
    moved = weight.nbytes + packed.nbytes

    def packing(rounding: Rounding) -> Call:
        target = pack(weight, scheme=scheme, rounding=rounding)
        return lambda: pack(weight, scheme=scheme, rounding=rounding, out=target)

    iid, systematic = (Rounding.stochastic(1, mode=mode) for mode in ("iid", "systematic"))
    codes, scales = _torch_quantize(weight, bits, stochastic=False)
    jobs = [
        _Job(f"pack {bits} bits", packing(Rounding.nearest()), moved, _torch_pack(weight, bits, False)),
        _Job(f"pack {bits} bits, stochastic iid", packing(iid), moved, _torch_pack(weight, bits, True)),
        _Job(f"pack {bits} bits, stochastic systematic", packing(systematic), moved, None),
        _Job(
            f"unpack {bits} bits to f32", lambda: unpack(packed, out=values), moved,
            lambda: codes.float().sub_(1 << (bits - 1)).mul_(scales),
        ),
    ]  # fmt: skip
    for batch in BATCHES:
        x = torch.randn(batch, weight.shape[1], generator=generator)
        jobs.append(
            _Job(
                f"matmul {bits} bits, {batch} rows", _matmul(x, packed), packed.nbytes + x.nbytes,
                _linear(x, weight), streams=False,
            )
        )  # fmt: skip
    return jobs


def _matmul(x: Tensor, packed: PackedTensor) -> Call:
    return lambda: matmul(x, packed)


def _linear(x: Tensor, weight: Tensor) -> Call:
    return lambda: F.linear(x, weight)


def _torch_quantize(x: Tensor, bits: int, stochastic: bool) -> tuple[Tensor, Tensor]:
    """Absmax group quantization as one writes it in plain torch: codes (n, group) u8 and scales (n, 1) f32.

    Elements after the last whole group are left out, in the rival's favour.
    """
    groups = x.view(-1)[: x.numel() // GROUP * GROUP].view(-1, GROUP)
    half = 1 << (bits - 1)
    scales = groups.abs().amax(1, keepdim=True) / max(half - 1, 1)
    steps = groups / scales
    steps = (steps + torch.rand_like(steps)).floor_() if stochastic else steps.round_()
    return steps.clamp_(-half, half - 1).add_(half).to(torch.uint8), scales


def _torch_pack(x: Tensor, bits: int, stochastic: bool) -> Call:
    def call() -> object:
        codes, scales = _torch_quantize(x, bits, stochastic)
        pairs = codes.view(-1, 2)
        return (pairs[:, 0] | pairs[:, 1] << 4 if bits <= 4 else codes), scales.bfloat16()

    return call


def _time(job: _Job, repeats: int) -> Timing:
    calls = [job.ours]
    if job.streams:
        source = torch.zeros(job.moved // 2, dtype=torch.uint8)
        target = torch.zeros_like(source)
        calls.append(lambda: target.copy_(source))
    if job.rival:
        calls.append(job.rival)
    medians = iter(take_turns(calls, repeats))
    return Timing(
        job.name, next(medians), job.moved, next(medians) if job.streams else None,
        next(medians) if job.rival else None,
    )  # fmt: skip
