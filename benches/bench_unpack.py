"""Packed planes back to a float tensor: against a copy of as many bytes and against other unpackers."""

from __future__ import annotations

import pytest
import torch

import turboquant_rs as tq
from conftest import Contender
from peers import copies, gguf_blocks, torch_eager
from workload import GROUP_SIZE, ROWS, K, bytes_moved, gaussian


@pytest.mark.parametrize("bits", [4, 8])
def test_unpack(contest, bits: int) -> None:
    x, out = gaussian(), torch.zeros(ROWS, K)
    packed = tq.pack(x, bits=bits, group_size=GROUP_SIZE)
    codes, scales = torch_eager.pack(x, bits, GROUP_SIZE)
    moved = bytes_moved(x, packed)
    contest(
        Contender("ours", lambda: tq.unpack(packed, out=out)),
        Contender("copy", copies.plain_copy(moved)),
        Contender("streaming copy", copies.streaming_copy(moved)),
        Contender("torch eager", lambda: torch_eager.unpack(codes, scales, bits, GROUP_SIZE, out)),
        Contender("gguf-py", gguf_blocks.unpacker(x.numpy(), bits)),
        moved=moved,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_unpack_prefix(contest, bits: int) -> None:
    """The top bits of one nested copy; its packed bytes are read in proportion."""
    x, out = gaussian(), torch.zeros(ROWS, K)
    packed = tq.pack(x, scheme=tq.Scheme.nested(GROUP_SIZE, planes=(2, 1, 1, 1, 1, 2)))
    prefix = packed.at(bits)
    moved = out.nbytes + packed.scheme.packed_nbytes(ROWS, K, bits) + packed.scales.nbytes
    contest(
        Contender("ours", lambda: tq.unpack(prefix, out=out)),
        Contender("copy", copies.plain_copy(moved)),
        moved=moved,
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_unpack_two_threads(contest, bits: int) -> None:
    x, out = gaussian(), torch.zeros(ROWS, K)
    packed = tq.pack(x, bits=bits, group_size=GROUP_SIZE)
    moved = bytes_moved(x, packed)
    copy = copies.streaming_copy(moved)
    contest(
        Contender("ours", lambda: tq.unpack(packed, out=out), threads=2),
        Contender("ours, 1 thread", lambda: tq.unpack(packed, out=out)),
        Contender("streaming copy", copy, threads=2),
        Contender("streaming copy, 1 thread", copy),
        moved=moved,
    )
