"""Weights of which a number in device memory says how many bits are read: what a CUDA graph captures of a
layer whose precision changes.

    number ──► matmul at 4 bits, if it is chosen ──► y
          └──► matmul at 8 bits, if it is chosen ──┘

A captured launch is the same at every replay, so there is one for each number of bits, and all but one return
at once (`choice.cuh`). What is read, and in which order sums are taken, is as outside of a graph, so the bits
of the result are the same. Changing the number is a write on the stream: nothing is copied, packed, compiled
or waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turboquant_rs.ops import reference
from turboquant_rs.ops.cuda import int8, tiles
from turboquant_rs.ops.cuda.launcher import captured, not_captured, only_if, write
from turboquant_rs.ops.cuda.macros import aligned
from turboquant_rs.ops.cuda.matmul import by_dequantized
from turboquant_rs.ops.cuda.quantize import unpack_out
from turboquant_rs.ops.schema import RoundingArgs, SchemeArgs, check_matmul_shapes
from turboquant_rs.ops.tiles import from_tiles, prefix_of

__all__ = ["NUMBERS", "Choice", "Number", "Weight", "capturing"]

_is_initialized: Any = torch.cuda.is_initialized

_WRITING = threading.Lock()

NUMBERS = 63
"""A choice is made by a number below this."""


def capturing() -> bool:
    """Whether torch's current stream is being captured in a graph, and by eager code."""
    if torch.compiler.is_compiling() or not _is_initialized():
        return False
    return captured()


class Number:
    """A number that launches are chosen by: in memory of each device where a graph asks for it.

    It is written on torch's current stream, like any other input of a graph; while that is captured, so is
    the write. Copies and pickles have memory of their own.
    """

    def __init__(self, value: int) -> None:
        self._value = value
        self._memory: dict[int, Tensor] = {}

    def set(self, value: int) -> None:
        """What replays read that begin behind this on the stream. Waits for nothing."""
        if capturing():
            self.on(torch.cuda.current_device())
        self._value = value
        if self._memory:  # else nothing is written, allocated or locked
            with _WRITING:
                for device, memory in self._memory.items():
                    write(memory.data_ptr(), self._value, device)

    def on(self, device: int) -> Tensor:
        """Its memory on a device: i32 (1,)."""
        with _WRITING:
            if device not in self._memory:
                with not_captured(device):
                    memory = torch.empty(1, dtype=torch.int32, device=device)
                    self._memory[device] = memory
                    memory.fill_(self._value)  # read now: who has set it before did not see the memory
            return self._memory[device]

    def __getstate__(self) -> int:
        return self._value

    def __setstate__(self, value: int) -> None:
        self._value, self._memory = value, {}


@dataclass(frozen=True, eq=False)
class Choice:
    """Number of bits by a number in memory.

    number: i32 (1,). widths: {bits: the numbers that choose them, a bit each}.
    """

    number: Tensor
    widths: Mapping[int, int]

    def each(self) -> Iterator[int]:
        """The numbers of bits in turn, in each of which launches are those of that number.

        Launches behind those of the first are brought up while another runs.
        """
        for at, (bits, choices) in enumerate(self.widths.items()):
            with only_if(self.number.data_ptr(), choices, early=at > 0):
                yield bits

    def is_chosen(self, bits: int) -> Tensor:
        """Whether it is this number of bits, bool (1,)."""
        choices = torch.full_like(self.number, self.widths[bits], dtype=torch.int64)
        return (choices >> self.number & 1).bool()


class Weight:
    """A packed matrix (n, k), canonical or in tiles, read at the bits that `choice` says.

    stored: packed, scales, zero points, with all planes of the widths that can be chosen. args: SCHEME,
    ROUNDING, planes.
    """

    def __init__(
        self,
        stored: tuple[Tensor, Tensor, Tensor],
        layout: str,
        shape: tuple[int, int],
        choice: Choice,
        *args: Any,
    ) -> None:
        self._stored, self._layout, self._shape, self._choice = stored, layout, shape, choice
        self._args, self._planes = args[:15], list(args[15])
        self._scheme, self._rounding = SchemeArgs(*args[:7]), RoundingArgs(*args[7:15])

    def matmul(self, x: Tensor, bias: Tensor | None, activations: str) -> Tensor:
        """What `ops.matmul` gives at the bits chosen, with its gradients."""
        y: Tensor = _Product.apply(x, bias, self, activations)
        return y

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix at the bits chosen."""
        out = torch.empty(self._shape, dtype=dtype, device=self._stored[0].device)
        stored = self._canonical()
        for bits in self._choice.each():
            unpack_out(*stored, *self._args, self._planes, bits, out)
        return out

    def _canonical(self) -> tuple[Tensor, Tensor, Tensor]:
        """Its parts in canonical order, with those planes at least."""
        if self._layout != "tiles":
            return self._stored
        return from_tiles(*self._stored, prefix_of(self._planes, max(self._choice.widths)), *self._shape)

    def product(self, x: Tensor, bias: Tensor | None, activations: str) -> Tensor:
        """`matmul` without gradients."""
        check_matmul_shapes(x, self._stored[1])
        out = x.new_empty((*x.shape[:-1], self._shape[0]))
        if not out.numel():
            return out
        rows, y = x.reshape(-1, x.shape[-1]).contiguous(), out.view(-1, self._shape[0])
        if not aligned(rows):
            rows = rows.clone()
        if activations != "float":
            self._by_integers(rows, bias, y)
        elif self._layout == "tiles" and tiles.takes(x, self._scheme, self._rounding):
            self._by_tiles(rows, bias, y)
        else:
            by_dequantized(rows, self.dequantize, bias, y)
        return out

    def _by_tiles(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        kinds = {bits: tiles.Weight.of(self._scheme, self._planes, bits) for bits in self._choice.widths}
        first, bf16 = next(iter(kinds.values())), x.dtype == torch.bfloat16
        if tiles.call_of(first, bf16, len(x), *self._shape, x.get_device()) is None:
            values = x.new_empty(self._shape)
            for bits in self._choice.each():
                tiles.expand_into(values, *self._stored, kinds[bits])
            tiles.multiply_expanded(x, values, bias, out)
            return
        for bits in self._choice.each():
            tiles.multiply(x, *self._stored, bias, kinds[bits], out)

    def _by_integers(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        stored, scheme, rounding = self._canonical(), self._scheme, self._rounding
        if int8.takes(x, scheme, rounding):
            for bits in self._choice.each():
                int8.multiply(x, *stored, bias, scheme, rounding, self._planes, bits, out)
            return
        tail = ("int8", "canonical", self._shape[0])
        for bits in self._choice.widths:  # no kernel: the specification at all of them
            y = torch.empty_like(out)
            reference.matmul_out(x, *stored, bias, *self._args, self._planes, bits, *tail, y)
            torch.where(self._choice.is_chosen(bits), y, out, out=out)


class _Product(torch.autograd.Function):
    """`Weight.product`, and its gradients with the weight as it is read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Weight, activations: str) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return weight.product(x.detach(), None if bias is None else bias.detach(), activations)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad @ ctx.weight.dequantize(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None
