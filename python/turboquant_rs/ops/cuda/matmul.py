"""x · Wᵀ on packed W.

Float activations, weight in tiles: kernels that read the codes (`tiles`). Otherwise the weight is dequantized
to the dtype of x and multiplied by cuBLAS, which sums in f32.
Integer activations: kernels that multiply integers (`int8`), or where there is none the specification, whose
f64 products are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from turboquant_rs.ops import reference
from turboquant_rs.ops.cuda import int8, tiles
from turboquant_rs.ops.cuda.macros import check_dtype, check_length, check_written, device_of
from turboquant_rs.ops.cuda.quantize import check_source, unpack_out
from turboquant_rs.ops.schema import split_args
from turboquant_rs.ops.tiles import from_tiles, prefix_of

_TENSOR_CORES = (torch.bfloat16, torch.float16)


def matmul_out(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, bias: Tensor | None, *args: Any
) -> None:
    """x `(..., k)` times the transposed packed matrix `(n, k)`, plus bias `(n,)`, into out `(..., n)`."""
    scheme, rounding, (planes, read_bits, activations, layout, n, out) = split_args(args)
    check_operands(x, packed, scales, zero_points, bias, n, out)
    if out.dtype != x.dtype:  # kernels write that of x
        product = x.new_empty(out.shape)
        matmul_out(x, packed, scales, zero_points, bias, *args[:-1], product)
        out.copy_(product)
        return
    if layout == "tiles":
        if activations == "float" and tiles.takes(x, scheme, rounding):
            check_written(out)
            kind = tiles.Weight.of(scheme, planes, read_bits)
            rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
            tiles.multiply(rows, packed, scales, zero_points, bias, kind, out.view(-1, n))
            return
        read = prefix_of(planes, read_bits)
        packed, scales, zero_points = from_tiles(packed, scales, zero_points, read, n, x.shape[-1])
        args = (*args[:18], "canonical", n, out)
    k = x.shape[-1]
    if layout == "panels":
        stored = (packed, scales, zero_points)
        packed, scales, zero_points = reference.from_panels(*stored, scheme, planes, n, k)
        args = (*args[:18], "canonical", n, out)
    x = x.detach()
    if activations != "float":
        if out.numel() and int8.takes(x, scheme, rounding):
            check_written(out)
            stored = (packed, scales, zero_points)
            rows = x.reshape(-1, k).contiguous()
            int8.multiply(rows, *stored, bias, scheme, rounding, planes, read_bits, out.view(-1, n))
        else:
            reference.matmul_out(x, packed, scales, zero_points, bias, *args)
        return
    rows = x.reshape(-1, k) if k else x.new_zeros(out.numel() // max(n, 1), 0)

    def dequantized(dtype: torch.dtype) -> Tensor:
        weight = torch.empty(n, k, dtype=dtype, device=packed.device)
        unpack_out(packed, scales, zero_points, *args[:15], planes, read_bits, weight)
        return weight

    by_dequantized(rows, dequantized, bias, out)


def check_operands(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    bias: Tensor | None,
    n: int,
    *outputs: Tensor,
) -> None:
    """Refuses memory of other devices, kinds and lengths than kernels would touch for x (m, k) and W (n, k).

    outputs: the first is y (m, n). How much there is of W is looked at where its order is known.
    """
    device_of(x, packed, scales, zero_points, *outputs, *(() if bias is None else (bias,)))
    check_source(x.dtype)
    check_dtype("packed", packed, torch.uint8)
    m = math.prod(x.shape[:-1])
    check_length("out", outputs[0], m * n, m, n)
    if bias is not None:
        check_length("bias", bias, n, 1, n)


def by_dequantized(
    x: Tensor, dequantized: Callable[[torch.dtype], Tensor], bias: Tensor | None, out: Tensor
) -> None:
    """x (m, k) times the transposed weight (n, k), in a dtype that cuBLAS takes, plus bias, into out."""
    weight = dequantized(x.dtype if x.dtype in _TENSOR_CORES else torch.float32)
    product = (x.to(weight.dtype) @ weight.T).float()
    if bias is not None:
        product += bias.detach().float()
    broken = ~x.float().isfinite().all(1, keepdim=True)
    out.copy_(product.masked_fill_(broken, float("nan")).view_as(out))
