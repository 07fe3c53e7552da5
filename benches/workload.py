"""The tensors of the benches: a working set no cache holds, made once a process."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import turboquant_rs as tq

ROWS, K = 16384, 4096  # 2^26 elements, 256 MiB of f32
GROUP_SIZE = 64


@cache
def gaussian(dtype: torch.dtype = torch.float32) -> Tensor:
    """N(0, 1) weights, (ROWS, K)."""
    return torch.randn(ROWS, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def bytes_moved(x: Tensor, packed: tq.PackedTensor) -> int:
    """What packing x, or unpacking to it, reads and writes at least."""
    return x.nbytes + packed.nbytes
