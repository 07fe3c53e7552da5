"""x @ Wᵀ with packed W against `F.linear` in f32; W is larger than the caches at either precision."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.nn import functional as F

import turboquant_rs as tq
from conftest import Contender

N, K = 32768, 4096  # 512 MiB in f32, 68 MiB at 4 bits


@cache
def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("m", [1, 16, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_matmul(contest, bits: int, m: int) -> None:
    """int8 activations, quantized inside the call, against f32 and against float activations."""
    w, x = weight(), torch.randn(m, K, generator=torch.Generator().manual_seed(m))
    packed = tq.pack(w, bits=bits)
    contest(
        Contender("ours", lambda: tq.matmul(x, packed)),
        Contender("float activations", lambda: tq.matmul(x, packed, activations="float")),
        Contender("f32 F.linear", lambda: F.linear(x, w)),
        moved=packed.nbytes + x.nbytes + 4 * m * N,
    )


@pytest.mark.parametrize("m", [1, 128])
def test_matmul_two_threads(contest, m: int) -> None:
    x = torch.randn(m, K, generator=torch.Generator().manual_seed(m))
    w, packed = weight(), tq.pack(weight(), bits=4)
    contest(
        Contender("ours", lambda: tq.matmul(x, packed), threads=2),
        Contender("ours, 1 thread", lambda: tq.matmul(x, packed)),
        Contender("f32 F.linear", lambda: F.linear(x, w), threads=2),
        moved=packed.nbytes + x.nbytes + 4 * m * N,
    )
