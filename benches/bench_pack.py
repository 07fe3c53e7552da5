"""f32 tensor to packed planes, to nearest: against a copy of as many bytes and other packers."""

from __future__ import annotations

import pytest
import torch

import turboquant_rs as tq
from conftest import Contender
from peers import copies, gguf_blocks, numpy_groups, torch_eager
from workload import GROUP_SIZE, bytes_moved, gaussian


def packer(x: torch.Tensor, packed: tq.PackedTensor, **rounding: object):
    return lambda: tq.pack(x, scheme=packed.scheme, out=packed, **rounding)


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_nearest(contest, bits: int) -> None:
    x = gaussian()
    packed = tq.pack(x, bits=bits, group_size=GROUP_SIZE)
    moved = bytes_moved(x, packed)
    peers = [
        Contender("copy", copies.plain_copy(moved)),
        Contender("streaming copy", copies.streaming_copy(moved)),
        Contender("torch eager", lambda: torch_eager.pack(x, bits, GROUP_SIZE)),
        Contender("numpy", numpy_groups.packer(x.numpy(), bits, GROUP_SIZE)),
        Contender("gguf-py", gguf_blocks.packer(x.numpy(), bits)),
    ]
    if bits == 4:
        peers.append(Contender("ml_dtypes int4", numpy_groups.int4_caster(x.numpy(), GROUP_SIZE)))
    contest(Contender("ours", packer(x, packed)), *peers, moved=moved)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 7])
def test_pack_other_widths(contest, bits: int) -> None:
    x = gaussian()
    packed = tq.pack(x, bits=bits, group_size=GROUP_SIZE)
    moved = bytes_moved(x, packed)
    contest(Contender("ours", packer(x, packed)), Contender("copy", copies.plain_copy(moved)), moved=moved)


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(tq.Scheme(bits=4, symmetric=False), id="asymmetric"),
        pytest.param(tq.Scheme(bits=4, scale="mse"), id="mse"),
        pytest.param(tq.Scheme(bits=4, group_size=None), id="whole_row"),
        pytest.param(tq.Scheme(bits=4, levels="nf4"), id="nf4"),
        pytest.param(tq.Scheme.nested(), id="nested"),
    ],
)
def test_pack_scheme(contest, scheme: tq.Scheme) -> None:
    """Relative to the default 4-bit scheme: what each option costs."""
    x = gaussian()
    packed, default = tq.pack(x, scheme=scheme), tq.pack(x, bits=4, group_size=GROUP_SIZE)
    contest(
        Contender("ours", packer(x, packed)),
        Contender("default scheme", packer(x, default)),
        moved=bytes_moved(x, packed),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_pack_halves(contest, dtype: torch.dtype) -> None:
    x = gaussian(dtype)
    packed = tq.pack(x, bits=4, group_size=GROUP_SIZE)
    moved = bytes_moved(x, packed)
    contest(Contender("ours", packer(x, packed)), Contender("copy", copies.plain_copy(moved)), moved=moved)


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_two_threads(contest, bits: int) -> None:
    """Two threads against one; the copy's own gain is the limit that memory sets."""
    x = gaussian()
    packed = tq.pack(x, bits=bits, group_size=GROUP_SIZE)
    moved = bytes_moved(x, packed)
    pack, copy = packer(x, packed), copies.streaming_copy(moved)
    contest(
        Contender("ours", pack, threads=2),
        Contender("ours, 1 thread", pack),
        Contender("streaming copy", copy, threads=2),
        Contender("streaming copy, 1 thread", copy),
        moved=moved,
    )
