"""The vocabulary: every operator declared once, with its shape rule.

A backend implements the `*_out` operators, which fill memory that the caller owns. The operators that
return tensors are written here once, over those, for every backend.

Two groups of arguments recur, always flat and always in this order:

* `SCHEME`, what `Scheme.op_args()` returns. `group_size` 0 is one group a row; `table` holds the ascending
  levels on the 256-step grid, or nothing; `scale` is extreme, mse or rms.
* `ROUNDING`, what `Rounding.op_args(offset)` returns. `rounding` is nearest, iid, antithetic, stratified,
  systematic or subtractive; `seed` is the two's complement of a u64; `stream` is a CRC-32; `offset` is the
  logical index of the tensor's first element.

`encode` is `pack` on scales that are given; `fake_quantize` is `unpack(pack(x))` in one pass, on scales that
it chooses and returns or, `given`, on those that lie in the outputs; its gradients are an operator of their
own.

`planes` lists widths, most significant first, or is `[8]`: one byte a code, whatever the bits.

`matmul_refined` is a matmul with int8 activations whose rows of x read `refined_bits` where their size, that
of the row's scales, is above `threshold`, else `read_bits`; it returns y and which rows of x were refined.

A packed matrix is `layout` canonical, or for weights that are used again and again the order in which kernels
read it: panels on the CPU, tiles on CUDA (`ops.tiles`). `to_panels` and `from_panels`, `to_tiles` and
`from_tiles` go from one to the other; nothing is lost. The scales and
zero points of panels are `(rows, groups)` with rows padded to 16, in an order of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import register_fake

from turboquant_rs.ops.direct import unseen
from turboquant_rs.scheme import zero_point_dtype

NAMESPACE = "turboquant_rs"
_Library: Any = torch.library.Library  # untyped in torch
LIBRARY = _Library(NAMESPACE, "DEF")

FLOAT_NAMES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
}
"""The dtypes that tensors may have, by the names that the extension knows."""

BYTE_CODES = [8]
"""The planes of unpacked codes: one byte a code."""

_SCHEME = (
    "int bits, int group_size, bool symmetric, bool nested, int[] table, str scale, ScalarType scale_dtype"
)
_ROUNDING = (
    "str rounding, int seed, int step, int stream, int draw_bits, float variance, bool preserve_variance, "
    "int offset"
)
_STORED = "Tensor packed, Tensor scales, Tensor zero_points"

_SCHEMAS = (
    f"pack_out(Tensor x, {_SCHEME}, {_ROUNDING}, int[] planes, bool nan_zero, "
    "Tensor(a!) packed, Tensor(b!) scales, Tensor(c!) zero_points) -> ()",
    f"encode_out(Tensor x, Tensor scales, Tensor zero_points, {_SCHEME}, int[] planes, "
    "Tensor(a!) packed) -> ()",
    f"unpack_out({_STORED}, {_SCHEME}, {_ROUNDING}, int[] planes, int read_bits, Tensor(a!) out) -> ()",
    f"fake_quantize_out(Tensor x, {_SCHEME}, {_ROUNDING}, bool given, int read_bits, "
    "Tensor(a!) scales, Tensor(b!) zero_points, Tensor(c!) out) -> ()",
    f"fake_quantize_backward_out(Tensor grad, Tensor x, Tensor scales, Tensor zero_points, {_SCHEME}, "
    "int read_bits, Tensor(a!) grad_x, Tensor(b!) grad_scales) -> ()",
    f"inject_noise_out(Tensor x, Tensor widths, int group_size, bool preserve, {_ROUNDING}, "
    "Tensor(a!) out) -> ()",
    "pack_codes_out(Tensor codes, int[] planes, Tensor(a!) packed) -> ()",
    "unpack_codes_out(Tensor packed, int[] planes, int read_bits, Tensor(a!) codes) -> ()",
    f"matmul_out(Tensor x, {_STORED}, Tensor? bias, {_SCHEME}, {_ROUNDING}, int[] planes, int read_bits, "
    "str activations, str layout, SymInt n, Tensor(a!) out) -> ()",
    f"matmul_refined_out(Tensor x, {_STORED}, Tensor? bias, {_SCHEME}, {_ROUNDING}, int[] planes, "
    "int read_bits, int refined_bits, float threshold, str layout, SymInt n, Tensor(a!) out, "
    "Tensor(b!) refined) -> ()",
    f"to_panels_out({_STORED}, {_SCHEME}, int[] planes, SymInt k, "
    "Tensor(a!) panels, Tensor(b!) panel_scales, Tensor(c!) panel_zero_points) -> ()",
    f"from_panels_out(Tensor panels, Tensor panel_scales, Tensor panel_zero_points, {_SCHEME}, int[] planes, "
    "SymInt k, Tensor(a!) packed, Tensor(b!) scales, Tensor(c!) zero_points) -> ()",
    f"pack(Tensor x, {_SCHEME}, {_ROUNDING}, int[] planes, bool nan_zero) -> (Tensor, Tensor, Tensor)",
    f"quantize(Tensor x, {_SCHEME}, {_ROUNDING}, bool nan_zero) -> (Tensor, Tensor, Tensor)",
    f"encode(Tensor x, Tensor scales, Tensor zero_points, {_SCHEME}, int[] planes) -> Tensor",
    f"fake_quantize(Tensor x, Tensor? scales, Tensor? zero_points, {_SCHEME}, {_ROUNDING}, int read_bits) "
    "-> (Tensor, Tensor, Tensor)",
    f"fake_quantize_backward(Tensor grad, Tensor x, Tensor scales, Tensor zero_points, {_SCHEME}, "
    "int read_bits) -> (Tensor, Tensor)",
    f"inject_noise(Tensor x, Tensor widths, int group_size, bool preserve, {_ROUNDING}) -> Tensor",
    f"unpack({_STORED}, {_SCHEME}, {_ROUNDING}, int[] planes, int read_bits, SymInt[] shape, "
    "ScalarType dtype) -> Tensor",
    f"dequantize(Tensor codes, Tensor scales, Tensor zero_points, {_SCHEME}, {_ROUNDING}, "
    "ScalarType dtype) -> Tensor",
    "pack_codes(Tensor codes, int[] planes) -> Tensor",
    "unpack_codes(Tensor packed, int[] planes, int read_bits, SymInt[] shape) -> Tensor",
    f"matmul(Tensor x, {_STORED}, Tensor? bias, {_SCHEME}, {_ROUNDING}, int[] planes, int read_bits, "
    "str activations, str layout, SymInt n) -> Tensor",
    f"matmul_refined(Tensor x, {_STORED}, Tensor? bias, {_SCHEME}, {_ROUNDING}, int[] planes, "
    "int read_bits, int refined_bits, float threshold, str layout, SymInt n) -> (Tensor, Tensor)",
    f"to_panels({_STORED}, {_SCHEME}, int[] planes, SymInt k) -> (Tensor, Tensor, Tensor)",
    f"from_panels(Tensor panels, Tensor panel_scales, Tensor panel_zero_points, {_SCHEME}, int[] planes, "
    "SymInt n, SymInt k) -> (Tensor, Tensor, Tensor)",
)

for _schema in _SCHEMAS:
    LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)

OPS: Any = getattr(torch.ops, NAMESPACE)
"""The registered operators."""


# Shapes ---------------------------------------------------------------------------------------------------


def rows_and_k(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor `(..., k)` seen as rows of length k; a 0-d tensor is one row of one element."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def groups_per_row(k: int, group_size: int) -> int:
    """Groups of a row of k elements; the last one may be short."""
    return -(-k // group_size) if group_size else min(k, 1)


def packed_nbytes(rows: int, k: int, planes: Sequence[int]) -> int:
    """Bytes of the blob: plane after plane, each row padded to a byte."""
    return sum(rows * ((k * width + 7) // 8) for width in planes)


PANEL_ROWS, PANEL_COLUMNS = 16, 32
"""What the rows and columns of panels are padded to multiples of."""


def panel_columns(k: int, group_size: int) -> int:
    """Columns of k in panels: groups padded to four, then all of them to whole panels."""
    size = group_size or max(k, 1)
    columns = k // size * (-(-size // 4) * 4) + -(-(k % size) // 4) * 4
    return -(-columns // PANEL_COLUMNS) * PANEL_COLUMNS


def panels_nbytes(rows: int, k: int, group_size: int, planes: Sequence[int]) -> int:
    """Bytes of a packed matrix in panels."""
    rows = -(-rows // PANEL_ROWS) * PANEL_ROWS
    return rows * panel_columns(k, group_size) // 8 * sum(planes)


# The operators that return tensors ------------------------------------------------------------------------
# Each allocates, and leaves the work to the `*_out` operator of the backend that it is registered for.


class SchemeArgs(NamedTuple):
    """SCHEME, by name."""

    bits: int
    group_size: int
    symmetric: bool
    nested: bool
    table: Sequence[int]
    scale: str
    scale_dtype: torch.dtype


class RoundingArgs(NamedTuple):
    """ROUNDING, by name."""

    mode: str
    seed: int
    step: int
    stream: int
    draw_bits: int
    variance: float
    preserve_variance: bool
    offset: int


def split_args(args: Sequence[Any]) -> tuple[SchemeArgs, RoundingArgs, Sequence[Any]]:
    """SCHEME, ROUNDING and what follows them in a flat argument list."""
    return SchemeArgs(*args[:7]), RoundingArgs(*args[7:15]), args[15:]


def _allocate_groups(x: Tensor, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Memory for the scales and zero points `(..., groups)` of x `(..., k)`."""
    scheme, rounding, _ = split_args(args)
    _, k = rows_and_k(x.shape)
    # Sizes one by one are parsed faster than a tuple of them.
    shape = (*x.shape[:-1], groups_per_row(k, scheme.group_size))
    scales = x.new_empty(*shape, dtype=scheme.scale_dtype)
    dtype = zero_point_dtype(scheme.symmetric, rounding.preserve_variance)
    if dtype is None:
        return scales, x.new_empty(0, dtype=torch.uint8)
    return scales, x.new_empty(*shape, dtype=dtype)


def _allocate_pack(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, planes, _ = args
    packed = x.new_empty(packed_nbytes(*rows_and_k(x.shape), planes), dtype=torch.uint8)
    return packed, *_allocate_groups(x, args)


def _allocate_quantize(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), *_allocate_groups(x, args)


def _allocate_encode(x: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> Tensor:
    return x.new_empty((packed_nbytes(*rows_and_k(x.shape), args[-1]),), dtype=torch.uint8)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _allocate_fake_quantize(
    x: Tensor, scales: Tensor | None, zero_points: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), *_allocate_groups(x, args)


def _allocate_fake_quantize_backward(
    grad: Tensor, x: Tensor, scales: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return _like(x), torch.empty_like(scales, dtype=torch.float32)


def _allocate_inject_noise(x: Tensor, *args: Any) -> Tensor:
    return _like(x)


def _allocate_unpack(packed: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> Tensor:
    shape, dtype = args[-2:]
    return packed.new_empty(shape, dtype=dtype)


def _allocate_dequantize(codes: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(codes, dtype=args[-1], memory_format=torch.contiguous_format)


def _allocate_pack_codes(codes: Tensor, planes: Sequence[int]) -> Tensor:
    return codes.new_empty((packed_nbytes(*rows_and_k(codes.shape), planes),))


def _allocate_unpack_codes(
    packed: Tensor, planes: Sequence[int], read_bits: int, shape: Sequence[int]
) -> Tensor:
    return packed.new_empty(shape)


def _allocate_matmul(x: Tensor, packed: Tensor, scales: Tensor, *args: Any) -> Tensor:
    check_matmul_shapes(x, scales)
    return x.new_empty((*x.shape[:-1], args[-1]))


def _allocate_matmul_refined(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _allocate_matmul(x, *args), x.new_empty(x.shape[:-1], dtype=torch.bool)


def _allocate_to_panels(
    packed: Tensor, scales: Tensor, zero_points: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    scheme, planes, k = SchemeArgs(*args[:7]), args[7], args[8]
    n, groups = scales.shape
    padded = (-(-n // PANEL_ROWS) * PANEL_ROWS, groups)
    return (
        packed.new_empty(panels_nbytes(n, k, scheme.group_size, planes)),
        scales.new_empty(padded),
        zero_points.new_empty(padded if zero_points.numel() else 0),
    )


def _allocate_from_panels(
    panels: Tensor, panel_scales: Tensor, panel_zero_points: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    planes, n, k = args[7:]
    shape = (n, panel_scales.shape[1])
    return (
        panels.new_empty(packed_nbytes(n, k, planes)),
        panel_scales.new_empty(shape),
        panel_zero_points.new_empty(shape if panel_zero_points.numel() else 0),
    )


Fill = Callable[..., None]
"""An `*_out` operator, or a backend's implementation of it."""


def _pack(fill: Fill, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate_pack(x, *args)
    fill(x, *args, *outputs)
    return outputs


def _quantize(fill: Fill, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, zero_points = _allocate_quantize(x, *args)
    *scheme_and_rounding, nan_zero = args
    fill(x, *scheme_and_rounding, BYTE_CODES, nan_zero, codes.view(-1), scales, zero_points)
    return codes, scales, zero_points


def _encode(fill: Fill, *args: Any) -> Tensor:
    packed = _allocate_encode(*args)
    fill(*args, packed)
    return packed


def _fake_quantize(
    fill: Fill, x: Tensor, scales: Tensor | None, zero_points: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out, used_scales, used_zeros = _allocate_fake_quantize(x, scales, zero_points, *args)
    given = scales is not None
    for name, part, used in (("scales", scales, used_scales), ("zero_points", zero_points, used_zeros)):
        if given and used.numel():
            used.copy_(check_given(name, part, used))  # rounds to the dtype of scales, ties to even
    *scheme_and_rounding, read_bits = args
    fill(x, *scheme_and_rounding, given, read_bits, used_scales, used_zeros, out)
    return out, used_scales, used_zeros


def _fake_quantize_backward(fill: Fill, grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    outputs = _allocate_fake_quantize_backward(grad, *args)
    fill(grad, *args, *outputs)
    return outputs


def _inject_noise(fill: Fill, *args: Any) -> Tensor:
    out = _allocate_inject_noise(*args)
    fill(*args, out)
    return out


def _unpack(fill: Fill, *args: Any) -> Tensor:
    out = _allocate_unpack(*args)
    fill(*args[:-2], out)
    return out


def _dequantize(
    fill: Fill, codes: Tensor, scales: Tensor, zero_points: Tensor, bits: int, *args: Any
) -> Tensor:
    out = _allocate_dequantize(codes, scales, zero_points, *args)
    fill(codes.reshape(-1), scales, zero_points, bits, *args[:-1], BYTE_CODES, bits, out)
    return out


def _pack_codes(fill: Fill, codes: Tensor, planes: Sequence[int]) -> Tensor:
    packed = _allocate_pack_codes(codes, planes)
    fill(codes, planes, packed)
    return packed


def _unpack_codes(
    fill: Fill, packed: Tensor, planes: Sequence[int], read_bits: int, shape: Sequence[int]
) -> Tensor:
    codes = _allocate_unpack_codes(packed, planes, read_bits, shape)
    fill(packed, planes, read_bits, codes)
    return codes


def _matmul(fill: Fill, x: Tensor, *args: Any) -> Tensor:
    out = _allocate_matmul(x, *args)
    fill(x, *args, out)
    return out


def _matmul_refined(fill: Fill, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    outputs = _allocate_matmul_refined(x, *args)
    fill(x, *args, *outputs)
    return outputs


def _to_panels(fill: Fill, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate_to_panels(*args)
    fill(*args, *outputs)
    return outputs


def _from_panels(fill: Fill, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate_from_panels(*args)
    *stored, _n, k = args
    fill(*stored, k, *outputs)
    return outputs


# Shape rules ----------------------------------------------------------------------------------------------


def check_matmul_shapes(x: Tensor, scales: Tensor) -> None:
    """Refuses what no matmul can take: x without a last dimension, weights that are no matrix."""
    torch._check_value(
        x.dim() >= 1 and scales.dim() == 2,
        lambda: (
            f"matmul takes x: (..., k) and a packed matrix (n, k), got x of shape {tuple(x.shape)} and "
            f"scales of shape {tuple(scales.shape)}; reshape the packed tensor's source to two dimensions"
        ),
    )


def check_given(name: str, part: Tensor | None, used: Tensor) -> Tensor:
    """Scales or zero points to encode with; refuses those of another shape or kind than is used."""
    got = "none" if part is None else f"{part.dtype} {tuple(part.shape)}"
    kind = "floats" if used.is_floating_point() else str(used.dtype)
    torch._check_value(
        part is not None
        and part.shape == used.shape
        and (part.dtype == used.dtype or (part.is_floating_point() and used.is_floating_point())),
        lambda: f"given {name} must be {kind} {tuple(used.shape)}, got {got}",
    )
    assert part is not None
    return part


def _writes_outputs(*args: Any) -> None:
    """The rule of the `*_out` operators: nothing is returned, so no shape has to be inferred."""


RULES: dict[str, tuple[Callable[..., Any], str, Callable[..., Any]]] = {
    "pack": (_pack, "pack_out", _allocate_pack),
    "quantize": (_quantize, "pack_out", _allocate_quantize),
    "encode": (_encode, "encode_out", _allocate_encode),
    "fake_quantize": (_fake_quantize, "fake_quantize_out", _allocate_fake_quantize),
    "fake_quantize_backward": (
        _fake_quantize_backward,
        "fake_quantize_backward_out",
        _allocate_fake_quantize_backward,
    ),
    "inject_noise": (_inject_noise, "inject_noise_out", _allocate_inject_noise),
    "unpack": (_unpack, "unpack_out", _allocate_unpack),
    "dequantize": (_dequantize, "unpack_out", _allocate_dequantize),
    "pack_codes": (_pack_codes, "pack_codes_out", _allocate_pack_codes),
    "unpack_codes": (_unpack_codes, "unpack_codes_out", _allocate_unpack_codes),
    "matmul": (_matmul, "matmul_out", _allocate_matmul),
    "matmul_refined": (_matmul_refined, "matmul_refined_out", _allocate_matmul_refined),
    "to_panels": (_to_panels, "to_panels_out", _allocate_to_panels),
    "from_panels": (_from_panels, "from_panels_out", _allocate_from_panels),
}
"""The operators that return tensors: what they do, the operator that fills their memory, their shape rule."""

OUT_OPS = (
    *("pack_out", "encode_out", "unpack_out", "pack_codes_out", "unpack_codes_out"),
    *("fake_quantize_out", "fake_quantize_backward_out", "inject_noise_out"),
    *("matmul_out", "matmul_refined_out", "to_panels_out", "from_panels_out"),
)
"""What a backend implements."""


IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}
"""What the dispatcher calls, by device and name of the operator."""


def operator(name: str, *tensors: Tensor) -> Callable[..., Any]:
    """The operator for operands, of which these are the tensors; past the dispatcher where nobody sees it.

    Taking two dozen arguments apart costs the dispatcher more than a small kernel.
    """
    found = IMPLEMENTATIONS.get(tensors[0].device.type)
    if found is not None and unseen(*tensors):
        return found[name]
    function: Callable[..., Any] = getattr(OPS, name).default
    return function


def register(backend: dict[str, Callable[..., Any]], key: str) -> None:
    """Registers a backend's `*_out` operators, and the operators that return tensors over them.

    Args:
        backend: An implementation of each of `OUT_OPS`, and of what it can do better than over these.
        key: The dispatch key of its tensors.
    """
    every: dict[str, Callable[..., Any]] = {name: backend[name] for name in OUT_OPS}
    for name, (compose, out_op, _rule) in RULES.items():
        every[name] = backend.get(name) or partial(compose, backend[out_op])
    for name, function in every.items():
        LIBRARY.impl(name, function, key)
    IMPLEMENTATIONS[key.lower()] = every | {name: _counted(name, every[name]) for name in OUT_OPS}


def written_by(name: str) -> tuple[int, ...]:
    """Positions of the arguments that an operator writes."""
    arguments = getattr(OPS, name).default._schema.arguments
    return tuple(at for at, argument in enumerate(arguments) if argument.is_write)


def count_writes(args: Sequence[Any], written: Sequence[int]) -> None:
    """Tells autograd, which may have kept what was there."""
    for at in written:
        if not args[at].is_inference():
            increment_version(args[at])


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What fills memory, with what the dispatcher's way to it does besides."""
    written = written_by(name)

    def call(*args: Any) -> Any:
        function(*args)
        count_writes(args, written)

    return call


for _name, (_compose, _out_op, _shape_rule) in RULES.items():
    register_fake(f"{NAMESPACE}::{_name}", _shape_rule, lib=LIBRARY)
for _name in OUT_OPS:
    register_fake(f"{NAMESPACE}::{_name}", _writes_outputs, lib=LIBRARY)
