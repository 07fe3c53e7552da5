"""One weight at every choice of bits: packed once, decoded on demand, swapped in for as long as asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turboquant_rs.nn.convert import logical_weight
from turboquant_rs.nn.linear import is_conv1d
from turboquant_rs.packed import PackedTensor, pack
from turboquant_rs.scheme import Scheme


def at_bits(scheme: Scheme, bits: int) -> Scheme:
    """`scheme` at another number of bits, a nested one as it is; ValueError where it cannot be."""
    if scheme.is_nested:
        scheme.check_bits(bits)
        return scheme
    return dataclasses.replace(scheme, bits=bits, planes=None)


class Variants:
    """A weight (n, k), all modules that hold it, and what it becomes at each of `choices` bits.

    Of each choice the packed form is kept, together less than the weight in f32 at the usual ones.
    """

    def __init__(
        self, modules: Sequence[nn.Module], scheme: Scheme, choices: Sequence[int], rows: Sequence[int]
    ) -> None:
        """`rows`: the lengths of the blocks of rows that are scored by themselves; they add up to n."""
        self.modules, self.rows = modules, rows
        weight = logical_weight(modules[0])
        self._packed: dict[int, PackedTensor] = {}
        nested = pack(weight, scheme=scheme) if scheme.is_nested else None
        for bits in choices:
            self._packed[bits] = nested or pack(weight, scheme=at_bits(scheme, bits))

    @property
    def weight(self) -> Tensor:
        """The weight (n, k), sharing memory with the modules."""
        return logical_weight(self.modules[0])

    def decoded(self, bits: int) -> Tensor:
        """The weight at `bits`, in f32."""
        return self._packed[bits].dequantize(bits, dtype=torch.float32)

    def deltas(self) -> Iterator[Tensor]:
        """The error of the weight at each choice, in f32, one at a time."""
        weight = self.weight
        for bits in self._packed:
            yield self.decoded(bits).sub_(weight)

    def mixed(self, bits: Sequence[int | None]) -> Tensor:
        """The weight with each block of rows at its bits (None: as it is), in f32."""
        if len(set(bits)) == 1 and bits[0] is not None:
            return self.decoded(bits[0])
        weight = self.weight.float().clone()
        for width in {width for width in bits if width is not None}:
            start, decoded = 0, self.decoded(width)
            for block, own in zip(self.rows, bits, strict=True):
                if own == width:
                    weight[start : start + block] = decoded[start : start + block]
                start += block
        return weight

    @contextmanager
    def swapped(self, bits: Sequence[int | None]) -> Iterator[None]:
        """The modules compute with `mixed(bits)` within the block; the weight itself is not touched."""
        value = self.mixed(bits).to(self.weight.dtype)
        with ExitStack() as restore:
            for module in self.modules:
                original = module._parameters["weight"]
                restore.callback(module._parameters.__setitem__, "weight", original)
                logical = value.t() if is_conv1d(module) else value
                module._parameters["weight"] = nn.Parameter(logical, requires_grad=False)
            yield

    def outputs(self, module: nn.Module, input: Tensor) -> Iterator[Tensor]:
        """The error of the output (..., n) of one of the modules at each choice, in f32, one at a time."""
        for delta in self.deltas():
            if isinstance(module, nn.Embedding):
                yield F.embedding(input, delta)
            else:
                yield F.linear(input.float(), delta)

    def by_rows(self, x: Tensor) -> Tensor:
        """x (..., n) summed over the blocks of rows: (tokens, blocks)."""
        flat = x.reshape(-1, x.shape[-1])
        if len(self.rows) == 1:
            return flat.sum(1, keepdim=True)
        return torch.stack([piece.sum(1) for piece in torch.split(flat, list(self.rows), dim=1)], dim=1)


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer in a forward hook, however it was passed."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found
