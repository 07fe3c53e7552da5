"""Panels: a packed matrix in the order in which the kernels of its device read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from turboquant_rs import ops
from turboquant_rs.packed import PackedTensor, autocast, check_linear, matmul_refined
from turboquant_rs.scheme import Rounding, Scheme


@dataclass(frozen=True, eq=False)
class Panels:
    """The same codes, scales and zero points as a `PackedTensor` (n, k), bit for bit, in another order.

    packed: u8; scales, zero_points: (n padded to 16, groups); see `ops.reference.to_panels`, and for CUDA
        `ops.tiles`, which takes float activations.
    bits: how many bits of each code are stored. layout: what the operators call this order.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor
    shape: tuple[int, int]
    scheme: Scheme
    rounding: Rounding
    bits: int
    layout: str = field(init=False, repr=False)
    _products: dict[tuple[str, int, bool], Callable[..., tuple[Tensor, Any] | None]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", "tiles" if self.packed.device.type == "cuda" else "panels")

    @staticmethod
    def fits(packed: PackedTensor) -> bool:
        """Whether `packed` can be brought to panels: a matrix, codes that go by value alone, and on CUDA a
        scheme that fits the matrix unit."""
        if packed.ndim != 2 or packed.numel() == 0 or packed.rounding.mode == "subtractive":
            return False
        if packed.device.type == "cuda":
            scheme, rounding, _ = ops.schema.split_args(
                (*packed.scheme.op_args(), *packed.rounding.op_args())
            )
            return ops.tiles.fits(scheme, rounding)
        return packed.device.type == "cpu"

    @classmethod
    def of(cls, packed: PackedTensor) -> Panels:
        """The panels of a matrix for which `fits` holds; a copy."""
        n, k = packed.shape
        widths = packed.scheme.stored_widths(packed.bits)
        # PyTorch counts no writes to tensors of inference mode, and `ops.cuda.Product` asks.
        with torch.inference_mode(False):
            if packed.device.type == "cuda":
                panels = ops.to_tiles(*packed._stored, widths, k)
            else:
                panels = ops.to_panels(*packed._stored, *packed.scheme.op_args(), widths, k)
        return cls(*panels, (n, k), packed.scheme, packed.rounding, packed.bits)

    def to_packed(self, dtype: torch.dtype, bits: int | None = None) -> PackedTensor:
        """The canonical matrix of that dtype again, a copy, or the prefix of `bits` of it."""
        widths = self.scheme.stored_widths(self.bits)
        stored = (self.packed, self.scales, self.zero_points)
        if self.layout == "tiles":
            packed, scales, zeros = ops.from_tiles(*stored, widths, *self.shape)
        else:
            packed, scales, zeros = ops.from_panels(*stored, *self.scheme.op_args(), widths, *self.shape)
        zero_points = zeros if zeros.numel() else None
        shape = torch.Size(self.shape)
        about = (shape, dtype, self.scheme, self.rounding, self.bits)
        whole = PackedTensor(packed, scales, zero_points, *about, trusted=True)
        return whole if bits in (None, self.bits) else whole.at(bits)

    def matmul(self, x: Tensor, bias: Tensor | None, *, activations: str, bits: int) -> Tensor:
        """`tq.matmul` with this matrix, read at `bits`, of x as autocast wants it."""
        if not torch.compiler.is_compiling():
            product = self._products.get((activations, bits, False)) or self._product(activations, bits)
            found = product(x, bias)
            if found is not None:
                return found[0]
        x = autocast(x)
        check_linear(x, self.shape, self.packed.device, bias)
        stored, arguments = self._operands(activations, bits)
        return ops.matmul(x, *stored, bias, *arguments)

    def chosen(self, choice: ops.cuda.chosen.Choice) -> ops.cuda.chosen.Weight:
        """This matrix for a CUDA graph that chooses among its widths when it is replayed."""
        arguments = (*self.scheme.op_args(), *self.rounding.op_args(), self.scheme.widths)
        stored = (self.packed, self.scales, self.zero_points)
        return ops.cuda.chosen.Weight(stored, self.layout, self.shape, choice, *arguments)

    def matmul_refined(
        self, x: Tensor, bias: Tensor | None, *, bits: int, refined_bits: int, threshold: float
    ) -> tuple[Tensor, int | Tensor]:
        """`matmul` with int8 activations, at `refined_bits` where a row's size is above `threshold`.

        Also returns how many rows were refined, or which. The panels hold every bit of the scheme.
        """
        if self.layout == "tiles":  # of a layer that had float activations when it was arranged
            whole = self.to_packed(x.dtype)
            return matmul_refined(
                autocast(x), whole, bias, bits=bits, refined_bits=refined_bits, threshold=threshold
            )
        if not torch.compiler.is_compiling():
            product = self._products.get(("int8", bits, True)) or self._product("int8", bits, True)
            found = product(x, bias, (refined_bits, threshold))
            if found is not None:
                return found
        x = autocast(x)
        check_linear(x, self.shape, self.packed.device, bias)
        arguments = (*self.scheme.op_args(), *self.rounding.op_args(), self.scheme.widths, bits)
        stored = (self.packed, self.scales, self.zero_points)
        tail = (refined_bits, threshold, "panels", self.shape[0])
        return ops.matmul_refined(x, *stored, bias, *arguments, *tail)

    def _product(
        self, activations: str, bits: int, whole: bool = False
    ) -> Callable[..., tuple[Tensor, Any] | None]:
        """The call for a number of bits; `whole`: with the planes that follow those at hand."""
        stored, arguments = self._operands(activations, bits)
        stored = (self.packed, *stored[1:]) if whole else stored
        kind = ops.cuda.Product if self.layout == "tiles" else ops.cpu.Product
        # Python calls a method in less time than an object that has one for calls.
        product = kind(*stored, self.shape[1], *arguments).__call__
        self._products[activations, bits, whole] = product
        return product

    def _operands(self, activations: str, bits: int) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:
        """What the operator takes besides x and bias: the weight's tensors, and what follows the bias."""
        # Planes follow one another, each as long as it is wide.
        packed = self.packed if bits == self.bits else self.packed[: self.packed.numel() // self.bits * bits]
        arguments = (*self.scheme.op_args(), *self.rounding.op_args(), self.scheme.widths, bits)
        return (packed, self.scales, self.zero_points), (*arguments, activations, self.layout, self.shape[0])
