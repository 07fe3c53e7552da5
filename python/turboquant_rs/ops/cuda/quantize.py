"""Tensors to scales and packed codes, and back: `cuda/quantize.cu` and `cuda/dequantize.cu`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from turboquant_rs.ops.cuda import planes as plane_kernels
from turboquant_rs.ops.cuda.launcher import Kernel
from turboquant_rs.ops.cuda.macros import (
    ALIGNMENT,
    DTYPES,
    FULL_VARIANCE,
    MODES,
    aligned,
    check_count,
    check_holds,
    check_length,
    check_written,
    device_of,
    plane_macros,
    scheme_macros,
    source_words,
    table_words,
    variance_units,
)
from turboquant_rs.ops.reference import LLOYD_MAX, check_rounding, refusal_of_scale, refusal_of_value
from turboquant_rs.ops.schema import (
    BYTE_CODES,
    RoundingArgs,
    SchemeArgs,
    groups_per_row,
    packed_nbytes,
    rows_and_k,
    split_args,
)
from turboquant_rs.scheme import zero_point_dtype

UNIT = 8
"""Elements that fill whole bytes of every plane."""

WARP, THREADS, MOST_THREADS = 32, 256, 1024
HELD = 4
"""Units that a thread holds in registers, at most."""

UNPACK_UNITS = 4
"""Units that a thread decodes."""

TILE = 128
"""Elements of the longest tile of random bits."""

NOTHING_REFUSED = 2**63 - 1


class Team(NamedTuple):
    """The threads that share a group, the units each of them holds, the threads of a block."""

    size: int
    units: int
    threads: int
    long: bool

    @classmethod
    def of(cls, group: int) -> Team:
        """For groups of that many elements: part of a warp, a warp, a block, or one that reads again."""
        units = -(-group // UNIT)
        if units <= WARP * HELD:
            size = min(_power_of_2(units), WARP)
            return cls(size, -(-units // size), THREADS, False)
        size = _power_of_2(-(-units // HELD))
        if size <= MOST_THREADS:
            return cls(size, -(-units // size), size, False)
        return cls(MOST_THREADS, 1, MOST_THREADS, True)


def _power_of_2(count: int) -> int:
    """The smallest power of 2 that is not less."""
    return 1 << max(count - 1, 0).bit_length()


@cache
def pack_kernel(macros: tuple[tuple[str, object], ...]) -> Kernel:
    """`pack` of quantize.cu."""
    return Kernel("quantize.cu", "pack", dict(macros))


@cache
def unpack_kernel(macros: tuple[tuple[str, object], ...]) -> Kernel:
    """`unpack` of dequantize.cu."""
    return Kernel("dequantize.cu", "unpack", dict(macros))


def pack_macros(
    dtype: torch.dtype,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    planes: Sequence[int],
    nan_zero: bool,
    k: int,
    whole: bool,
) -> dict[str, object]:
    """What `pack` is compiled for; `whole`: all memory lies on multiples of the widest access."""
    group = group_length(k, scheme.group_size)
    team = Team.of(group)
    exact = k % group == 0
    if team.size < WARP:
        in_order = exact and group == team.size * UNIT
    else:
        in_order = k % TILE == 0 and group % TILE == 0
    return {
        **scheme_macros(scheme, rounding.preserve_variance),
        **plane_macros(planes),
        **draw_macros(rounding, in_order),
        "X": DTYPES[dtype],
        "NAN_ZERO": nan_zero,
        "PRESERVE": rounding.preserve_variance,
        "EXACT": exact,
        "ALIGNED": whole and k % UNIT == 0 and (group % UNIT == 0 or group == k),
        "TEAM": team.size,
        "VECTORS": team.units,
        "LONG": team.long,
        "THREADS": team.threads,
    }


def draw_macros(rounding: RoundingArgs, in_order: bool) -> dict[str, object]:
    """MODE to TILED; `in_order`: the units of a warp are consecutive, and begin a tile where the tensor does."""
    return {
        "MODE": MODES[rounding.mode],
        "DRAW_BITS": rounding.draw_bits,
        "SHRINK": variance_units(rounding) != FULL_VARIANCE,
        "TILED": rounding.mode != "nearest" and in_order and rounding.offset % TILE == 0,
    }


def unpack_macros(
    dtype: torch.dtype,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    planes: Sequence[int],
    read_bits: int,
    k: int,
    whole: bool,
) -> dict[str, object]:
    """What `unpack` is compiled for; `whole` as for `pack_macros`."""
    group = group_length(k, scheme.group_size)
    whole = whole and k % UNIT == 0 and (group % UNIT == 0 or group == k)
    units = group // UNIT
    in_order = whole and k % group == 0 and units & (units - 1) == 0
    bytes_ = list(planes) == BYTE_CODES
    return {
        **scheme_macros(scheme, rounding.preserve_variance),
        **plane_macros(planes),
        **draw_macros(rounding, whole),
        "X": DTYPES[dtype],
        "READ": plane_kernels.planes_read(planes, 8 if bytes_ else read_bits),
        "REST": scheme.bits - read_bits,
        "ALIGNED": whole,
        "GROUP": units if in_order else 0,
        "UNITS": UNPACK_UNITS if whole else 1,
        "THREADS": THREADS,
    }


def group_length(k: int, group_size: int) -> int:
    """Elements of the longest group of a row."""
    return max(1, min(group_size or k, k))


# Values that are refused ----------------------------------------------------------------------------------

_STATUS = threading.local()


def _status(device: int) -> Tensor:
    """Where kernels of this thread report the first index they refuse: of an element, of a group's scale.

    A thread waits for each kernel that reports, so one place for all of them is enough.
    """
    places: dict[int, Tensor] = _STATUS.__dict__.setdefault("places", {})
    if device not in places:
        places[device] = torch.full((2,), NOTHING_REFUSED, dtype=torch.int64, device=f"cuda:{device}")
        torch.cuda.synchronize(device)  # other streams are going to write there
    return places[device]


def _raise_refused(status: Tensor, x: Tensor, scheme: SchemeArgs) -> None:
    """Waits for the kernel. Raises: ValueError for the first element or scale that it refused."""
    element, group = status.tolist()
    if element == group == NOTHING_REFUSED:
        return
    status.fill_(NOTHING_REFUSED)
    if element != NOTHING_REFUSED:
        raise refusal_of_value(element, float(x.view(-1)[element]))
    raise refusal_of_scale(group, scheme.scale_dtype)


# The operators --------------------------------------------------------------------------------------------


def pack_out(x: Tensor, *args: Any) -> None:
    """Quantize x `(..., k)` and pack the codes; fills packed, scales and zero_points."""
    scheme, rounding, (planes, nan_zero, packed, scales, zero_points) = split_args(args)
    rows, k = rows_and_k(x.shape)
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it first")
    check_rounding(scheme, rounding, k)
    check_planes(scheme, planes)
    stored = (packed, scales, zero_points)
    check_stored(stored, scheme, rounding, planes, rows, k)
    check_written(packed, torch.uint8)
    check_written(scales, scheme.scale_dtype)
    check_written(zero_points, zero_point_dtype(scheme.symmetric, rounding.preserve_variance) or torch.uint8)
    device = device_of(x, *stored)
    if x.numel() == 0:
        return
    x = x.detach().contiguous()
    group = group_length(k, scheme.group_size)
    if group % UNIT and group < k and list(planes) != BYTE_CODES:
        # Bytes of a plane hold elements of two groups: codes first, then planes.
        codes = torch.empty(rows, k, dtype=torch.uint8, device=x.device)
        _launch_pack(device, x, rows, k, scheme, rounding, BYTE_CODES, nan_zero, (codes, scales, zero_points))
        plane_kernels.pack_codes_out(codes, planes, packed)
    else:
        _launch_pack(device, x, rows, k, scheme, rounding, planes, nan_zero, stored)


def _launch_pack(
    device: int,
    x: Tensor,
    rows: int,
    k: int,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    planes: Sequence[int],
    nan_zero: bool,
    stored: Sequence[Tensor],
) -> None:
    macros = pack_macros(x.dtype, scheme, rounding, planes, nan_zero, k, aligned(x, stored[0]))
    per_row = groups_per_row(k, scheme.group_size)
    groups = rows * per_row
    check_count(max(groups, k), "groups or elements of a row")
    blocks = -(-(scheme.group_size or k) // (64 if rounding.mode == "systematic" else 8))
    capturing = torch.cuda.is_current_stream_capturing()
    status = None if capturing else _status(device)
    size = group_length(k, scheme.group_size)
    arguments = (
        x.data_ptr(),
        *(part.data_ptr() for part in stored),
        0 if status is None else status.data_ptr(),
        *(rows, k, size, per_row, groups, rounding.offset),
        *table_words(scheme.table),
        np.float32(LLOYD_MAX.get(scheme.bits, 0.0) / 127),
        *source_words(rounding),
        variance_units(rounding),
        rounding.offset // k * per_row * blocks,
        blocks,
    )
    teams = int(macros["THREADS"]) // int(macros["TEAM"])  # type: ignore[call-overload]
    grid = -(-groups // teams)
    pack_kernel(tuple(macros.items()))(device, (grid,), (macros["THREADS"],), arguments)  # type: ignore[arg-type]
    if status is not None:
        _raise_refused(status, x, scheme)


def unpack_out(packed: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> None:
    """Dequantize the top read_bits bits into out `(..., k)`, rounded to its dtype."""
    scheme, rounding, (planes, read_bits, out) = split_args(args)
    rows, k = rows_and_k(out.shape)
    check_readable(scheme, rounding, planes, read_bits)
    stored = (packed, scales, zero_points)
    read = plane_kernels.planes_read(planes, 8 if list(planes) == BYTE_CODES else read_bits)
    check_holds(packed, planes[:read], rows, k)
    check_groups(scales, zero_points, scheme, rounding, rows, k)
    if out.dtype not in DTYPES:
        raise TypeError(f"out must be float32, bfloat16, float16 or float64, got {out.dtype}")
    check_written(out, out.dtype)
    device = device_of(out, *stored)
    if out.numel() == 0:
        return
    packed, scales, zero_points = (part.detach().contiguous() for part in stored)
    macros = unpack_macros(out.dtype, scheme, rounding, planes, read_bits, k, aligned(packed, out))
    per_block = THREADS * int(macros["UNITS"])  # type: ignore[call-overload]
    units_per_row = -(-k // UNIT)
    units = rows * units_per_row
    check_count(max(units, k), "units of eight elements or elements of a row")
    arguments = (
        *(part.data_ptr() for part in (packed, scales, zero_points)),
        out.data_ptr(),
        *(rows, k, group_length(k, scheme.group_size), groups_per_row(k, scheme.group_size)),
        *(units_per_row, units, rounding.offset),
        *table_words(scheme.table),
        *source_words(rounding),
    )
    grid = -(-units // per_block)
    unpack_kernel(tuple(macros.items()))(device, (grid,), (THREADS,), arguments)


# Checks ---------------------------------------------------------------------------------------------------


def check_planes(scheme: SchemeArgs, planes: Sequence[int]) -> None:
    """Refuses widths that do not store codes of the scheme."""
    if list(planes) != BYTE_CODES and sum(planes) != scheme.bits:
        raise ValueError(f"planes {list(planes)} do not store {scheme.bits} bits")


def check_readable(scheme: SchemeArgs, rounding: RoundingArgs, planes: Sequence[int], read_bits: int) -> None:
    """Refuses a prefix of what has none."""
    whole = scheme.table or rounding.mode == "subtractive" or list(planes) == BYTE_CODES
    if whole and read_bits != scheme.bits:
        raise ValueError(
            f"level tables, subtractive dither and unpacked codes are read with all their bits, got "
            f"read_bits={read_bits}; use {scheme.bits}"
        )


def check_stored(
    stored: Sequence[Tensor],
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    planes: Sequence[int],
    rows: int,
    k: int,
) -> None:
    """Refuses memory of other lengths than the shape implies."""
    packed, scales, zero_points = stored
    check_length("packed", packed, packed_nbytes(rows, k, planes), rows, k)
    check_groups(scales, zero_points, scheme, rounding, rows, k)


def check_groups(
    scales: Tensor, zero_points: Tensor, scheme: SchemeArgs, rounding: RoundingArgs, rows: int, k: int
) -> None:
    """Refuses scales and zero points of other lengths or dtypes than the scheme implies."""
    groups = rows * groups_per_row(k, scheme.group_size)
    check_length("scales", scales, groups, rows, k)
    if scales.dtype != scheme.scale_dtype:
        raise TypeError(f"scales must be {scheme.scale_dtype}, got {scales.dtype}")
    dtype = zero_point_dtype(scheme.symmetric, rounding.preserve_variance)
    check_length("zero_points", zero_points, 0 if dtype is None else groups, rows, k)
    if dtype is not None and zero_points.dtype != dtype:
        raise TypeError(f"zero_points must be {dtype}, got {zero_points.dtype}")
