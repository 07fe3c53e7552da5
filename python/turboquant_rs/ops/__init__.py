"""The operators `turboquant_rs::*`: one vocabulary for every backend, dispatched by PyTorch.

`pack_out`, `unpack_out`, `pack_codes_out`, `unpack_codes_out` and `matmul_out` fill memory that the caller
owns; `pack`, `quantize`, `unpack`, `dequantize`, `pack_codes`, `unpack_codes` and `matmul` allocate it. Their
arguments are positional and flat, and the schema is their signature (`print(ops.pack)` shows it):

    packed, scales, zero_points = ops.pack(x, *scheme.op_args(), *rounding.op_args(), planes, nan_zero)

The CPU runs the Rust extension (`ops.cpu`); a device without a backend of its own runs the specification
(`ops.reference`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from turboquant_rs.ops import autograd, cpu, reference
from turboquant_rs.ops.schema import OPS

pack_out: Callable[..., None] = OPS.pack_out.default
unpack_out: Callable[..., None] = OPS.unpack_out.default
pack_codes_out: Callable[..., None] = OPS.pack_codes_out.default
unpack_codes_out: Callable[..., None] = OPS.unpack_codes_out.default
matmul_out: Callable[..., None] = OPS.matmul_out.default
pack: Callable[..., tuple[Tensor, Tensor, Tensor]] = OPS.pack.default
quantize: Callable[..., tuple[Tensor, Tensor, Tensor]] = OPS.quantize.default
unpack: Callable[..., Tensor] = OPS.unpack.default
dequantize: Callable[..., Tensor] = OPS.dequantize.default
pack_codes: Callable[..., Tensor] = OPS.pack_codes.default
unpack_codes: Callable[..., Tensor] = OPS.unpack_codes.default
matmul: Callable[..., Tensor] = OPS.matmul.default

__all__ = [
    "autograd",
    "cpu",
    "dequantize",
    "matmul",
    "matmul_out",
    "pack",
    "pack_codes",
    "pack_codes_out",
    "pack_out",
    "quantize",
    "reference",
    "unpack",
    "unpack_codes",
    "unpack_codes_out",
    "unpack_out",
]
