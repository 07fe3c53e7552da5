"""x · Wᵀ with int8 activations, at more bits for the rows of x that need it.

    x ──► scales of its groups ──► which rows are refined ──► none, all or some: a number in memory
                                                               ├──► rows at read_bits, unless all are refined
                                                               └──► rows at refined_bits, if any is

A single row reads the weight once, at its bits; where rows differ, the weight is read at both. The host is
not asked, so nothing is waited for.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from typing import Any

import torch
from torch import Tensor

from turboquant_rs.ops import reference
from turboquant_rs.ops.cuda import int8
from turboquant_rs.ops.cuda.launcher import Kernel, only_if
from turboquant_rs.ops.cuda.macros import check_dtype, check_length, check_written
from turboquant_rs.ops.cuda.matmul import check_operands
from turboquant_rs.ops.schema import rows_and_k, split_args

THREADS = 128

LOW_KINDS, HIGH_KINDS = 1 << 1 | 1 << 3, 1 << 2 | 1 << 3
"""Of the numbers 1 (no row is refined), 2 (all are) and 3 (some), those that need products at either bits."""


@cache
def kernel() -> Kernel:
    """That which decides."""
    return Kernel("matmul_refined.cu", "matmul_refined")


def matmul_refined_out(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, bias: Tensor | None, *args: Any
) -> None:
    """`matmul_out` with int8 activations, at refined_bits where a row's size is above threshold."""
    scheme, rounding, (planes, read_bits, refined_bits, threshold, layout, n, out, refined) = split_args(args)
    stored = (packed, scales, zero_points)
    check_operands(x, *stored, bias, n, out, refined)
    check_length("refined", refined, math.prod(x.shape[:-1]), *rows_and_k(x.shape))
    check_dtype("refined", refined, torch.bool)
    if out.dtype != x.dtype:  # kernels write that of x
        product = x.new_empty(out.shape)
        matmul_refined_out(x, *stored, bias, *args[:-2], product, refined)
        out.copy_(product)
        return
    if layout != "canonical" or not out.numel() or not int8.takes(x, scheme, rounding):
        reference.matmul_refined_out(x, *stored, bias, *args)
        return
    check_written(out, refined)
    rows, low = x.detach().reshape(-1, x.shape[-1]).contiguous(), out.view(-1, n)
    kinds = decide(rows, scheme.group_size, threshold, refined)
    high = torch.empty_like(low)
    for bits, kinds_of_it, y in ((read_bits, LOW_KINDS, low), (refined_bits, HIGH_KINDS, high)):
        with only_if(kinds.data_ptr(), kinds_of_it):
            int8.multiply(rows, *stored, bias, scheme, rounding, planes, bits, y)
    torch.where(refined.view(-1, 1), high, low, out=low)


def decide(x: Tensor, group_size: int, threshold: float, refined: Tensor) -> Tensor:
    """Fills `refined` for the rows of x (m, k). Returns the number in memory that says what is to be done."""
    m, k = x.shape
    columns, device = int8.Columns.of(k, group_size), x.get_device()
    codes = torch.empty(m, columns.stride, dtype=torch.int8, device=x.device)
    terms = torch.empty(m * (columns.groups + columns.segments), dtype=torch.float32, device=x.device)
    sums = terms.data_ptr() + 4 * columns.groups * m
    int8.quantize(x, codes, terms.data_ptr(), sums, columns, False, device)
    kinds = torch.zeros(1, dtype=torch.int32, device=x.device)
    (word,) = struct.unpack("q", struct.pack("d", threshold))
    arguments = (terms.data_ptr(), word, refined.data_ptr(), kinds.data_ptr(), m, columns.groups)
    kernel()(device, (-(-m // THREADS),), (THREADS,), arguments)
    return kinds
