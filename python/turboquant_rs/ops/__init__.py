"""The operators `turboquant_rs::*`: one vocabulary for every backend, dispatched by PyTorch.

Operators whose names end in `_out` fill memory that the caller owns; those of the same name without it, and
`quantize` and `dequantize` over bytes instead of planes, allocate it. Their arguments are positional and
flat, and the schema is their signature (`print(ops.pack)` shows it):

    packed, scales, zero_points = ops.pack(x, *scheme.op_args(), *rounding.op_args(), planes, nan_zero)

The CPU runs the Rust extension (`ops.cpu`), CUDA the kernels of `cuda/` (`ops.cuda`); a device without a
backend of its own runs the specification (`ops.reference`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from turboquant_rs.ops import autograd, cpu, cuda, reference
from turboquant_rs.ops.schema import OPS
from turboquant_rs.ops.tiles import from_tiles, to_tiles

pack_out: Callable[..., None] = OPS.pack_out.default
encode_out: Callable[..., None] = OPS.encode_out.default
fake_quantize_out: Callable[..., None] = OPS.fake_quantize_out.default
fake_quantize_backward_out: Callable[..., None] = OPS.fake_quantize_backward_out.default
inject_noise_out: Callable[..., None] = OPS.inject_noise_out.default
unpack_out: Callable[..., None] = OPS.unpack_out.default
pack_codes_out: Callable[..., None] = OPS.pack_codes_out.default
unpack_codes_out: Callable[..., None] = OPS.unpack_codes_out.default
matmul_out: Callable[..., None] = OPS.matmul_out.default
pack: Callable[..., tuple[Tensor, Tensor, Tensor]] = OPS.pack.default
quantize: Callable[..., tuple[Tensor, Tensor, Tensor]] = OPS.quantize.default
encode: Callable[..., Tensor] = OPS.encode.default
fake_quantize: Callable[..., tuple[Tensor, Tensor, Tensor]] = OPS.fake_quantize.default
fake_quantize_backward: Callable[..., tuple[Tensor, Tensor]] = OPS.fake_quantize_backward.default
inject_noise: Callable[..., Tensor] = OPS.inject_noise.default
unpack: Callable[..., Tensor] = OPS.unpack.default
dequantize: Callable[..., Tensor] = OPS.dequantize.default
pack_codes: Callable[..., Tensor] = OPS.pack_codes.default
unpack_codes: Callable[..., Tensor] = OPS.unpack_codes.default
matmul: Callable[..., Tensor] = OPS.matmul.default
matmul_refined_out: Callable[..., None] = OPS.matmul_refined_out.default
matmul_refined: Callable[..., tuple[Tensor, Tensor]] = OPS.matmul_refined.default
to_panels_out: Callable[..., None] = OPS.to_panels_out.default
from_panels_out: Callable[..., None] = OPS.from_panels_out.default
to_panels: Callable[..., tuple[Tensor, Tensor, Tensor]] = OPS.to_panels.default
from_panels: Callable[..., tuple[Tensor, Tensor, Tensor]] = OPS.from_panels.default

__all__ = [
    "autograd",
    "cpu",
    "cuda",
    "dequantize",
    "encode",
    "encode_out",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_backward_out",
    "fake_quantize_out",
    "from_panels",
    "from_panels_out",
    "from_tiles",
    "inject_noise",
    "inject_noise_out",
    "matmul",
    "matmul_out",
    "matmul_refined",
    "matmul_refined_out",
    "pack",
    "pack_codes",
    "pack_codes_out",
    "pack_out",
    "quantize",
    "reference",
    "to_panels",
    "to_panels_out",
    "to_tiles",
    "unpack",
    "unpack_codes",
    "unpack_codes_out",
    "unpack_out",
]
