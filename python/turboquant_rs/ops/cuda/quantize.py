"""Tensors to scales and packed codes, and back: `cuda/quantize.cu` and `cuda/dequantize.cu`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turboquant_rs.ops import reference
from turboquant_rs.ops.cuda import planes as plane_kernels
from turboquant_rs.ops.cuda.launcher import Call, Kernel, captured, wait
from turboquant_rs.ops.cuda.macros import (
    DTYPES,
    FULL_VARIANCE,
    MODES,
    aligned,
    check_count,
    check_dtype,
    check_length,
    check_written,
    device_of,
    plane_macros,
    scheme_macros,
    table_words,
    variance_units,
)
from turboquant_rs.ops.cuda.memory import new_on
from turboquant_rs.ops.reference import check_rounding, refusal_of_scale, refusal_of_value
from turboquant_rs.ops.schema import (
    BYTE_CODES,
    RoundingArgs,
    SchemeArgs,
    groups_per_row,
    packed_nbytes,
    rows_and_k,
)
from turboquant_rs.scheme import zero_point_dtype

UNIT = 8
"""Elements that fill whole bytes of every plane."""

WARP, THREADS, MOST_THREADS = 32, 256, 1024

HELD, HELD_DRAWN = 4, 8
"""Units that a thread holds in registers, at most, and of 16-bit floats whose rounding is drawn."""

UNPACK_UNITS = 2
"""Units that a thread decodes: the fastest of 1, 2, 4 and 8 on a Hopper GPU."""

NEAREST = ("nearest", 0, 0, 0, 16, 1.0, False, 0)
"""ROUNDING where scales are given."""

TILE = 128
"""Elements of the longest tile of random bits."""

NOTHING_REFUSED = [2**63 - 1] * 3
"""Of elements, scales and zero points."""


class Team(NamedTuple):
    """The threads that share a group, the units each of them holds, the threads of a block."""

    size: int
    units: int
    threads: int
    long: bool

    @classmethod
    def of(cls, group: int, held: int) -> Team:
        """For groups of that many elements, `held` units a thread: part of a warp, a warp, a block, or one
        that reads again.

        The fewer threads share a group, the less often what is done once a group is done; but two side by
        side read the 32 bytes that memory gives at a time.
        """
        units = -(-group // UNIT)
        size = max(power_of_2(-(-units // held)), min(units, 2))
        if size <= WARP:
            return cls(size, -(-units // size), THREADS * HELD // held, False)
        if size <= MOST_THREADS:
            return cls(size, -(-units // size), size, False)
        return cls(MOST_THREADS, 1, MOST_THREADS, True)


def power_of_2(count: int) -> int:
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


def team_for(dtype: torch.dtype, rounding: RoundingArgs, k: int, group_size: int) -> Team:
    """The team of an encoder."""
    drawn = rounding.mode != "nearest" and not rounding.preserve_variance and dtype.itemsize == 2
    return Team.of(group_length(k, group_size), HELD_DRAWN if drawn else HELD)


def team_macros(team: Team, dtype: torch.dtype, k: int, group_size: int, whole: bool) -> dict[str, object]:
    """What `groups.cuh` asks for; `whole`: all memory lies on multiples of the widest access."""
    group = group_length(k, group_size)
    exact = k % group == 0
    whole = whole and k % UNIT == 0 and (group % UNIT == 0 or group == k)
    return {
        "X": DTYPES[dtype],
        "EXACT": exact,
        "ALIGNED": whole,
        "FULL": whole and _fills(team, group, k),
        "TEAM": team.size,
        "VECTORS": team.units,
        "LONG": team.long,
        "THREADS": team.threads,
        "DRAWN": WARP * team.units if team.size < WARP else WARP,
    }


def _fills(team: Team, group: int, k: int) -> bool:
    """Whether every group is as long as its team can hold."""
    return k % group == 0 and not team.long and group == team.size * team.units * UNIT


def in_order(team: Team, k: int, group_size: int) -> bool:
    """Whether the units that a warp draws for are consecutive, and begin a tile where the tensor does."""
    group = group_length(k, group_size)
    return _fills(team, group, k) if team.size < WARP else k % TILE == 0 and group % TILE == 0


def encoder_macros(
    dtype: torch.dtype,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    k: int,
    whole: bool,
    *,
    nan_zero: bool = False,
    given: bool = False,
    tensors: int = 1,
) -> dict[str, object]:
    """What `encoder.cuh` asks for; `whole` as for `team_macros`; `tensors` like x that a thread holds."""
    team = team_for(dtype, rounding, k, scheme.group_size)
    return {
        **scheme_macros(scheme, rounding.preserve_variance),
        **team_macros(team, dtype, k, scheme.group_size, whole),
        **draw_macros(rounding, in_order(team, k, scheme.group_size)),
        "NAN_ZERO": nan_zero,
        "GIVEN": given,
        "BLOCKS": _resident(scheme, rounding, team, tensors * dtype.itemsize),
        "PRESERVE": rounding.preserve_variance,
    }


def _resident(scheme: SchemeArgs, rounding: RoundingArgs, team: Team, element_bytes: int) -> int:
    """Blocks a multiprocessor for which registers are kept free: the fastest of several on a Hopper GPU."""
    if team.threads > THREADS:
        return 1
    if team.threads < THREADS:
        return 6
    passes = scheme.scale != "extreme" or rounding.preserve_variance
    if passes or element_bytes > 4:
        return 2
    return 5 if element_bytes == 2 else 4


def draw_macros(rounding: RoundingArgs, ordered: bool) -> dict[str, object]:
    """MODE to TILED; `ordered` as `in_order` says."""
    return {
        "MODE": MODES[rounding.mode],
        "DRAW_BITS": rounding.draw_bits,
        "SHRINK": variance_units(rounding) != FULL_VARIANCE,
        "TILED": rounding.mode not in ("nearest", "systematic") and ordered and rounding.offset % TILE == 0,
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
    """What `unpack` is compiled for; `whole` as for `team_macros`."""
    group = group_length(k, scheme.group_size)
    whole = whole and k % UNIT == 0 and (group % UNIT == 0 or group == k)
    units = group // UNIT
    unbroken = whole and k % group == 0 and units & (units - 1) == 0
    bytes_ = list(planes) == BYTE_CODES
    return {
        **scheme_macros(scheme, rounding.preserve_variance),
        **plane_macros(planes),
        **draw_macros(rounding, whole),
        "DRAWN": WARP,
        "X": DTYPES[dtype],
        "READ": plane_kernels.planes_read(planes, 8 if bytes_ else read_bits),
        "REST": scheme.bits - read_bits,
        "ALIGNED": whole,
        "GROUP": units if unbroken else 0,
        "UNITS": UNPACK_UNITS if whole else 1,
        "THREADS": THREADS,
    }


def group_length(k: int, group_size: int) -> int:
    """Elements of the longest group of a row."""
    return max(1, min(group_size or k, k))


# Values that are refused ----------------------------------------------------------------------------------


class Report:
    """Where kernels report the first element, scale and zero point that they refuse.

    In the host's memory, so that looking costs no more than waiting for the kernel.
    """

    def __init__(self) -> None:
        self._status = torch.full((len(NOTHING_REFUSED),), NOTHING_REFUSED[0], pin_memory=True)
        self._numbers = self._status.numpy()
        self.address = self._status.data_ptr()

    def wait(self, device: int) -> list[int] | None:
        """Waits for the kernel. Returns what it has refused, None for nothing."""
        wait(device)
        numbers: list[int] = self._numbers.tolist()
        if numbers == NOTHING_REFUSED:
            return None
        self._numbers.fill(NOTHING_REFUSED[0])  # not the tensor, which may be one of inference mode
        return numbers


_THREAD = threading.local()


def report() -> Report | None:
    """That of this thread, which waits for each kernel that reports; None while a graph is captured, where
    nobody can look."""
    if captured():
        return None
    own: Report | None = getattr(_THREAD, "report", None)
    if own is None:
        own = _THREAD.report = Report()
    return own


def raise_refused(own: Report | None, device: int, specification: Callable[..., None], *args: Any) -> None:
    """Waits for the kernel. What it has refused, the specification of the operator, with the same arguments,
    refuses in words."""
    if own is not None and own.wait(device) is not None:
        specification(*args)
        raise AssertionError(f"a CUDA kernel refused what {specification.__name__} takes")


# Plans ----------------------------------------------------------------------------------------------------
# What a call needs besides its pointers and its random bits is worked out once.


class Memory(NamedTuple):
    """What the memory of a packed tensor has to be."""

    rows: int
    k: int
    packed: int
    groups: int
    scale_dtype: torch.dtype
    zero_points: int
    zero_point_dtype: torch.dtype

    @classmethod
    def of(
        cls, scheme: SchemeArgs, rounding: RoundingArgs, planes: Sequence[int], rows: int, k: int
    ) -> Memory:
        groups = rows * groups_per_row(k, scheme.group_size)
        dtype = zero_point_dtype(scheme.symmetric, rounding.preserve_variance)
        zero_points = 0 if dtype is None else groups
        bytes_ = packed_nbytes(rows, k, planes)
        return cls(rows, k, bytes_, groups, scheme.scale_dtype, zero_points, dtype or torch.uint8)

    def check_read(self, packed: Tensor, scales: Tensor, zero_points: Tensor) -> None:
        """Refuses a weight that ends before what is read of it does; planes behind that are left alone."""
        if packed.numel() < self.packed:
            check_length("packed", packed, self.packed, self.rows, self.k)
        self.check_groups(scales, zero_points)

    def check_groups(self, scales: Tensor, zero_points: Tensor) -> None:
        """Refuses scales and zero points of other lengths or dtypes."""
        check_length("scales", scales, self.groups, self.rows, self.k)
        check_length("zero_points", zero_points, self.zero_points, self.rows, self.k)
        check_dtype("scales", scales, self.scale_dtype)
        check_dtype("zero_points", zero_points, self.zero_point_dtype)


@dataclass(frozen=True)
class Launch:
    """A kernel, its geometry, and its arguments between pointers and random source, and behind that."""

    kernel: Kernel
    grid: tuple[int]
    block: tuple[int]
    shape: tuple[int, ...]
    tail: tuple[int, ...]
    _calls: dict[int, Call] = field(default_factory=dict)

    def __call__(self, device: int, pointers: tuple[int, ...], source: Sequence[int]) -> None:
        """Launches it; `source` is seed, step and stream."""
        call = self._calls.get(device)
        if call is None:
            call = self._calls[device] = Call(self.kernel, device, self.grid, self.block)
        call(*pointers, *self.shape, *source, *self.tail)


def shape_words(rows: int, k: int, group_size: int, offset: int) -> tuple[int, ...]:
    """`Shape` of groups.cuh. Raises: ValueError for more groups than are numbered."""
    per_row = groups_per_row(k, group_size)
    check_count(max(rows * per_row, k), "groups or elements of a row")
    return rows, k, group_length(k, group_size), per_row, rows * per_row, offset


def team_grid(team: Team, rows: int, k: int, group_size: int) -> tuple[tuple[int], tuple[int]]:
    """Blocks and threads for a team a group."""
    return (-(-rows * groups_per_row(k, group_size) // (team.threads // team.size)),), (team.threads,)


def encoder_launch(
    kernel: Kernel, dtype: torch.dtype, scheme: SchemeArgs, rounding: RoundingArgs, rows: int, k: int
) -> Launch:
    """A kernel whose last parameter is the `Encoding` of encoder.cuh."""
    blocks = -(-(scheme.group_size or k) // (64 if rounding.mode == "systematic" else 8))
    first_group = rounding.offset // k * groups_per_row(k, scheme.group_size)
    return Launch(
        kernel,
        *team_grid(team_for(dtype, rounding, k, scheme.group_size), rows, k, scheme.group_size),
        (*shape_words(rows, k, scheme.group_size, rounding.offset), *table_words(scheme.table)),
        (variance_units(rounding), first_group * blocks, blocks),
    )


class Plan(NamedTuple):
    """How a tensor is packed, or unpacked."""

    memory: Memory
    launch: Launch | None
    """None where there is nothing to do."""
    codes_first: bool = False
    """Whether bytes of a plane hold elements of two groups, so that codes are written before planes are."""


def named(key: Sequence[Any]) -> tuple[SchemeArgs, RoundingArgs]:
    """The scheme and rounding of a plan, which depends on no seed, step or stream."""
    rounding, draw_bits, variance, preserve_variance, offset = key[7:12]
    return SchemeArgs(*key[:7]), RoundingArgs(
        rounding, 0, 0, 0, draw_bits, variance, preserve_variance, offset
    )


def plan_key(args: Sequence[Any]) -> tuple[Any, ...]:
    """SCHEME and ROUNDING without seed, step and stream, to look a plan up by."""
    return (*args[:4], tuple(args[4]), *args[5:8], *args[11:15])


@lru_cache(maxsize=4096)
def pack_plan(
    dtype: torch.dtype,
    planes: tuple[int, ...],
    nan_zero: bool,
    given: bool,
    rows: int,
    k: int,
    whole: bool,
    *key: Any,
) -> Plan:
    """How x `(rows, k)` is packed, on `given` scales or its own; `whole` as for `team_macros`."""
    scheme, rounding = named(key)
    check_source(dtype)
    check_rounding(scheme, rounding, k)
    check_planes(scheme, planes)
    memory = Memory.of(scheme, rounding, planes, rows, k)
    if rows * k == 0:
        return Plan(memory, None)
    size = group_length(k, scheme.group_size)
    codes_first = size % UNIT != 0 and size < k and planes != (8,)
    macros = encoder_macros(dtype, scheme, rounding, k, whole, nan_zero=nan_zero, given=given)
    kernel = pack_kernel((*macros.items(), *plane_macros((8,) if codes_first else planes).items()))
    return Plan(memory, encoder_launch(kernel, dtype, scheme, rounding, rows, k), codes_first)


@lru_cache(maxsize=4096)
def unpack_plan(
    dtype: torch.dtype, planes: tuple[int, ...], read_bits: int, rows: int, k: int, whole: bool, *key: Any
) -> Plan:
    """How a tensor `(rows, k)` of a dtype is unpacked; `whole` as for `pack_plan`."""
    scheme, rounding = named(key)
    check_readable(scheme, rounding, planes, read_bits)
    if dtype not in DTYPES:
        raise TypeError(f"out must be float32, bfloat16, float16 or float64, got {dtype}")
    read = plane_kernels.planes_read(planes, plane_kernels.bits_read(planes, read_bits))
    memory = Memory.of(scheme, rounding, planes[:read], rows, k)
    if rows * k == 0:
        return Plan(memory, None)
    units_per_row = -(-k // UNIT)
    units = rows * units_per_row
    check_count(max(units, k), "units of eight elements or elements of a row")
    macros = unpack_macros(dtype, scheme, rounding, planes, read_bits, k, whole)
    size, per_row = group_length(k, scheme.group_size), groups_per_row(k, scheme.group_size)
    launch = Launch(
        unpack_kernel(tuple(macros.items())),
        (-(-units // (THREADS * (UNPACK_UNITS if macros["ALIGNED"] else 1))),),
        (THREADS,),
        (rows, k, size, per_row, units_per_row, units, rounding.offset, *table_words(scheme.table)),
        (),
    )
    return Plan(memory, launch)


# The operators --------------------------------------------------------------------------------------------


def pack_out(x: Tensor, *args: Any) -> None:
    """Quantize x `(..., k)` and pack the codes; fills packed, scales and zero_points."""
    planes, nan_zero, packed, scales, zero_points = args[15:]
    x = x.contiguous()
    check_written(scales, zero_points)
    own = report()
    _pack(x, args[:15], planes, nan_zero, False, packed, scales, zero_points, own)
    refused = None if own is None else own.wait(x.get_device())
    if refused is None:
        return
    element, group, _ = refused
    if element != NOTHING_REFUSED[0]:
        raise refusal_of_value(element, float(x.view(-1)[element]))
    raise refusal_of_scale(group, args[6])


def pack(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`pack_out` into memory of its own."""
    rows, k = rows_and_k(x.shape)
    groups, zeros = (*x.shape[:-1], groups_per_row(k, args[1])), zero_point_dtype(args[2], args[13])
    outputs = (
        new_on(x, (packed_nbytes(rows, k, args[15]),), torch.uint8),
        new_on(x, groups, args[6]),
        new_on(x, (0,) if zeros is None else groups, zeros or torch.uint8),
    )
    pack_out(x, *args, *outputs)
    return outputs


def encode_out(x: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> None:
    """Pack the codes of x `(..., k)` on given scales and zero points; fills packed."""
    planes, packed = args[7:]
    own = report()
    if own is None:
        raise RuntimeError("encode has no way to tell of values that it refuses in a CUDA graph; use pack")
    given = scales.contiguous(), zero_points.contiguous()
    _pack(x.contiguous(), (*args[:7], *NEAREST), planes, False, True, packed, *given, own)
    raise_refused(own, x.get_device(), reference.encode_out, x, scales, zero_points, *args)


def _pack(
    x: Tensor,
    args: Sequence[Any],
    planes: Sequence[int],
    nan_zero: bool,
    given: bool,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    own: Report | None,
) -> None:
    """Launches what packs x, on `given` scales or filling them; args: SCHEME and ROUNDING."""
    rows, k = rows_and_k(x.shape)
    whole = aligned(x, packed)
    plan = pack_plan(x.dtype, tuple(planes), nan_zero, given, rows, k, whole, *plan_key(args))
    check_length("packed", packed, plan.memory.packed, rows, k)
    plan.memory.check_groups(scales, zero_points)
    check_written(packed)
    check_dtype("packed", packed, torch.uint8)
    device = device_of(x, packed, scales, zero_points)
    if plan.launch is None:
        return
    codes = torch.empty(rows, k, dtype=torch.uint8, device=x.device) if plan.codes_first else packed
    pointers = (x.data_ptr(), codes.data_ptr(), scales.data_ptr(), zero_points.data_ptr())
    plan.launch(device, (*pointers, own.address if own else 0), args[8:11])
    if plan.codes_first:
        plane_kernels.pack_codes_out(codes, planes, packed)


def unpack_out(packed: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> None:
    """Dequantize the top read_bits bits into out `(..., k)`, rounded to its dtype."""
    planes, read_bits, out = args[15:]
    rows, k = rows_and_k(out.shape)
    packed, scales, zero_points = packed.contiguous(), scales.contiguous(), zero_points.contiguous()
    whole = aligned(packed, out)
    plan = unpack_plan(out.dtype, tuple(planes), read_bits, rows, k, whole, *plan_key(args))
    plan.memory.check_read(packed, scales, zero_points)
    check_written(out)
    device = device_of(out, packed, scales, zero_points)
    if plan.launch is not None:
        pointers = (packed.data_ptr(), scales.data_ptr(), zero_points.data_ptr(), out.data_ptr())
        plan.launch(device, pointers, args[8:11])


# Checks ---------------------------------------------------------------------------------------------------


def check_source(dtype: torch.dtype) -> None:
    """Refuses tensors that are not floats."""
    if dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {dtype}; convert it first")


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
