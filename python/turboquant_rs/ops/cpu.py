"""The CPU backend: hands the memory of tensors to the Rust extension, without a copy where it can.

The extension knows NumPy arrays of one dimension. bfloat16 and float16 travel as u16 with the name of their
type beside them. Everything is checked there: lengths, schemes, values.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import Parameter

import turboquant_rs._core as _core
from turboquant_rs.ops.direct import observed
from turboquant_rs.ops.schema import FLOAT_NAMES, OUT_OPS, register, rows_and_k

# One team of threads with PyTorch's operators where that can be: two would wait for each other.
shares_threads: bool = _core.share_threads(torch._C.__file__)
# Threads do not survive a fork: the child's first call builds a pool of its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_core.after_fork)

active_isa = _core.active_isa
available_isas = _core.available_isas
compiled_isas = _core.compiled_isas
force_isa = _core.force_isa
philox = _core.philox
version = _core.version
read_bandwidth = _core.read_bandwidth
copy_bandwidth = _core.copy_bandwidth
multiply_peak = _core.multiply_peak
allocate = _core.allocate
ladder = _core.ladder

_HALVES = (torch.bfloat16, torch.float16)


def _name(x: Tensor) -> str:
    """The extension's name of a tensor's dtype."""
    try:
        return FLOAT_NAMES[x.dtype]
    except KeyError:
        raise TypeError(
            f"x must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it first"
        ) from None


def _array(x: Tensor) -> Any:
    """The memory of a tensor as a NumPy array of one dimension; a copy where it is not contiguous."""
    if x.requires_grad:
        x = x.detach()
    if not x.is_contiguous():
        x = x.contiguous()
    if x.dtype in _HALVES:
        x = x.view(torch.uint16)
    return x.numpy().reshape(-1)


def _written(out: Tensor) -> Any:
    """The memory of an output, which must be contiguous for the extension to fill it."""
    if not out.is_contiguous():
        raise ValueError(f"outputs are contiguous, got strides {out.stride()} for shape {tuple(out.shape)}")
    return _array(out)


def _scheme(args: Sequence[Any]) -> tuple[Any, ...]:
    """SCHEME, the first 7 of args, as a tuple, the scale's dtype by name."""
    return (*args[:6], FLOAT_NAMES[args[6]])


def _scheme_and_rounding(args: Sequence[Any]) -> tuple[Any, Any]:
    """SCHEME and ROUNDING, the first 15 of args, as two tuples."""
    return _scheme(args), args[7:15]


def pack_out(x: Tensor, *args: Any) -> None:
    """Quantize x `(..., k)` and pack the codes; fills packed, scales and zero_points."""
    planes, nan_zero, packed, scales, zero_points = args[15:]
    _core.pack(
        _array(x),
        _name(x),
        *rows_and_k(x.shape),
        *_scheme_and_rounding(args),
        planes,
        nan_zero,
        _written(packed),
        _written(scales),
        _written(zero_points),
        torch.get_num_threads(),
    )


def encode_out(x: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> None:
    """Pack the codes of x `(..., k)` on given scales and zero points; fills packed."""
    planes, packed = args[7:]
    _core.encode(
        _array(x),
        _name(x),
        _array(scales),
        _array(zero_points),
        *rows_and_k(x.shape),
        _scheme(args),
        planes,
        _written(packed),
        torch.get_num_threads(),
    )


def fake_quantize_out(x: Tensor, *args: Any) -> None:
    """Quantize and dequantize x `(..., k)` into out, on `given` scales or filling scales and zero_points."""
    given, read_bits, scales, zero_points, out = args[15:]
    _core.fake_quantize(
        _array(x),
        _name(x),
        *rows_and_k(x.shape),
        *_scheme_and_rounding(args),
        given,
        read_bits,
        _written(scales),
        _written(zero_points),
        _written(out),
        torch.get_num_threads(),
    )


def fake_quantize_backward_out(
    grad: Tensor, x: Tensor, scales: Tensor, zero_points: Tensor, *args: Any
) -> None:
    """The gradients of `fake_quantize` in x `(..., k)` and, f32, in the scales `(..., groups)` it used."""
    read_bits, grad_x, grad_scales = args[7:]
    _core.fake_quantize_backward(
        _array(grad),
        _array(x),
        _name(x),
        _array(scales),
        _array(zero_points),
        *rows_and_k(x.shape),
        _scheme(args),
        read_bits,
        _written(grad_x),
        _written(grad_scales),
        torch.get_num_threads(),
    )


def inject_noise_out(x: Tensor, widths: Tensor, group_size: int, preserve: bool, *args: Any) -> None:
    """Add uniform noise of ±width / 2 to x `(..., k)`, one of the f32 widths `(..., groups)` a group."""
    *rounding, out = args
    _core.inject_noise(
        _array(x),
        _name(x),
        _array(widths),
        *rows_and_k(x.shape),
        group_size,
        preserve,
        tuple(rounding),
        _written(out),
        torch.get_num_threads(),
    )


def unpack_out(packed: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> None:
    """Dequantize the top read_bits bits into out `(..., k)`, rounded to its dtype."""
    planes, read_bits, out = args[15:]
    _core.unpack(
        _array(packed),
        _array(scales),
        _array(zero_points),
        *rows_and_k(out.shape),
        *_scheme_and_rounding(args),
        planes,
        read_bits,
        _written(out),
        _name(out),
        torch.get_num_threads(),
    )


def pack_codes_out(codes: Tensor, planes: Sequence[int], packed: Tensor) -> None:
    """Pack codes u8 `(..., k)` into planes."""
    _core.pack_codes(
        _array(codes), *rows_and_k(codes.shape), planes, _written(packed), torch.get_num_threads()
    )


def unpack_codes_out(packed: Tensor, planes: Sequence[int], read_bits: int, codes: Tensor) -> None:
    """Unpack the top read_bits bits of each code into codes u8 `(..., k)`."""
    _core.unpack_codes(
        _array(packed),
        *rows_and_k(codes.shape),
        planes,
        read_bits,
        _written(codes),
        torch.get_num_threads(),
    )


def _product(k: int, args: Sequence[Any]) -> _core.Product:
    """x · Wᵀ for weights of k columns, by what follows the bias in the operator's arguments."""
    planes, read_bits, activations, layout, n = args[15:]
    return _core.Product(n, k, *_scheme_and_rounding(args), planes, read_bits, layout, activations)


def matmul_out(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, bias: Tensor | None, *args: Any
) -> None:
    """x `(..., k)` times the transposed packed matrix `(n, k)`, plus bias `(n,)`, into out `(..., n)`."""
    out = args[-1]
    m, k = rows_and_k(x.shape)
    _product(k, args[:-1]).fill(
        _array(x),
        _name(x),
        m,
        _array(packed),
        _array(scales),
        _array(zero_points),
        None if bias is None else _array(bias.float()),
        _written(out),
        _name(out),
        torch.get_num_threads(),
    )


def matmul_refined_out(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, bias: Tensor | None, *args: Any
) -> None:
    """`matmul_out` with int8 activations, at refined_bits where a row's size is above threshold."""
    planes, read_bits, refined_bits, threshold, layout, n, out, refined = args[15:]
    m, k = rows_and_k(x.shape)
    _product(k, (*args[:15], planes, read_bits, "int8", layout, n)).fill_refined(
        _array(x),
        _name(x),
        m,
        _array(packed),
        _array(scales),
        _array(zero_points),
        None if bias is None else _array(bias.float()),
        _written(out),
        _name(out),
        refined_bits,
        threshold,
        _written(refined),
        torch.get_num_threads(),
    )


def _rearrange(kernel: Any, stored: Sequence[Tensor], n: int, args: Sequence[Any]) -> None:
    """`kernel` (to_panels or from_panels) for a matrix of n rows; args: SCHEME, planes, k, outputs."""
    planes, k, *outputs = args[7:]
    inputs, written = map(_array, stored), map(_written, outputs)
    kernel(*inputs, n, k, _scheme(args), planes, *written, torch.get_num_threads())


def to_panels_out(packed: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> None:
    """Rearrange a packed matrix `(n, k)` into panels."""
    _rearrange(_core.to_panels, (packed, scales, zero_points), scales.shape[0], args)


def from_panels_out(panels: Tensor, panel_scales: Tensor, panel_zero_points: Tensor, *args: Any) -> None:
    """Bring panels back to a packed matrix `(n, k)`."""
    _packed, scales, _zero_points = args[9:]
    _rearrange(_core.from_panels, (panels, panel_scales, panel_zero_points), scales.shape[0], args)


# A call without the dispatcher -----------------------------------------------------------------------------


class Product:
    """x · Wᵀ (+ bias) with one weight, called past the dispatcher: small layers spend longer there than here.

    What a call has to check of the weight is checked once. Its memory stays that of its tensors.
    """

    def __init__(self, packed: Tensor, scales: Tensor, zero_points: Tensor, k: int, *args: Any) -> None:
        """The weight of k columns; `args` are those that follow the bias in the operator's arguments."""
        product = _product(k, args)
        self._fill, self._fill_refined, self._n, self._k = product.fill, product.fill_refined, args[-1], k
        self._weight = (packed, scales, zero_points)
        self._bias: tuple[Tensor, int, Any] | None = None
        self._borrow()

    def _borrow(self) -> None:
        packed, scales, zero_points = self._weight
        self._arrays = (_array(packed), _array(scales), _array(zero_points))
        self._addresses = (packed.data_ptr(), scales.data_ptr(), zero_points.data_ptr())

    def __call__(
        self, x: Tensor, bias: Tensor | None, refinement: tuple[int, float] | None = None
    ) -> tuple[Tensor, int] | None:
        """What the operator returns, bit for bit, and the number of rows refined.

        refinement: refined_bits and threshold of `matmul_refined`; without them it is `matmul`.
        None where the operator must be asked.

        That is where somebody would see the call (a gradient, a transform, a mode, a trace, a profiler),
        where x is no plain tensor in the CPU's memory, and where the operands do not fit.
        """
        if type(x) is not Tensor or observed():
            return None
        shape, dtype = x.shape, x.dtype
        if not shape or shape[-1] != self._k or dtype not in FLOAT_NAMES:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        packed, scales, zero_points = self._weight
        if (packed.data_ptr(), scales.data_ptr(), zero_points.data_ptr()) != self._addresses:
            self._borrow()
        try:
            memory = x if x.is_contiguous() else x.contiguous()
            array = (memory.view(torch.uint16) if dtype in _HALVES else memory).numpy()
            biases = None if bias is None else self._bias_array(bias)
        except (TypeError, RuntimeError):  # not on the CPU, not dense, or values that are not what lies there
            return None
        m = x.numel() // self._k
        # Sizes one by one are parsed faster than a tuple of them.
        out = target = x.new_empty(m, self._n) if len(shape) == 2 else x.new_empty(*shape[:-1], self._n)
        if dtype in _HALVES:
            target = out.view(torch.uint16)
        name = FLOAT_NAMES[dtype]
        operands = (array, name, m, *self._arrays, biases, target.numpy(), name)
        if refinement is None:
            self._fill(*operands, torch.get_num_threads())
            return out, 0
        rows = numpy.empty(m, dtype=bool)
        return out, self._fill_refined(*operands, *refinement, rows, torch.get_num_threads())

    def _bias_array(self, bias: Tensor) -> Any:
        """The bias as the extension takes it. Raises TypeError for one that the operator must look at."""
        known, address = self._bias, bias.data_ptr()
        if known is not None and known[0] is bias and known[1] == address:
            return known[2]
        plain = type(bias) in (Tensor, Parameter) and bias.dtype in FLOAT_NAMES
        if not plain or bias.shape != (self._n,):
            raise TypeError("no plain bias of n elements")
        if bias.dtype is not torch.float32:  # a copy, which would not follow the bias
            return bias.float().numpy()
        array = _array(bias)
        self._bias = (bias, address, array)
        return array


register({name: globals()[name] for name in OUT_OPS}, "CPU")
