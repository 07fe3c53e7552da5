"""PackedTensor, and the way there and back: `pack`, `unpack`, `matmul`.

    tensor ── pack ──► PackedTensor (planes + scales + zero points) ── unpack ──► tensor
                            └── matmul(x, ·) ──► tensor

A PackedTensor is a plain object that holds three tensors. It is no `torch.Tensor`: it has no gradient and no
arithmetic but `x @ p.T` and `F.linear(x, p)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant_rs import ops
from turboquant_rs.ops.direct import readable
from turboquant_rs.ops.schema import operator
from turboquant_rs.scheme import Rounding, Scheme

__all__ = ["PackedTensor", "matmul", "pack", "unpack"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_tensor(x: Any, name: str) -> Tensor:
    """A tensor as it is, a NumPy array (ml_dtypes' bfloat16 included) as a tensor that shares its memory."""
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, np.ndarray | np.generic):
        raise TypeError(f"{name} must be a torch.Tensor or a numpy.ndarray, got {type(x).__name__}")
    array = np.asarray(x)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise TypeError(
            f"{name} has dtype {array.dtype}, which is none of float32, float64, float16 and bfloat16; "
            "convert it with .astype(np.float32)"
        ) from error


def _check_floats(x: Tensor, name: str) -> None:
    """Refuses what is not a dense tensor of real floats in memory."""
    if x.layout is not torch.strided:
        raise TypeError(f"{name} is sparse ({x.layout}); pass a dense tensor, {name}.to_dense()")
    if x.dtype not in _FLOATS:
        if x.is_complex():
            raise TypeError(f"{name} is complex ({x.dtype}); pass torch.view_as_real({name})")
        raise TypeError(
            f"{name} has dtype {x.dtype}; it must be float32, float64, bfloat16 or float16, "
            f"convert it with {name}.float()"
        )
    if x.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values; give it memory first")


def check_values(scheme: Scheme, scales: Tensor, zero_points: Tensor | None) -> None:
    """Refuses scales and zero points that no packing makes: those of a damaged file or state.

    Raises: ValueError for a scale or zero point that is NaN, infinite or above the largest code.
    """
    _require(scales.isfinite(), "scale", scales, "which is not finite")
    if zero_points is None:
        return
    if zero_points.dtype != torch.uint8:
        _require(zero_points.isfinite(), "zero point", zero_points, "which is not finite")
    elif scheme.bits < 8:
        top = 2**scheme.bits - 1
        _require(zero_points <= top, "zero point", zero_points, f"above {top}, the last code")


def _require(fits: Tensor, name: str, values: Tensor, what: str) -> None:
    """Refuses values of which one, the first is named, does not fit. Waits for them."""
    if bool(fits.all()):
        return
    group = int((~fits).flatten().int().argmax())
    value = values.flatten()[group].item()
    raise ValueError(
        f"the {name} of group {group} is {value}, {what}: the values are damaged, load or pack the original"
    )


@dataclass(eq=False, repr=False)
class PackedTensor:
    """A tensor as bit planes, scales and zero points; made by `tq.pack`.

    Attributes:
        packed: The planes read, one u8 blob: plane after plane, most significant first, each row of a plane
            padded to a byte, element i of a row at bit i·width.
        scales: `(*shape[:-1], groups)` in the scheme's scale_dtype.
        zero_points: `(*shape[:-1], groups)`: u8 for asymmetric schemes, f32 for "mean+var", else None.
        shape: Shape of the tensor it stands for.
        dtype: Dtype of the tensor it was made from, and of `dequantize()`.
        scheme: How it was quantized.
        rounding: How its codes were rounded, with the bias and variance that come with it.
        bits: How many bits of each code are read: scheme.bits, or a prefix.
        offset: Logical index of the first element, for the dither of a slice.
        trusted: To make one: the values are those of a packing. Else they are looked at, on a GPU by waiting
            for them, where that is possible: not in compiled code, and not while a graph is captured.

    Raises: ValueError if the parts do not fit each other, and for scales and zero points of no packing.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    scheme: Scheme
    rounding: Rounding = field(default_factory=Rounding.nearest)
    bits: int = 0
    offset: int = 0
    trusted: InitVar[bool] = False

    # NumPy leaves `array @ p.T` to `__rmatmul__`.
    __array_ufunc__ = None

    def __post_init__(self, trusted: bool) -> None:
        self.shape = torch.Size(self.shape)
        self.bits = self.scheme.check_bits(self.bits or None)
        rows, k = self._rows_and_k
        nbytes = self.scheme.packed_nbytes(rows, k, self.bits)
        if self.packed.dim() != 1 or self.packed.dtype != torch.uint8 or self.packed.numel() < nbytes:
            raise ValueError(
                f"packed must be uint8 ({nbytes},) for shape {tuple(self.shape)} at {self.bits} bits, got "
                f"{self.packed.dtype} {tuple(self.packed.shape)}"
            )
        if self.packed.numel() > nbytes:
            self.packed = self.packed[:nbytes]
        groups = (*self.shape[:-1], self.scheme.groups(k))
        self._check_part("scales", self.scales, groups, self.scheme.scale_torch_dtype)
        zero_dtype = self.rounding.zero_point_dtype(self.scheme)
        if (zero_dtype is None) != (self.zero_points is None):
            has = "no" if zero_dtype is None else str(zero_dtype)
            raise ValueError(
                f"this scheme and rounding have {has} zero points; zero_points does not fit them"
            )
        if self.zero_points is not None and zero_dtype is not None:
            self._check_part("zero_points", self.zero_points, groups, zero_dtype)
        if not trusted and readable(*self._stored):
            check_values(self.scheme, self.scales, self.zero_points)

    @classmethod
    def _made(cls, x: Tensor, scheme: Scheme, rounding: Rounding, *parts: Tensor | None) -> PackedTensor:
        """That of x, of parts that have just been made for it: whether they fit takes long to ask."""
        made = cls.__new__(cls)
        made.packed, made.scales, made.zero_points = parts  # type: ignore[assignment]  # the last may be None
        made.shape, made.dtype, made.scheme, made.rounding = x.shape, x.dtype, scheme, rounding
        made.bits, made.offset = scheme.bits, 0
        return made

    def _check_part(self, name: str, part: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if part.shape != shape or part.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {shape}, got {part.dtype} {tuple(part.shape)}")
        if part.device != self.packed.device:
            raise ValueError(
                f"{name} is on {part.device} and packed on {self.packed.device}; move one of them with .to()"
            )

    @property
    def _rows_and_k(self) -> tuple[int, int]:
        return (math.prod(self.shape[:-1]), self.shape[-1]) if self.shape else (1, 1)

    @property
    def _stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """Planes, scales and zero points as the operators take them: no zero points are an empty tensor."""
        zero_points = self.zero_points
        if zero_points is None:
            zero_points = self.packed.new_empty(0)
        return self.packed, self.scales, zero_points

    def _op_args(self) -> tuple[Any, ...]:
        return (*self.scheme.op_args(), *self.rounding.op_args(self.offset), self.scheme.widths)

    # What it is and what it costs

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self.packed.device

    @property
    def ndim(self) -> int:
        """Number of dimensions of the tensor it stands for."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of elements of the tensor it stands for."""
        return self.shape.numel()

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d packed tensor")
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that decoding needs: the planes read, scales, zero points, the level table."""
        zero_points = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.packed.nbytes + self.scales.nbytes + zero_points + len(self.scheme.table)

    @property
    def bits_per_element(self) -> float:
        """8 · nbytes / numel; 0 for an empty tensor."""
        return 8 * self.nbytes / self.numel() if self.numel() else 0.0

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than the same tensor in float32; 1 for an empty tensor."""
        return 4 * self.numel() / self.nbytes if self.numel() else 1.0

    def __repr__(self) -> str:
        scheme = self.scheme
        bits = str(self.bits) if self.bits == scheme.bits else f"{self.bits} of {scheme.bits}"
        parts = [
            f"shape={tuple(self.shape)}",
            f"dtype={str(self.dtype).removeprefix('torch.')}",
            f"bits={bits}",
            f"group_size={scheme.group_size}",
        ]
        if scheme.levels != "uniform":
            parts.append(f"levels={scheme.levels!r}")
        elif scheme.is_nested:
            parts.append(f"nested planes={scheme.planes}")
        else:
            parts.append("symmetric" if scheme.symmetric else "asymmetric")
        if self.rounding.is_stochastic:
            parts.append(f"rounding={self.rounding.mode}")
        parts += [
            f"{self.nbytes} bytes",
            f"{self.bits_per_element:.2f} bits/element",
            f"{self.ratio:.2f}x smaller than float32",
        ]
        if self.device.type != "cpu":
            parts.append(f"device={self.device}")
        return f"PackedTensor({', '.join(parts)})"

    # Reading

    def codes(self) -> Tensor:
        """The codes read, u8 in the tensor's shape: the top `bits` bits of each code."""
        shape = self.shape or torch.Size((1,))
        return ops.unpack_codes(self.packed, self.scheme.widths, self.bits, shape).view(self.shape)

    def dequantize(self, bits: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor it stands for, read at `bits` (default: all), in `dtype` (default: `self.dtype`)."""
        return unpack(self, dtype=dtype, bits=bits)

    def at(self, bits: int) -> PackedTensor:
        """This tensor read at the prefix of `bits` bits: a view of the same memory.

        Raises: ValueError naming the prefixes that can be read.
        """
        bits = self.scheme.check_bits(bits)
        if bits > self.bits:
            raise ValueError(
                f"{bits} bits are not in memory: this tensor holds the top {self.bits} of "
                f"{self.scheme.bits}; load the file with more bits"
            )
        if bits != self.bits and self.rounding.mode == "subtractive":
            raise ValueError(
                f"subtractive dither is a fraction of the full code, so {self.bits} bits are read or none; "
                "pack with another mode to read prefixes"
            )
        return replace(self, bits=bits, trusted=True)

    def to(self, device: torch.device | str | int) -> PackedTensor:
        """This tensor on `device`; `self` if it is there already."""
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"a packed tensor keeps its codes, got dtype {device}; use dequantize(dtype={device})"
            )
        if self.packed.device == torch.empty(0, device=device).device:
            return self
        zero_points = None if self.zero_points is None else self.zero_points.to(device)
        packed, scales = self.packed.to(device), self.scales.to(device)
        return replace(self, packed=packed, scales=scales, zero_points=zero_points, trusted=True)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise TypeError(
            "a packed tensor is no array of numbers; use p.dequantize().numpy() or p.codes().numpy()"
        )

    def __getitem__(self, index: int | slice) -> PackedTensor:
        """The rows `index` of the first dimension; a view where one plane and a slice of step 1 allow it.

        Raises: TypeError for other kinds of index, IndexError outside, ValueError for tensors of fewer than
        two dimensions (their one row is not cut).
        """
        if self.ndim < 2:
            raise ValueError(
                f"a tensor of shape {tuple(self.shape)} is one row, which is not cut; unpack it first"
            )
        if isinstance(index, slice):
            span = range(*index.indices(len(self)))
            shape = torch.Size((len(span), *self.shape[1:]))
        elif isinstance(index, bool | Tensor) or not hasattr(index, "__index__"):
            raise TypeError(
                f"packed tensors take an int or a slice of rows, got {index!r}; unpack it for more"
            )
        else:
            number = index.__index__()
            if not -len(self) <= number < len(self):
                raise IndexError(f"row {number} is outside of the {len(self)} rows")
            number %= len(self)
            span, shape = range(number, number + 1), self.shape[1:]
        if span.step != 1 and self.rounding.mode == "subtractive":
            raise ValueError(
                f"the dither of a subtractive tensor follows its rows; slice with step 1, not {span.step}"
            )
        offset = self.offset + (span.start if span else 0) * math.prod(self.shape[1:])
        parts = [_rows(plane, span, len(self)) for plane in self._planes()]
        scales = _rows(self.scales, span, len(self))
        zero_points = None if self.zero_points is None else _rows(self.zero_points, span, len(self))
        groups = (*shape[:-1], self.scales.shape[-1])
        return replace(
            self,
            packed=torch.cat(parts) if len(parts) > 1 else parts[0],
            scales=scales.view(groups),
            zero_points=None if zero_points is None else zero_points.view(groups),
            shape=shape,
            offset=offset,
            trusted=True,
        )

    def _planes(self) -> list[Tensor]:
        """The planes read, as views of the blob."""
        rows, k = self._rows_and_k
        planes, start, read = [], 0, 0
        for width in self.scheme.widths:
            if read == self.bits:
                break
            stop = start + rows * -(-k * width // 8)
            planes.append(self.packed[start:stop])
            start, read = stop, read + width
        return planes

    # In PyTorch

    @property
    def T(self) -> _Transposed:
        """The transposed matrix, for `x @ p.T` and nothing else."""
        if self.ndim != 2:
            raise ValueError(f"only a matrix is transposed, got shape {tuple(self.shape)}")
        return _Transposed(self)

    def __rmatmul__(self, x: Any) -> Tensor:
        raise TypeError(
            "x @ p does not take a PackedTensor; its rows lie along k, so a linear layer is x @ p.T, and the "
            "product with W itself is x @ p.dequantize()"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        raise TypeError(
            f"{getattr(func, '__name__', func)} does not take a PackedTensor; F.linear(x, p) and x @ p.T do, "
            "for anything else use p.dequantize()"
        )

    def __reduce__(self) -> tuple[Callable[..., PackedTensor], tuple[Any, ...]]:
        # A view of one plane of many, or of rows, is saved without the rest of its memory.
        parts = (
            None if part is None else part.clone() if part.untyped_storage().nbytes() > part.nbytes else part
            for part in (self.packed, self.scales, self.zero_points)
        )
        scheme, rounding = self.scheme.to_dict(), self.rounding.to_dict()
        return _rebuild, (*parts, tuple(self.shape), self.dtype, scheme, rounding, self.bits, self.offset)


def _rebuild(
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    scheme: dict[str, Any],
    rounding: dict[str, Any],
    bits: int,
    offset: int,
) -> PackedTensor:
    """A PackedTensor from a pickle, checked like any other."""
    return PackedTensor(
        packed,
        scales,
        zero_points,
        torch.Size(shape),
        dtype,
        Scheme.from_dict(scheme),
        Rounding.from_dict(rounding),
        bits,
        offset,
    )


# `torch.load(weights_only=True)`, its default, takes a packed tensor: data, no code.
torch.serialization.add_safe_globals([_rebuild])


def _rows(part: Tensor, span: range, count: int) -> Tensor:
    """The rows `span` of a part with `count` equal rows, flat or not."""
    rows = part.reshape(count, -1) if part.numel() else part.reshape(count, 0)
    if span.step == 1:
        rows = rows[span.start : span.start + len(span)]
    else:
        rows = rows[list(span)]
    return rows.reshape(-1)


@dataclass(frozen=True, eq=False)
class _Transposed:
    """A packed matrix seen as `(k, n)`: the right operand of a matrix product."""

    packed: PackedTensor
    __array_ufunc__ = None

    @property
    def shape(self) -> torch.Size:
        """(k, n)"""
        return torch.Size(reversed(self.packed.shape))

    @property
    def T(self) -> PackedTensor:
        """The packed matrix itself."""
        return self.packed

    def __rmatmul__(self, x: Any) -> Tensor:
        return matmul(x, self.packed)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        products = (torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)
        if func in products and not kwargs and len(args) == 2 and isinstance(args[1], cls):
            return matmul(args[0], args[1].packed)
        raise TypeError(
            f"{getattr(func, '__name__', func)} does not take a transposed PackedTensor; x @ p.T does, for "
            "anything else use p.dequantize().T"
        )


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    if not isinstance(weight, PackedTensor) or isinstance(input, PackedTensor):
        raise TypeError("F.linear takes a packed tensor as its weight; dequantize any other operand")
    return matmul(input, weight, bias)


# The way there and back -----------------------------------------------------------------------------------


def pack(
    x: Tensor | np.ndarray[Any, Any],
    bits: int = 4,
    *,
    scheme: Scheme | None = None,
    rounding: str | Rounding = "nearest",
    seed: int | None = None,
    out: PackedTensor | None = None,
    nan: str = "error",
    **scheme_fields: Any,
) -> PackedTensor:
    """Quantizes a tensor and packs its codes (the operators `quantize` and `pack_codes` in one pass).

    Args:
        x: A tensor or NumPy array of any shape and strides, f32, f64, bf16 or f16; rows: its last dimension.
        bits: Bits a code, 1 to 8.
        scheme: How to quantize, in place of `bits` and the fields.
        rounding: "nearest" (the default: the smallest error of one tensor, 3 dB better than stochastic),
            "stochastic" (unbiased; needs `seed`), or a `tq.Rounding`.
        seed: Seed of "stochastic".
        out: A packed tensor of the same shape and scheme whose memory is filled and returned.
        nan: "error", or "zero" to treat NaN as 0.
        scheme_fields: Other fields of `tq.Scheme`: group_size, symmetric, levels, planes, scale, scale_dtype.

    Returns: the packed tensor, on the device of x.

    Raises:
        TypeError: x is no dense tensor of floats; a field has the wrong type.
        ValueError: NaN, ±Inf or |x| > 2^120 (the first index is named); x requires a gradient; fields that
            contradict each other; `out` that does not fit.
    """
    x = as_tensor(x, "x")
    _check_floats(x, "x")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x requires a gradient and codes have none; pack x.detach(), or pack under torch.no_grad()"
        )
    if scheme is None:
        scheme = _scheme(bits, scheme_fields)
    elif not isinstance(scheme, Scheme):
        raise TypeError(f"scheme must be a tq.Scheme, got {scheme!r}")
    elif scheme_fields or (bits != 4 and bits != scheme.bits):
        given = ", ".join(scheme_fields) or f"bits={bits}"
        raise ValueError(f"the scheme is given twice: scheme={scheme} and {given}; drop one of them")
    if nan not in ("error", "zero"):
        raise ValueError(f'nan must be "error" or "zero", got {nan!r}')
    rounding = Rounding.parse(rounding, seed)
    rounding.check(scheme)
    arguments = (*scheme.op_args(), *rounding.op_args(), scheme.widths, nan == "zero")
    if x.requires_grad:
        x = x.detach()
    if out is not None:
        _check_out(out, x, scheme, rounding)
        outputs = out._stored
        operator("pack_out", x, *outputs)(x, *arguments, *outputs)
        out.dtype, out.rounding, out.offset = x.dtype, rounding, 0
        return out
    packed, scales, zero_points = operator("pack", x)(x, *arguments)
    stored = None if rounding.zero_point_dtype(scheme) is None else zero_points
    return PackedTensor._made(x, scheme, rounding, packed, scales, stored)


_OF_BITS = {bits: Scheme(bits=bits) for bits in range(1, 9)}


def _scheme(bits: int, fields: dict[str, Any]) -> Scheme:
    """The scheme of these fields; checking them takes longer than packing a small tensor."""
    known = None if fields or type(bits) is not int else _OF_BITS.get(bits)
    return Scheme(bits=bits, **fields) if known is None else known


def encode(x: Tensor, scheme: Scheme, scales: Tensor, zero_points: Tensor | None = None) -> PackedTensor:
    """`pack` to nearest on scales that are given, learned ones for instance, instead of chosen.

    x: `(..., k)`. scales: `(..., groups)` floats, rounded to the scheme's scale_dtype. zero_points: u8 of the
    same shape, for asymmetric schemes.

    Raises `ValueError` for scales that are NaN, infinite or subnormal, and shapes that do not fit.
    """
    _check_floats(x, "x")
    stored = scales.detach().to(scheme.scale_torch_dtype).contiguous()
    zeros = x.new_empty(0, dtype=torch.uint8) if zero_points is None else zero_points
    packed = ops.encode(x.detach(), stored, zeros, *scheme.op_args(), scheme.widths)
    return PackedTensor(packed, stored, zero_points, x.shape, x.dtype, scheme, trusted=True)


def _check_out(out: PackedTensor, x: Tensor, scheme: Scheme, rounding: Rounding) -> None:
    """Refuses memory that this packing would not fill exactly."""
    if not isinstance(out, PackedTensor):
        raise TypeError(f"out must be a PackedTensor, got {type(out).__name__}; make one with tq.pack once")
    fits = (
        out.shape == x.shape
        and out.scheme == scheme
        and out.bits == scheme.bits
        and out.device == x.device
        and (out.rounding.preserve == rounding.preserve)
    )
    if not fits:
        raise ValueError(
            f"out does not fit: it is {out!r}, needed are shape {tuple(x.shape)} and {scheme} on {x.device} "
            f'with preserve="{rounding.preserve}"'
        )


def unpack(
    p: PackedTensor,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    out: Tensor | np.ndarray[Any, Any] | None = None,
) -> Tensor:
    """The tensor that `p` stands for (the operators `unpack_codes` and `dequantize` in one pass).

    Args:
        p: What `tq.pack` returned.
        dtype: f32, f64, bf16 or f16; default: the dtype packed from, or that of `out`.
        bits: Read only the planes of the top `bits` bits; default: all that `p` holds.
        out: Contiguous memory of the right shape to fill (no allocation, no page faults in a loop).

    Returns: a tensor of shape `p.shape` (`out` itself if it is a tensor).

    Raises: TypeError for a dtype that is no float; ValueError for bits that end at no plane, and `out` of
    another shape, dtype or device.
    """
    if not isinstance(p, PackedTensor):
        raise TypeError(f"p must be a PackedTensor, got {type(p).__name__}; make one with tq.pack")
    if bits is not None:
        p = p.at(bits)
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    stored = p._stored
    arguments = (*stored, *p._op_args(), p.bits)
    if out is None:
        values: Tensor = operator("unpack", *stored)(*arguments, p.shape, dtype or p.dtype)
        return values
    out = as_tensor(out, "out") if isinstance(out, Tensor) else _shared(out)
    _check_floats(out, "out")
    if out.shape != p.shape or out.device != p.device or out.dtype != (dtype or out.dtype):
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; needed is {dtype or 'a float dtype'} "
            f"{tuple(p.shape)} on {p.device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()} for shape {tuple(out.shape)}")
    target = out.detach()
    operator("unpack_out", *stored, target)(*arguments, target)
    return out


def _shared(out: Any) -> Tensor:
    """A NumPy array as a tensor on its own memory, never on a copy."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a torch.Tensor or a numpy.ndarray, got {type(out).__name__}")
    tensor = as_tensor(out, "out")
    if tensor.data_ptr() != out.ctypes.data:
        raise ValueError("out must be a writable array in native byte order with positive strides")
    return tensor


def matmul(
    x: Tensor | np.ndarray[Any, Any],
    p: PackedTensor,
    bias: Tensor | np.ndarray[Any, Any] | None = None,
    *,
    activations: str = "int8",
    bits: int | None = None,
) -> Tensor:
    """x @ Wᵀ (+ bias) with the packed matrix W, without unpacking it to floats first.

    Args:
        x: `(..., k)`, f32, f64, bf16 or f16.
        p: `(n, k)`.
        bias: `(n,)`.
        activations: "int8": each row of x is quantized to int8 by groups of k, and the product is one of
            integers, the same bits on every CPU. "float": only the weight is quantized. With both, a row with
            NaN or ±Inf gives a row of NaN.
        bits: Read only the planes of the top `bits` bits of W.

    Returns: `(..., n)` in the dtype of x. Differentiable in x and bias.

    Raises: TypeError for operands of the wrong kind; ValueError for shapes or devices that do not fit, and
    for weights that have no integer form (mean+var, subtractive) with activations="int8".
    """
    if not isinstance(p, PackedTensor):
        raise TypeError(f"p must be a PackedTensor, got {type(p).__name__}; make one with tq.pack")
    if p.ndim != 2:
        raise ValueError(
            f"p must be a matrix (n, k), got shape {tuple(p.shape)}; pack a two-dimensional tensor"
        )
    x, bias = as_tensor(x, "x"), None if bias is None else as_tensor(bias, "bias")
    check_linear(x, (p.shape[0], p.shape[1]), p.device, bias)
    if activations not in ("int8", "float"):
        raise ValueError(f'activations must be "int8" or "float", got {activations!r}')
    if bits is not None:
        p = p.at(bits)
    stored = p._stored
    product = operator("matmul", x, *stored, *(() if bias is None else (bias,)))
    y: Tensor = product(x, *stored, bias, *p._op_args(), p.bits, activations, "canonical", p.shape[0])
    return y


def matmul_refined(
    x: Tensor, p: PackedTensor, bias: Tensor | None, *, bits: int, refined_bits: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """`matmul` with int8 activations of p, all of whose bits are there, at `refined_bits` where the size of a
    row of x is above `threshold`, else at `bits`. Also returns which rows of x, `(...)`, were refined."""
    check_linear(x, (p.shape[0], p.shape[1]), p.device, bias)
    tail = (bits, refined_bits, threshold, "canonical", p.shape[0])
    return ops.matmul_refined(x, *p._stored, bias, *p._op_args(), *tail)


def chosen(p: PackedTensor, choice: ops.cuda.chosen.Choice) -> ops.cuda.chosen.Weight:
    """The matrix p (n, k) for a CUDA graph that chooses among its widths when it is replayed."""
    n, k = p.shape
    return ops.cuda.chosen.Weight(p._stored, "canonical", (n, k), choice, *p._op_args())


def check_linear(x: Tensor, shape: tuple[int, int], device: torch.device, bias: Tensor | None) -> None:
    """Refuses operands that do not fit a packed matrix of that shape (n, k) on that device."""
    _check_operand(x, "x", device)
    n, k = shape
    if not x.dim() or x.shape[-1] != k:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit packed weights of shape {shape}: the last "
            f"dimension of x must be k = {k}"
        )
    if bias is not None:
        _check_operand(bias, "bias", device)
        if bias.shape != (n,):
            raise ValueError(f"bias must have shape ({n},) for weights {shape}, got {tuple(bias.shape)}")


def _check_operand(x: Tensor, name: str, device: torch.device) -> None:
    if x.layout is not torch.strided or x.dtype not in _FLOATS:
        _check_floats(x, name)
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and p on {device}; move one of them with .to()")


def autocast(x: Tensor) -> Tensor:
    """x as F.linear would take it: in autocast's dtype where autocast is on (f64 is left alone).

    Raises TypeError for what is no tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
