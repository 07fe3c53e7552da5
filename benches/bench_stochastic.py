"""Stochastic rounding, fused with packing: against nearest and `torch.rand` added before the floor."""

from __future__ import annotations

import pytest

import turboquant_rs as tq
from conftest import Contender
from peers import copies, torch_eager
from workload import GROUP_SIZE, bytes_moved, gaussian

MODES = ["iid", "antithetic", "stratified", "systematic", "subtractive"]


def packer(x, packed: tq.PackedTensor, rounding: tq.Rounding):
    return lambda: tq.pack(x, scheme=packed.scheme, rounding=rounding, out=packed)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_stochastic(contest, mode: str, bits: int) -> None:
    x = gaussian()
    rounding = tq.Rounding.stochastic(seed=1, mode=mode)
    packed = tq.pack(x, bits=bits, group_size=GROUP_SIZE, rounding=rounding)
    nearest = tq.pack(x, bits=bits, group_size=GROUP_SIZE)
    contest(
        Contender("ours", packer(x, packed, rounding)),
        Contender("nearest", packer(x, nearest, tq.Rounding.nearest())),
        Contender("torch.rand", lambda: torch_eager.pack(x, bits, GROUP_SIZE, stochastic=True)),
        moved=bytes_moved(x, packed),
    )


@pytest.mark.parametrize("mode", ["iid", "systematic"])
def test_stochastic_two_threads(contest, mode: str) -> None:
    x = gaussian()
    rounding = tq.Rounding.stochastic(seed=1, mode=mode)
    packed = tq.pack(x, bits=4, group_size=GROUP_SIZE, rounding=rounding)
    moved = bytes_moved(x, packed)
    pack, copy = packer(x, packed, rounding), copies.streaming_copy(moved)
    contest(
        Contender("ours", pack, threads=2),
        Contender("ours, 1 thread", pack),
        Contender("streaming copy", copy, threads=2),
        Contender("streaming copy, 1 thread", copy),
        moved=moved,
    )
