"""The CPU backend: hands the memory of tensors to the Rust extension, without a copy where it can.

The extension knows NumPy arrays of one dimension. bfloat16 and float16 travel as u16 with the name of their
type beside them. Everything is checked there: lengths, schemes, values.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import turboquant_rs._core as _core
from turboquant_rs.ops.schema import FLOAT_NAMES, OUT_OPS, register, rows_and_k

# Threads do not survive a fork: the child's first call builds a new pool.
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


def matmul_out(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, bias: Tensor | None, *args: Any
) -> None:
    """x `(..., k)` times the transposed packed matrix `(n, k)`, plus bias `(n,)`, into out `(..., n)`."""
    planes, read_bits, activations, layout, n, out = args[15:]
    m, k = rows_and_k(x.shape)
    _core.matmul(
        _array(x),
        _name(x),
        m,
        _array(packed),
        _array(scales),
        _array(zero_points),
        None if bias is None else _array(bias.float()),
        n,
        k,
        *_scheme_and_rounding(args),
        planes,
        read_bits,
        layout,
        activations,
        _written(out),
        _name(out),
        torch.get_num_threads(),
    )


def to_panels_out(packed: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> None:
    """Rearrange a packed matrix `(n, k)` into panels."""
    planes, k, panels, panel_scales, panel_zero_points = args[7:]
    _core.to_panels(
        _array(packed),
        _array(scales),
        _array(zero_points),
        scales.shape[0],
        k,
        _scheme(args),
        planes,
        _written(panels),
        _written(panel_scales),
        _written(panel_zero_points),
        torch.get_num_threads(),
    )


def from_panels_out(panels: Tensor, panel_scales: Tensor, panel_zero_points: Tensor, *args: Any) -> None:
    """Bring panels back to a packed matrix `(n, k)`."""
    planes, k, packed, scales, zero_points = args[7:]
    _core.from_panels(
        _array(panels),
        _array(panel_scales),
        _array(panel_zero_points),
        scales.shape[0],
        k,
        _scheme(args),
        planes,
        _written(packed),
        _written(scales),
        _written(zero_points),
        torch.get_num_threads(),
    )


register({name: globals()[name] for name in OUT_OPS}, "CPU")
