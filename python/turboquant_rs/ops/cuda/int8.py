"""Products of int8 activations with packed matrices: `cuda/matmul_int8_*.cu`, and how each is launched.

    x ── quantize ──► codes, scales, sums ─┬─ block   mma.sync, bytes or nibbles of W, any number of rows of x
    W ── expand ──► bytes ─────────────────┼─ groups  wgmma on Hopper, bytes or nibbles, a scale a group
                                           └─ wide    wgmma on Hopper, bytes, a scale a row, many rows of x

A plane of 8 or of 4 bits is read as it lies; other weights are expanded to bytes first, a code or the level
of a table each. Sums are of integers and the few roundings are those of the contract in its order, so results
are the bits of every other backend, whatever the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, is_grad_enabled
from torch.nn import Parameter

from turboquant_rs.ops import reference
from turboquant_rs.ops.cuda.launcher import KEPT_ROWS, Call, Kernel, ready
from turboquant_rs.ops.cuda.limits import Limits, limits_of
from turboquant_rs.ops.cuda.macros import (
    ALIGNMENT,
    DTYPES,
    aligned,
    as_bias,
    check_count,
    device_of,
    plane_macros,
    scheme_macros,
    table_words,
)
from turboquant_rs.ops.cuda.memory import new, new_bytes, row_major
from turboquant_rs.ops.cuda.planes import bits_read, planes_read
from turboquant_rs.ops.cuda.quantize import (
    THREADS,
    UNIT,
    WARP,
    Memory,
    Team,
    check_planes,
    check_readable,
    group_length,
    power_of_2,
)
from turboquant_rs.ops.cuda.tensor_map import tensor_map
from turboquant_rs.ops.direct import observed
from turboquant_rs.ops.schema import RoundingArgs, SchemeArgs, groups_per_row, split_args

__all__ = ["Product", "Weight", "multiply", "takes"]

STEP = 32
"""Columns that one instruction multiplies; groups begin at multiples of it."""

SEGMENT = reference.SEGMENT
"""Columns whose bracket is an integer of 32 bits."""

SLICE = 128
"""Columns of a warp in a stage of `block`, and of a stage of `wide`."""

WIDE_ROWS = 128
"""Rows of x of a tile of `wide`."""

GROUPS_ROWS = 128
"""Rows of W of a tile of `groups`."""

MOST_ROWS = 65535 * 128
"""Rows of x that the grid of `block` has blocks for; more of them are multiplied in parts."""

HOPPER_SHARED = 227 * 1024
"""Bytes of shared memory that a block may have there."""

WIDE_THREADS = 384
"""A warp group that copies and two that multiply."""

TERMS_ALIGNMENT = 128
"""Bytes to a multiple of which scales of x begin behind its codes."""

EXPANDED = 4
"""Units of eight codes that a thread expands."""


# What there is to multiply --------------------------------------------------------------------------------


class Weight(NamedTuple):
    """A packed matrix, as far as kernels are compiled for it: macros of `matmul_int8.cuh`."""

    scale: int
    asymmetric: bool
    zero: int
    rest: int
    small: bool
    signed: bool

    @classmethod
    def of(cls, scheme: SchemeArgs, read_bits: int, columns: Columns) -> Weight:
        """The weight of a scheme, read at `read_bits`."""
        zero = int(2 * reference.fixed_zero_point(scheme)) if scheme.symmetric else 0
        rest = scheme.bits - read_bits
        top = 255 if scheme.table else 2**scheme.bits - 1
        halves = 2 if rest or zero % 2 else 1
        small = halves * top * 127 * columns.segment <= 2**22
        return cls(DTYPES[scheme.scale_dtype], not scheme.symmetric, zero, rest, small, signed=False)

    @property
    def subtracted(self) -> int:
        """The zero point, if signed bytes can hold codes without it; else 0."""
        whole = not self.asymmetric and self.rest == 0 and self.zero % 2 == 0
        return self.zero // 2 if whole and self.zero <= 256 else 0

    def loses_zero(self, nibbles: bool, expands: bool) -> bool:
        """Whether `groups` multiplies k − z: bytes that are expanded without z, or codes that lose it on the
        way, nibbles any that is whole, bytes that of the middle.
        """
        if nibbles:
            return self.rest == 0 and (self.asymmetric or self.subtracted > 0)
        return self.subtracted > 0 if expands else self.subtracted == 128

    def multiplied(self, nibbles: bool, expands: bool) -> tuple[Weight, int, int]:
        """What `groups` multiplies, and what codes lose as they are expanded, or on their way."""
        if not self.loses_zero(nibbles, expands):
            return self, 0, 0
        return self.without_zero(), self.subtracted * expands, self.subtracted * (not expands)

    def without_zero(self) -> Weight:
        """This weight as bytes from which the zero point has been subtracted: their brackets are converted by
        one instruction."""
        return self._replace(zero=0, small=False, signed=True)

    def macros(self, dtype: torch.dtype) -> dict[str, object]:
        """With the dtype of the result."""
        return {"Y": DTYPES[dtype], **{key.upper(): value for key, value in self._asdict().items()}}


class Columns(NamedTuple):
    """Where the columns of x lie in its codes: groups begin at multiples of STEP, zeros fill the gaps."""

    k: int
    size: int  # of a group
    groups: int
    padded: int  # columns from one group to the next
    stride: int  # columns of a row
    segment: int  # columns of a bracket
    segments: int

    @classmethod
    def of(cls, k: int, group_size: int) -> Columns:
        """The columns of rows of k elements, k > 0."""
        size, groups = group_length(k, group_size), groups_per_row(k, group_size)
        padded = -(-size // STEP) * STEP
        last = k - (groups - 1) * size
        stride = (groups - 1) * padded + -(-last // STEP) * STEP
        segment = min(padded, SEGMENT)
        return cls(k, size, groups, padded, stride, segment, groups * -(-padded // segment))

    @property
    def grouped(self) -> bool:
        """Whether there is more than one bracket."""
        return self.segments > 1

    @property
    def bracket_steps(self) -> int:
        """Steps of a bracket, 0 where there is only one."""
        return self.segment // STEP if self.grouped else 0

    @property
    def dense(self) -> bool:
        """Whether there are no gaps but at the end of a row."""
        return self.groups == 1 or self.padded == self.size


def takes(x: Tensor, scheme: SchemeArgs, rounding: RoundingArgs) -> bool:
    """Whether a product of x with such a weight has a kernel here."""
    if x.dtype not in DTYPES or x.numel() == 0 or not limits_of(x.get_device()).tensor_cores:
        return False
    return fits(x.shape[-1], scheme, rounding)


def fits(k: int, scheme: SchemeArgs, rounding: RoundingArgs) -> bool:
    """Whether the kernels read a weight of k columns."""
    if rounding.preserve_variance or rounding.mode == "subtractive":
        return False
    columns = Columns.of(k, scheme.group_size)
    return columns.groups == 1 or columns.padded <= SEGMENT or columns.size % SEGMENT == 0


def multiply(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    bias: Tensor | None,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    planes: Sequence[int],
    read_bits: int,
    out: Tensor,
) -> None:
    """x (m, k) · Wᵀ (+ bias) into out (m, n), both contiguous, for which `takes` holds; W is canonical.

    Raises: ValueError and TypeError for scales, zero points and codes of another length or dtype than W has.
    """
    (m, k), n = x.shape, out.shape[1]
    if m > MOST_ROWS:
        for rows, results in zip(torch.split(x, MOST_ROWS), torch.split(out, MOST_ROWS), strict=True):
            multiply(rows, packed, scales, zero_points, bias, scheme, rounding, planes, read_bits, results)
        return
    device = device_of(x, packed, scales, out)
    scheme = scheme._replace(table=tuple(scheme.table))
    planes = tuple(planes)
    whole = aligned(packed), aligned(x)
    plan = plan_of(scheme, rounding, planes, read_bits, m, n, k, x.dtype, *whole, device)
    plan.memory.check_read(packed, scales, zero_points)
    packed, scales, zero_points = packed.contiguous(), scales.contiguous(), zero_points.contiguous()
    bias, *term = as_bias(bias, x.dtype)
    tail = (scales.data_ptr(), zero_points.data_ptr(), *term, out.data_ptr(), m, n)
    _run(plan, scheme, planes, x.data_ptr(), packed, tail, device)


class Product:
    """x · Wᵀ (+ bias) past the dispatcher, which takes longer than the GPU for few rows of x.

    What a call has to work out of a scheme and sizes is worked out once; the weight comes with each call.
    """

    def __init__(self, n: int, k: int, *args: Any) -> None:
        """Of canonical weights (n, k); `args` are those that follow the bias in the operator's arguments."""
        scheme, self._rounding, (planes, self._read_bits, *_) = split_args(args)
        self._scheme, self._planes = scheme._replace(table=tuple(scheme.table)), tuple(planes)
        self._n, self._k = n, k
        bits = bits_read(planes, self._read_bits)
        self._memory = memory_of(scheme, self._rounding, self._planes, bits, n, k)
        self._fits = n > 0 and k > 0 and fits(k, scheme, self._rounding)
        self._plans: dict[tuple[torch.dtype, torch.Size, int, bool], Prepared] = {}
        self._known: Known | None = None

    def __call__(
        self, x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """What the operator returns, bit for bit; None where it must be asked.

        That is where somebody would see the call (a gradient, a transform, a mode, a trace, a profiler), and
        where operands are not on one GPU as the kernels take them. What has been asked of a weight and a bias
        is not asked again while they are the same tensors on the same memory.
        """
        if type(x) is not Tensor or observed():
            return None
        try:
            address, zeros = x.data_ptr(), 0 if zero_points is None else zero_points.data_ptr()
            addresses = (packed.data_ptr(), scales.data_ptr(), zeros, 0 if bias is None else bias.data_ptr())
        except RuntimeError:  # sparse: in no memory of its own
            return None
        if not address or not x.is_contiguous() or x.is_neg():
            return None
        tensors = (packed, scales, zero_points, bias)
        known, device, dtype, shape = self._known, x.get_device(), x.dtype, x.shape
        if known is None or known.addresses != addresses or not known.are(tensors):
            known = self._known = self._checked(tensors, addresses)
        if known is None or known.device != device:
            return None
        if is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, *tensors)):
            return None
        key = (dtype, shape, device, address % ALIGNMENT == 0)
        prepared = self._plans.get(key) or self._prepared(*key)
        if prepared is None:
            return None
        plan, m, sizes, strides = prepared
        out: Tensor = new(sizes, strides, dtype) if ready(device) else x.new_empty(sizes)
        _, scaling, zeros, bias_address = addresses
        wide = 0
        if bias is not None and bias.dtype is not dtype:
            bias, bias_address, wide = as_bias(bias, dtype)
        tail = (scaling, zeros, bias_address, wide, out.data_ptr(), m, self._n)
        _run(plan, self._scheme, self._planes, address, packed, tail, device)
        return out

    def _checked(self, tensors: Operands, addresses: tuple[int, ...]) -> Known | None:
        """A weight and a bias as they are, if the kernels take them so."""
        memory, (packed, scales, zero_points, bias) = self._memory, tensors
        device = packed.get_device()
        for tensor in tensors:
            if tensor is None:
                continue
            if type(tensor) not in (Tensor, Parameter) or tensor.get_device() != device:
                return None
            if not tensor.is_contiguous() or tensor.is_neg() or tensor._is_zerotensor():
                return None
        if bias is not None and (bias.shape != (self._n,) or bias.dtype not in DTYPES):
            return None
        if packed.dtype is not torch.uint8 or packed.numel() < memory.packed or not aligned(packed):
            return None
        if scales.dtype is not memory.scale_dtype or scales.numel() != memory.groups:
            return None
        if memory.zero_points != (0 if zero_points is None else zero_points.numel()):
            return None
        if zero_points is not None and zero_points.dtype is not memory.zero_point_dtype:
            return None
        return Known(device, addresses, tuple(_nothing if part is None else ref(part) for part in tensors))

    def _prepared(self, dtype: torch.dtype, shape: torch.Size, device: int, whole: bool) -> Prepared | None:
        """What there is to do for x of that shape, if there is a kernel; `whole`: on multiples of the widest
        access."""
        n, k, m = self._n, self._k, shape[:-1].numel()
        if not (self._fits and shape and shape[-1] == k and 0 < m <= MOST_ROWS and dtype in DTYPES):
            return None
        if device < 0 or not limits_of(device).tensor_cores:
            return None
        about = (self._scheme, self._rounding, self._planes, self._read_bits)
        plan, sizes = plan_of(*about, m, n, k, dtype, True, whole, device), (*shape[:-1], n)
        prepared = plan, m, sizes, row_major(sizes)
        if m <= KEPT_ROWS:
            self._plans[dtype, shape, device, whole] = prepared
        return prepared


Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""A weight and a bias: packed, scales, zero points, bias."""


class Known(NamedTuple):
    """A weight and a bias that have been looked at; they are not kept alive."""

    device: int
    addresses: tuple[int, ...]
    tensors: tuple[Callable[[], Tensor | None], ...]

    def are(self, tensors: Operands) -> bool:
        """Whether these are the same."""
        packed, scales, zero_points, bias = self.tensors
        return (
            packed() is tensors[0]
            and scales() is tensors[1]
            and zero_points() is tensors[2]
            and bias() is tensors[3]
        )


def _nothing() -> None:
    """Where there is no tensor."""


def _run(
    plan: Plan,
    scheme: SchemeArgs,
    planes: tuple[int, ...],
    x: int,
    packed: Tensor,
    tail: tuple[int, ...],
    device: int,
) -> None:
    """Launches what a plan says.

    Args:
        x: Address of rows without gaps.
        packed: Contiguous.
        tail: Addresses of scales, zero points and bias, whether that is f32; of the product; m, n.
    """
    columns, shape = plan.columns, plan.shape
    m, n = tail[-2:]
    if plan.expands:
        packed = expand(packed, scheme, planes, plan.bits, n, columns, plan.subtracted, device)

    # One piece of memory: codes, then what goes with their groups.
    memory = new_bytes(plan.workspace, device)
    codes = memory.data_ptr()
    x_scales, x_sums = codes + plan.terms, codes + plan.sums
    plan.quantize(x, codes, x_scales, x_sums, *plan.quantize_sizes)
    if isinstance(shape, Block):
        pointers = (codes, x_scales, x_sums, packed.data_ptr())
        plan.call(*pointers, *tail, columns.stride, plan.row_bytes, columns.groups, columns.segments)
        return
    if isinstance(shape, Groups):
        row = SLICE // 2 if plan.nibbles else SLICE
        maps = (
            *tensor_map(codes, m, columns.stride, shape.m_tile // shape.cluster),
            *tensor_map(packed.data_ptr(), n, plan.row_bytes, GROUPS_ROWS, columns=row),
        )
    else:
        maps = (
            *tensor_map(codes, m, columns.stride, WIDE_ROWS),
            *tensor_map(packed.data_ptr(), n, plan.row_bytes, shape.n_tile // shape.cluster),
        )
    plan.call(x_scales, x_sums, *tail, columns.stride, columns.groups, *maps)


class Plan(NamedTuple):
    """What a product needs besides its memory: worked out once."""

    columns: Columns
    shape: Block | Groups | Wide
    bits: int  # read of each code
    memory: Memory
    nibbles: bool  # whether the kernel reads two codes a byte
    expands: bool  # whether the weight becomes bytes first
    subtracted: int  # from each of them
    row_bytes: int  # of the weight as the kernel reads it
    quantize: Call  # of x
    quantize_sizes: tuple[int, ...]  # its last arguments
    terms: int  # bytes of the codes of x; scales of its groups follow
    sums: int  # where their sums follow
    workspace: int  # bytes of all of these
    call: Call


Prepared = tuple[Plan, int, tuple[int, ...], tuple[int, ...]]
"""What there is to do for x of one shape, its rows, and sizes and strides of the result."""


@lru_cache(maxsize=4096)
def plan_of(
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    planes: tuple[int, ...],
    read_bits: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    whole: bool,
    whole_x: bool,
    device: int,
) -> Plan:
    """That of x (m, k) of a dtype with W (n, k); `whole…`: they lie on multiples of the widest access."""
    check_planes(scheme, planes)
    check_readable(scheme, rounding, planes, read_bits)
    columns, limits = Columns.of(k, scheme.group_size), limits_of(device)
    bits = bits_read(planes, read_bits)
    stored = planes[0] if planes[0] == bits and not scheme.table and whole and columns.dense else 0
    weight, subtracted, zero = Weight.of(scheme, read_bits, columns), 0, 0
    halved, bytes_ = stored == 4 and k % 32 == 0, stored == 8 and k % 16 == 0
    signed = not halved and weight.loses_zero(False, not bytes_)
    shape = shape_for(m, n, columns, signed, limits)
    nibbles = halved and not isinstance(shape, Wide)
    expands = not nibbles and not bytes_
    row_bytes = columns.stride if expands else k * stored // 8
    if isinstance(shape, Block):
        shape = shape.within(limits.shared, nibbles, columns.bracket_steps, weight.asymmetric)
    elif isinstance(shape, Groups):
        weight, subtracted, zero = weight.multiplied(nibbles, expands)
    kernel = kernel_of(weight, dtype, shape, nibbles, columns.bracket_steps, zero)
    grid = shape.grid(m, n) if isinstance(shape, Block) else shape.grid(m, n, limits)
    threads = shape.threads if isinstance(shape, Block) else WIDE_THREADS
    # Blocks that come early lie where there is room: only those that fill a multiprocessor lie evenly.
    early = limits.clusters and not isinstance(shape, Wide) and 2 * kernel.shared > limits.shared
    call = Call(kernel, device, grid, (threads,), kernel.shared, early)
    memory = memory_of(scheme, rounding, planes, bits, n, k)
    quantize = _quantize_call(dtype, columns, m, whole_x, nibbles, device)
    terms = -(-m * columns.stride // TERMS_ALIGNMENT) * TERMS_ALIGNMENT
    sums = terms + 4 * m * columns.groups
    workspace = sums + 4 * m * columns.segments
    reading = (quantize, _quantize_sizes(columns, m), terms, sums, workspace)
    return Plan(columns, shape, bits, memory, nibbles, expands, subtracted, row_bytes, *reading, call)


def memory_of(
    scheme: SchemeArgs, rounding: RoundingArgs, planes: tuple[int, ...], bits: int, n: int, k: int
) -> Memory:
    """What W (n, k) has to be, of which `bits` bits of each code are read."""
    return Memory.of(scheme, rounding, planes[: planes_read(planes, bits)], n, k)


# Activations and weights as the kernels want them ---------------------------------------------------------


def team_of(columns: Columns) -> Team:
    """As many threads as there are units in a group, up to a warp; then 4 units each, in long rows 8."""
    units = columns.padded // UNIT
    if units <= 128:
        size = min(power_of_2(units), WARP)
    else:
        size = min(power_of_2(-(-units // (4 if units <= 1024 else 8))), 512)
    threads = max(size, THREADS if size <= WARP else 0)
    return Team(size, min(-(-units // size), 8), threads, units > 8 * size)


def quantize(
    x: Tensor, codes: Tensor, scales: int, sums: int, columns: Columns, nibbles: bool, device: int
) -> None:
    """The codes, scales and sums of x, for weights in bytes or in nibbles."""
    m = x.numel() // columns.k
    call = _quantize_call(x.dtype, columns, m, aligned(x), nibbles, device)
    call(x.data_ptr(), codes.data_ptr(), scales, sums, *_quantize_sizes(columns, m))


def _quantize_sizes(columns: Columns, m: int) -> tuple[int, ...]:
    """The last arguments of `_quantize_call`."""
    return m, columns.k, columns.size, columns.padded, columns.stride, columns.groups, columns.segments


@lru_cache(maxsize=4096)
def _quantize_call(
    dtype: torch.dtype, columns: Columns, m: int, whole: bool, nibbles: bool, device: int
) -> Call:
    """The launch for m rows of x; `whole`: x lies on multiples of the widest access."""
    check_count(m * columns.groups, "groups of x")
    team = team_of(columns)
    blocks = -(-m * columns.groups // (team.threads // team.size))
    return Call(quantize_kernel(dtype, columns, whole, nibbles), device, (blocks,), (team.threads,))


def quantize_kernel(dtype: torch.dtype, columns: Columns, whole: bool, nibbles: bool) -> Kernel:
    """`whole`: x lies on multiples of the widest access."""
    team = team_of(columns)
    whole = whole and columns.k % 8 == 0 and (columns.groups == 1 or columns.size % 8 == 0)
    return _quantize_kernel(dtype, team, whole, nibbles)


@cache
def _quantize_kernel(dtype: torch.dtype, team: Team, whole: bool, nibbles: bool) -> Kernel:
    macros = {"X": DTYPES[dtype], "WHOLE": whole, "NIBBLES": nibbles}
    macros |= {"TEAM": team.size, "VECTORS": team.units, "THREADS": team.threads, "LONG": team.long}
    return Kernel("matmul_int8_quantize.cu", "matmul_int8_quantize", macros)


def expand(
    packed: Tensor,
    scheme: SchemeArgs,
    planes: Sequence[int],
    bits: int,
    n: int,
    columns: Columns,
    subtracted: int,
    device: int,
) -> Tensor:
    """The top `bits` bits of each code, or its level, as rows (n, stride) of bytes; gaps are undefined.

    subtracted: from each; other than 0, the bytes are signed.
    """
    units_per_row = -(-columns.k // 8)
    units = n * units_per_row
    check_count(max(units, columns.stride), "units of eight codes or columns")
    levels = torch.empty(n, columns.stride, dtype=torch.uint8, device=packed.device)
    kernel = expand_kernel(scheme, tuple(planes), bits, columns, aligned(packed), subtracted)
    sizes = (n, columns.k, columns.size, columns.padded, columns.stride, units_per_row, units)
    arguments = (packed.data_ptr(), levels.data_ptr(), *sizes, *table_words(scheme.table))
    kernel(device, (-(-units // (EXPANDED * THREADS)),), (THREADS,), arguments)
    return levels


def expand_kernel(
    scheme: SchemeArgs,
    planes: tuple[int, ...],
    bits: int,
    columns: Columns,
    whole: bool,
    subtracted: int = 0,
) -> Kernel:
    """`whole`: the blob lies on multiples of the widest access."""
    whole = whole and columns.k % 8 == 0 and (columns.groups == 1 or columns.size % 8 == 0)
    return _expand_kernel(scheme._replace(table=tuple(scheme.table)), planes, bits, whole, subtracted)


@lru_cache(maxsize=4096)
def _expand_kernel(
    scheme: SchemeArgs, planes: tuple[int, ...], bits: int, whole: bool, subtracted: int
) -> Kernel:
    macros = {**scheme_macros(scheme, False), **plane_macros(planes), "READ": planes_read(planes, bits)}
    macros |= {"ALIGNED": whole, "SIGNED": subtracted}
    return Kernel("matmul_int8_expand.cu", "matmul_int8_expand", macros)


# Shapes ---------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """How `matmul_int8_block.cu` is shaped: macros of the same names."""

    m_tile: int
    n_tile: int
    warps_m: int
    warps_n: int
    warps_k: int
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_m * self.warps_n * self.warps_k

    def grid(self, m: int, n: int) -> tuple[int, int]:
        """The blocks that cover a product."""
        return -(-n // self.n_tile), -(-m // self.m_tile)

    def shared(self, nibbles: bool, steps: int, asymmetric: bool) -> int:
        """Bytes of shared memory: of the stages, or of the sums of warps that meet there in the end.

        steps: of a bracket, 0 where it is the row.
        """
        slots = self.warps_k * _ends(steps) if steps else 0
        terms, meeting = slots * 4 * (2 * self.m_tile + (2 if asymmetric else 1) * self.n_tile), 0
        if steps and self.warps_k > 1:
            # Lines of all slots, of scales as if they were words, of zero points.
            terms = 4 * slots * (2 * self.m_tile + self.n_tile) + 16 * self.n_tile
            terms += (-(-slots // 16) * 16 + 16) * self.n_tile if asymmetric else 0
            meeting = 4 * slots * self.m_tile * (self.n_tile + 8)
        stage = self.warps_k * SLICE * (self.m_tile + self.n_tile // (2 if nibbles else 1))
        stage += -(-terms // 128) * 128
        if steps:
            return self.stages * stage + meeting
        return max(self.stages * stage, (self.warps_k - 1) * self.m_tile * self.n_tile * 4)

    def within(self, limit: int, nibbles: bool, steps: int, asymmetric: bool) -> Block:
        """With as many of its stages as so many bytes of shared memory hold."""
        shape = self
        while shape.stages > 2 and shape.shared(nibbles, steps, asymmetric) > limit:
            shape = shape._replace(stages=shape.stages - 1)
        return shape


def _ends(steps: int) -> int:
    """Brackets of so many steps that end in a slice: a last one may be short, and end behind another."""
    slice_steps = SLICE // STEP
    if steps < slice_steps:
        return -(-slice_steps // steps)
    return 2 if steps % slice_steps else 1


class Groups(NamedTuple):
    """How `matmul_int8_groups.cu` is shaped: macros of the same names."""

    m_tile: int
    cluster: int

    def fits(self, columns: Columns) -> bool:
        """Whether brackets end where an instruction or a stage does, and belong to a group each."""
        ends = columns.padded in (STEP, 2 * STEP) or columns.padded % SLICE == 0
        return columns.grouped and ends and columns.segments == columns.groups

    def tiles(self, m: int, n: int) -> int:
        """Tiles of a cluster that cover a product."""
        return -(-m // self.m_tile) * -(-n // (GROUPS_ROWS * self.cluster))

    def grid(self, m: int, n: int, limits: Limits) -> tuple[int]:
        """As many blocks as there is room for, in whole clusters."""
        return (min(limits.processors // self.cluster, self.tiles(m, n)) * self.cluster,)

    def stage(self, nibbles: bool, steps: int, weight: Weight) -> int:
        """Bytes of shared memory of a stage and of the terms of its groups; `steps`: of a bracket."""
        slots = max(1, SLICE // STEP // steps)
        terms = GROUPS_ROWS + (GROUPS_ROWS if weight.asymmetric else 4)
        terms += self.m_tile + (4 if weight.signed else self.m_tile)
        return SLICE * (self.m_tile + GROUPS_ROWS // (2 if nibbles else 1)) + 4 * slots * terms

    def stages(self, nibbles: bool, steps: int, weight: Weight) -> int:
        """As many as there is room for."""
        return min(12, (HOPPER_SHARED - 1024 - 512) // self.stage(nibbles, steps, weight))

    def shared(self, nibbles: bool, steps: int, weight: Weight) -> int:
        """Bytes of dynamic shared memory: of the stages, and to begin at a multiple of 1024."""
        return self.stages(nibbles, steps, weight) * self.stage(nibbles, steps, weight) + 1024


class Wide(NamedTuple):
    """How `matmul_int8_wide.cu` is shaped: macros of the same names."""

    n_tile: int
    stages: int
    cluster: int

    def tiles(self, m: int, n: int) -> int:
        """Tiles of a cluster that cover a product."""
        return -(-m // (WIDE_ROWS * self.cluster)) * -(-n // self.n_tile)

    def grid(self, m: int, n: int, limits: Limits) -> tuple[int]:
        """As many blocks as there is room for, in whole clusters."""
        return (min(limits.processors // self.cluster, self.tiles(m, n)) * self.cluster,)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: of the stages, and to begin at a multiple of 1024."""
        return self.stages * SLICE * (WIDE_ROWS + self.n_tile) + 1024


def shape_for(m: int, n: int, columns: Columns, signed: bool, limits: Limits) -> Block | Groups | Wide:
    """The kernel for a product: the fastest of many on a Hopper GPU; `signed`: W is bytes without their zero
    point, whose brackets `groups` converts fastest."""
    processors = limits.processors
    if columns.grouped:
        meeting = _meeting_for(m, n, columns, limits)
        few = n <= 32 * processors and m <= (32 if signed else 64)
        if limits.hopper and not (few and meeting is not None):
            groups = _groups_for(m, n, columns, limits)
            if groups is not None:
                return groups
        if meeting is not None:
            return meeting
    elif m > 64 and limits.hopper:
        cluster = 2 if m > WIDE_ROWS else 1
        for shape, least in (
            (Wide(256, 4, cluster), 3 * processors // 4),
            (Wide(128, 6, cluster), 3 * processors // 8),
        ):
            if shape.grid(m, n, limits)[0] >= least:
                return shape
    return _block_for(m, n, columns.grouped, processors)


def _groups_for(m: int, n: int, columns: Columns, limits: Limits) -> Groups | None:
    """That of the least time, for more than a few rows of x.

    A tile takes about as long as one with 70 rows of x more whose rows took no time of their own.
    """
    if m <= 16:
        return None
    shapes = [Groups(128, 2), Groups(64, 1), Groups(32, 1)]
    shapes = [shape for shape in shapes if shape.fits(columns) and shape.m_tile < 2 * max(m, 32)]

    def cost(shape: Groups) -> int:
        return -(-shape.tiles(m, n) * shape.cluster // limits.processors) * (70 + shape.m_tile)

    return min(shapes, key=cost, default=None)


def _meeting_for(m: int, n: int, columns: Columns, limits: Limits) -> Block | None:
    """That whose warps share the columns, for few rows of x, where the sums have room to meet."""
    few = n <= 32 * limits.processors
    if SLICE // STEP % columns.bracket_steps or m > 64 or n > 64 * limits.processors:
        return None
    shapes = (
        Block(16, 32, 1, 1, 8, 3) if few else Block(16, 64, 1, 2, 8, 6),
        Block(32, 32, 1, 1, 8, 4),
        Block(64, 32, 1, 1, 4, 4),
    )
    shape = shapes[0 if m <= 16 else 1 if m <= 32 else 2]
    least = shape._replace(stages=2)
    return shape if least.shared(False, columns.bracket_steps, True) <= limits.shared else None


def _block_for(m: int, n: int, grouped: bool, processors: int) -> Block:
    few = n <= 32 * processors  # rows of W: a block of 32 for each multiprocessor at most
    many = n > 64 * processors
    if grouped:
        if m <= 16:
            return Block(16, 64, 1, 4, 1, 6) if many else Block(16, 32, 1, 4, 1, 8)
        if m <= 32:
            return Block(32, 32, 1, 4, 1, 8) if few else Block(32, 64, 1, 4, 1, 6)
        if m <= 64 and few:
            return Block(64, 32, 2, 2, 1, 6)
        return Block(64, 64, 2, 2, 1, 6) if m <= 256 else Block(128, 128, 2, 4, 1, 4)
    if m <= 16:
        return Block(16, 64, 1, 2, 2, 4) if many else Block(16, 32, 1, 1, 4, 4)
    if m <= 32:
        return Block(32, 64, 1, 2, 2, 4) if many else Block(32, 32, 1, 2, 4, 3)
    if m <= 64 and not many:
        return Block(64, 32, 2, 1, 4, 3) if few else Block(64, 32, 2, 1, 2, 4)
    if m <= 256:
        return Block(64, 64, 2, 2, 2, 3)
    return Block(128, 256, 2, 4, 1, 4) if m * n > 128 * 256 * processors else Block(128, 128, 2, 2, 1, 4)


@lru_cache(maxsize=4096)
def kernel_of(
    weight: Weight, dtype: torch.dtype, shape: Block | Groups | Wide, nibbles: bool, steps: int, zero: int = 0
) -> Kernel:
    """The kernel of a shape; `steps`: of a bracket, 0 where it is the row; `zero`: subtracted from codes."""
    macros = {**weight.macros(dtype), **{key.upper(): value for key, value in shape._asdict().items()}}
    if isinstance(shape, Wide):
        return Kernel("matmul_int8_wide.cu", "matmul_int8_wide", macros, shared=shape.shared)
    macros |= {"FLUSH": steps, "NIBBLES": nibbles}
    if isinstance(shape, Groups):
        macros |= {"SUBTRACTED": zero, "STAGES": shape.stages(nibbles, steps, weight)}
        return Kernel(
            "matmul_int8_groups.cu", "matmul_int8_groups", macros, shared=shape.shared(nibbles, steps, weight)
        )
    shared = shape.shared(nibbles, steps, weight.asymmetric)
    return Kernel("matmul_int8_block.cu", "matmul_int8_block", macros, shared=shared)
