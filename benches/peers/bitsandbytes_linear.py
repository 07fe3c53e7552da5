"""bitsandbytes: nf4 in blocks of 64 with bf16 activations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from peers.layer import Call, Contender, Layer


def nf4(weight: Tensor, threads: int) -> Iterator[Layer]:
    import bitsandbytes

    n, k = weight.shape
    linear = bitsandbytes.nn.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4"
    )
    linear.load_state_dict({"weight": weight.bfloat16()})
    linear = linear.to("cpu").eval()
    linear(torch.zeros(1, k, dtype=torch.bfloat16))  # the first call repacks for its CPU kernel
    stored = linear.weight.nbytes + linear.weight.quant_state.absmax.nbytes

    def bind(x: Tensor, own: nn.Module) -> Call:
        return partial(own, x.bfloat16())

    while True:
        yield Layer(partial(bind, own=copy.deepcopy(linear)), stored)


CONTENDERS = [Contender("bitsandbytes nf4 bf16 g64", "W4A16 g128", nf4)]
