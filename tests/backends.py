"""The implementations of the operators with one face, and equality bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from turboquant_rs import Rounding, Scheme, ops

NEAREST = Rounding.nearest()
VECTORS = Path(__file__).parent / "vectors"
Packed = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Backend:
    """Calls the operators of one backend. Outputs are allocated here, filled with a pattern that no correct
    result leaves behind, and have the shapes that the fake rules give."""

    name: str
    device: str = "cpu"

    def _run(self, operator: str, *args: Any) -> None:
        module = ops.reference if self.name == "reference" else ops
        getattr(module, operator)(*args)

    def _allocate(self, operator: str, *args: Any) -> Any:
        """Memory for the results of `operator`, as its shape rule says."""
        meta = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args]
        shapes = getattr(ops, operator)(*meta)
        if isinstance(shapes, Tensor):
            return self._poisoned(shapes)
        return tuple(map(self._poisoned, shapes))

    def _poisoned(self, shape: Tensor) -> Tensor:
        memory = torch.full((shape.numel() * shape.element_size(),), 0xA5, dtype=torch.uint8)
        return memory.view(shape.dtype).view(shape.shape).to(self.device)

    def pack(
        self,
        x: Tensor,
        scheme: Scheme,
        rounding: Rounding = NEAREST,
        *,
        planes: Sequence[int] | None = None,
        offset: int = 0,
        nan_zero: bool = False,
    ) -> Packed:
        """(packed, scales, zero_points) of x."""
        args = (*scheme.op_args(), *rounding.op_args(offset), list(planes or scheme.planes), nan_zero)
        x = x.to(self.device)
        outputs: Packed = self._allocate("pack", x, *args)
        self._run("pack_out", x, *args, *outputs)
        return outputs

    def quantize(self, x: Tensor, scheme: Scheme, rounding: Rounding = NEAREST, **options: Any) -> Packed:
        """(codes in the shape of x, scales, zero_points)."""
        codes, scales, zero_points = self.pack(x, scheme, rounding, planes=[8], **options)
        return codes.view(x.shape), scales, zero_points

    def unpack(
        self,
        stored: Packed,
        scheme: Scheme,
        shape: Sequence[int],
        rounding: Rounding = NEAREST,
        *,
        bits: int | None = None,
        dtype: torch.dtype = torch.float32,
        planes: Sequence[int] | None = None,
        offset: int = 0,
    ) -> Tensor:
        """x̂ of a packed tensor, or of the prefix of `bits` bits."""
        planes = list(planes or scheme.planes)
        args = (*scheme.op_args(), *rounding.op_args(offset), planes, bits or scheme.bits)
        stored = tuple(part.to(self.device) for part in stored)
        out: Tensor = self._allocate("unpack", *stored, *args, list(shape), dtype)
        self._run("unpack_out", *stored, *args, out)
        return out

    def dequantize(
        self, stored: Packed, scheme: Scheme, rounding: Rounding = NEAREST, **options: Any
    ) -> Tensor:
        """x̂ of the codes that `quantize` gave."""
        codes, scales, zero_points = stored
        flat = (codes.reshape(-1), scales, zero_points)
        return self.unpack(flat, scheme, codes.shape, rounding, planes=[8], **options)

    def encode(
        self,
        x: Tensor,
        scales: Tensor,
        zero_points: Tensor,
        scheme: Scheme,
        planes: Sequence[int] | None = None,
    ) -> Tensor:
        """The blob of the codes of x on given scales."""
        args = (*scheme.op_args(), list(planes or scheme.planes))
        inputs = [part.to(self.device) for part in (x, scales, zero_points)]
        packed: Tensor = self._allocate("encode", *inputs, *args)
        self._run("encode_out", *inputs, *args, packed)
        return packed

    def fake_quantize(
        self,
        x: Tensor,
        scheme: Scheme,
        rounding: Rounding = NEAREST,
        *,
        given: tuple[Tensor, Tensor] | None = None,
        bits: int | None = None,
    ) -> Packed:
        """(x̂, scales, zero_points), on given scales and zero points or on those that are chosen."""
        args = (*scheme.op_args(), *rounding.op_args())
        x, read = x.to(self.device), bits or scheme.bits
        numbers = (None, None) if given is None else tuple(part.to(self.device) for part in given)
        out, scales, zero_points = self._allocate("fake_quantize", x, *numbers, *args, read)
        if given is not None:
            scales, zero_points = (part.clone() for part in numbers if part is not None)
        self._run("fake_quantize_out", x, *args, given is not None, read, scales, zero_points, out)
        return out, scales, zero_points

    def fake_quantize_backward(
        self,
        grad: Tensor,
        x: Tensor,
        scales: Tensor,
        zero_points: Tensor,
        scheme: Scheme,
        bits: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(gradient of x, gradient of the scales)."""
        args = (*scheme.op_args(), bits or scheme.bits)
        inputs = [part.to(self.device) for part in (grad, x, scales, zero_points)]
        outputs: tuple[Tensor, Tensor] = self._allocate("fake_quantize_backward", *inputs, *args)
        self._run("fake_quantize_backward_out", *inputs, *args, *outputs)
        return outputs

    def inject_noise(
        self,
        x: Tensor,
        widths: Tensor,
        group_size: int,
        rounding: Rounding,
        preserve: bool = False,
        offset: int = 0,
    ) -> Tensor:
        """x with uniform noise."""
        args = (group_size, preserve, *rounding.op_args(offset))
        inputs = [part.to(self.device) for part in (x, widths)]
        out: Tensor = self._allocate("inject_noise", *inputs, *args)
        self._run("inject_noise_out", *inputs, *args, out)
        return out

    def pack_codes(self, codes: Tensor, planes: Sequence[int]) -> Tensor:
        """The blob of planes of codes."""
        codes = codes.to(self.device)
        packed: Tensor = self._allocate("pack_codes", codes, list(planes))
        self._run("pack_codes_out", codes, list(planes), packed)
        return packed

    def unpack_codes(
        self, packed: Tensor, planes: Sequence[int], shape: Sequence[int], bits: int | None = None
    ) -> Tensor:
        """The codes of a blob, or their top `bits` bits."""
        args = (packed.to(self.device), list(planes), bits or sum(planes))
        codes: Tensor = self._allocate("unpack_codes", *args, list(shape))
        self._run("unpack_codes_out", *args, codes)
        return codes

    def matmul(
        self,
        x: Tensor,
        stored: Packed,
        scheme: Scheme,
        bias: Tensor | None = None,
        rounding: Rounding = NEAREST,
        *,
        bits: int | None = None,
        activations: str = "int8",
        layout: str = "canonical",
    ) -> Tensor:
        """x @ Ŵᵀ (+ bias); `stored` is canonical whatever the layout to compute in."""
        planes, n = list(scheme.planes), stored[1].shape[0]
        if layout == "panels":
            stored = self.to_panels(stored, scheme, x.shape[-1])
        tail = (*scheme.op_args(), *rounding.op_args(), planes, bits or scheme.bits, activations, layout, n)
        inputs = [None if v is None else v.to(self.device) for v in (x, *stored, bias)]
        out: Tensor = self._allocate("matmul", *inputs, *tail)
        self._run("matmul_out", *inputs, *tail, out)
        return out

    def matmul_refined(
        self,
        x: Tensor,
        stored: Packed,
        scheme: Scheme,
        bias: Tensor,
        bits: tuple[int, int],
        threshold: float,
        layout: str = "canonical",
    ) -> tuple[Tensor, Tensor]:
        """`matmul` at the second number of bits for rows above the threshold; which those are."""
        if layout == "panels":
            stored = self.to_panels(stored, scheme, x.shape[-1])
        tail = (*scheme.op_args(), *NEAREST.op_args(), list(scheme.planes), *bits, threshold, layout)
        inputs = [v.to(self.device) for v in (x, *stored, bias)]
        outputs: tuple[Tensor, Tensor] = self._allocate("matmul_refined", *inputs, *tail, len(bias))
        self._run("matmul_refined_out", *inputs, *tail, len(bias), *outputs)
        return outputs

    def to_panels(
        self, stored: Packed, scheme: Scheme, k: int, planes: Sequence[int] | None = None
    ) -> Packed:
        """A packed matrix (n, k) in the order of the CPU's kernels."""
        args = (*scheme.op_args(), list(planes or scheme.planes), k)
        inputs = [part.to(self.device) for part in stored]
        panels: Packed = self._allocate("to_panels", *inputs, *args)
        self._run("to_panels_out", *inputs, *args, *panels)
        return panels

    def from_panels(
        self, panels: Packed, scheme: Scheme, n: int, k: int, planes: Sequence[int] | None = None
    ) -> Packed:
        """And back."""
        args = (*scheme.op_args(), list(planes or scheme.planes))
        inputs = [part.to(self.device) for part in panels]
        stored: Packed = self._allocate("from_panels", *inputs, *args, n, k)
        self._run("from_panels_out", *inputs, *args, k, *stored)
        return stored


class Specification(Backend):
    """The reference backend with a memory: tests of each compiled backend ask it the same questions."""

    def __init__(self) -> None:
        super().__init__("reference")
        object.__setattr__(self, "_answers", {})

    def _recall(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        key = (method, _key(args), _key(tuple(sorted(options.items()))))
        answers: dict[Any, Any] = getattr(self, "_answers")  # noqa: B009 - a frozen dataclass declares no such field
        if key not in answers:
            answers[key] = getattr(super(), method)(*args, **options)
        return answers[key]

    def pack(self, *args: Any, **options: Any) -> Packed:
        stored: Packed = self._recall("pack", args, options)
        return stored

    def unpack(self, *args: Any, **options: Any) -> Tensor:
        values: Tensor = self._recall("unpack", args, options)
        return values

    def matmul(self, *args: Any, **options: Any) -> Tensor:
        product: Tensor = self._recall("matmul", args, options)
        return product


def _key(value: Any) -> Any:
    """What stands for an argument in a dictionary: tensors by their content."""
    if isinstance(value, Tensor):
        return (
            value.dtype,
            tuple(value.shape),
            value.contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
    return tuple(map(_key, value)) if isinstance(value, tuple | list) else value


def assert_identical(
    got: tuple[Tensor, ...] | Tensor, expected: tuple[Tensor, ...] | Tensor, what: object = ""
) -> None:
    """Equality bit for bit; NaN of any payload equals NaN."""
    if isinstance(expected, tuple):
        assert isinstance(got, tuple) and len(got) == len(expected)
        for number, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_identical(a, b, f"result {number} {what}")
        return
    assert isinstance(got, Tensor)
    got, expected = got.cpu(), expected.cpu()
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    if expected.dtype.is_floating_point:
        nan = expected.isnan()
        assert torch.equal(got.isnan(), nan), f"NaN in other places: {what}"
        got, expected = got.masked_fill(nan, 0.0), expected.masked_fill(nan, 0.0)
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
        got, expected = got.contiguous().view(integer), expected.contiguous().view(integer)
    if not torch.equal(got, expected):
        wrong = (got != expected).flatten().nonzero().flatten()
        first = int(wrong[0])
        pytest.fail(
            f"{len(wrong)} of {expected.numel()} differ, first at {first}: "
            f"{got.flatten()[first]} instead of {expected.flatten()[first]} ({what})"
        )
