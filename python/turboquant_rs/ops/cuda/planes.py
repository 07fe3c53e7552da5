"""Codes to bit planes, and back: `cuda/planes.cu`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from turboquant_rs.ops.cuda.launcher import Kernel
from turboquant_rs.ops.cuda.macros import (
    aligned,
    check_count,
    check_dtype,
    check_holds,
    check_length,
    check_written,
    device_of,
    plane_macros,
)
from turboquant_rs.ops.schema import BYTE_CODES, packed_nbytes, rows_and_k

THREADS = 256


@cache
def kernel(entry: str, planes: tuple[int, ...], read: int, whole: bool) -> Kernel:
    """`pack_codes` or `unpack_codes`; `whole`: rows are whole units and lie on multiples of them."""
    macros = {**plane_macros(planes), "READ": read, "ALIGNED": whole, "THREADS": THREADS}
    return Kernel("planes.cu", entry, macros)


def bits_read(planes: Sequence[int], read_bits: int) -> int:
    """Bits that are read of each stored code: of unpacked ones the byte."""
    return 8 if list(planes) == BYTE_CODES else read_bits


def planes_read(planes: Sequence[int], read_bits: int) -> int:
    """How many planes the top read_bits bits are. Raises: ValueError if no plane ends there."""
    prefixes = [sum(planes[: i + 1]) for i in range(len(planes))]
    if read_bits not in prefixes:
        raise ValueError(f"cannot read {read_bits} bits of planes {list(planes)}; readable are {prefixes}")
    return prefixes.index(read_bits) + 1


def _run(entry: str, codes: Tensor, packed: Tensor, planes: Sequence[int], read: int) -> None:
    rows, k = rows_and_k(codes.shape)
    units_per_row = -(-k // 8)
    units = rows * units_per_row
    check_count(units, "units of eight codes")
    if units == 0:
        return
    tensors = (codes, packed) if entry == "pack_codes" else (packed, codes)
    function = kernel(entry, tuple(planes), read, k % 8 == 0 and aligned(*tensors))
    pointers = (tensors[0].data_ptr(), tensors[1].data_ptr())
    arguments = (*pointers, rows, k, units_per_row, units)
    function(device_of(*tensors), (-(-units // THREADS),), (THREADS,), arguments)


def pack_codes_out(codes: Tensor, planes: Sequence[int], packed: Tensor) -> None:
    """Pack codes u8 `(..., k)` into planes."""
    check_written(packed)
    check_dtype("packed", packed, torch.uint8)
    rows, k = rows_and_k(codes.shape)
    check_length("packed", packed, packed_nbytes(rows, k, planes), rows, k)
    _run("pack_codes", codes.contiguous(), packed, planes, len(planes))


def unpack_codes_out(packed: Tensor, planes: Sequence[int], read_bits: int, codes: Tensor) -> None:
    """Unpack the top read_bits bits of each code into codes u8 `(..., k)`."""
    check_written(codes)
    check_dtype("codes", codes, torch.uint8)
    read = planes_read(planes, read_bits)
    check_holds(packed, planes[:read], *rows_and_k(codes.shape))
    _run("unpack_codes", codes, packed.contiguous(), planes, read)
