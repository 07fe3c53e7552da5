"""Float products with weights in tiles (`ops.tiles`): `cuda/matmul_*.cu`, and how each is launched.

    rows of x       kernel    what it is
    1 … 16          stream    16 to 128 rows of W a block, a ring of codes a warp: memory is the limit
    more            wide      on Hopper: W from registers into wgmma, x through shared memory
                    block     elsewhere up to 128: many rows of W and 64 of x a block, through shared memory
                    expand    elsewhere: the weight as 16-bit floats, once, for cuBLAS

To `stream` and `block` codes are exact integers, and scales meet their sums; `wide` and cuBLAS take weights
as `unpack` rounds them. Sums are f32; their order depends on the shapes and on nothing else, so results are
the same bits every time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.nn import Parameter

from turboquant_rs.ops import reference
from turboquant_rs.ops.cuda.launcher import KEPT_ROWS, Call, Kernel, raw_stream, ready
from turboquant_rs.ops.cuda.limits import Limits, limits_of
from turboquant_rs.ops.cuda.macros import (
    ALIGNMENT,
    aligned,
    as_bias,
    check_dtype,
    check_length,
    plane_macros,
)
from turboquant_rs.ops.cuda.memory import new, row_major
from turboquant_rs.ops.cuda.tensor_map import tensor_map
from turboquant_rs.ops.direct import observed
from turboquant_rs.ops.schema import RoundingArgs, SchemeArgs, groups_per_row, split_args
from turboquant_rs.ops.tiles import TILE_ROWS, UNIT_COLUMNS, fits, prefix_of, tiles_nbytes

__all__ = ["Product", "Weight", "multiply", "takes"]

COLUMNS = 8
"""Rows of x that one instruction multiplies."""

STREAM_ROWS = 16
"""Rows of x up to which codes are streamed; beyond, activations would take more than codes."""

LONG_COLUMNS = 8192
"""Columns from which more tiles of W share what `stream` reads of 9 to 16 rows of x."""

WIDE_STAGES = 12
"""Stages of `wide`, at most."""

WIDE_RESULTS = 1024
"""Bytes of shared memory through which the results of a tile of W leave."""

WIDE_COLUMNS = (4, 8, 16, 24, 32)
"""Eights of rows of x that a block of `wide` takes."""

ORDER_ROWS = 64
"""Rows of x up to which the matrix unit has so little to do that it shows when codes are exchanged."""

ORDER_THREADS = 256
"""Threads of a block that orders activations, 8 of them each."""

BLOCK_ROWS = 128
"""Rows of x up to which `block` is faster than expanding the weight for cuBLAS."""

ALIGNED_COLUMNS = 8
"""Rows of x begin at multiples of 16 bytes where k is a multiple of this."""

_SCALES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Weight(NamedTuple):
    """A weight in tiles, as far as kernels are compiled for it."""

    planes: tuple[int, ...]  # those that are read
    rest: int  # bits that are not
    zero: int  # twice the zero point of a symmetric scheme
    asymmetric: bool
    scale: int
    group: int  # columns; 0: a row

    @classmethod
    def of(cls, scheme: SchemeArgs, planes: Sequence[int], read_bits: int) -> Weight:
        """The weight of a scheme, read at `read_bits`."""
        return cls(
            prefix_of(planes, read_bits),
            scheme.bits - read_bits,
            int(2 * reference.fixed_zero_point(scheme)) if scheme.symmetric else 0,
            not scheme.symmetric,
            _SCALES[scheme.scale_dtype],
            scheme.group_size,
        )

    @property
    def bits(self) -> int:
        """Bits that are read of each code."""
        return sum(self.planes)

    def check(self, packed: Tensor, scales: Tensor, zero_points: Tensor, n: int, k: int) -> None:
        """Refuses memory of other lengths or dtypes than a kernel would touch for W (n, k)."""
        need = tiles_nbytes(n, k, self.bits)
        if packed.numel() < need:
            check_length("packed", packed, need, n, k)
        groups = -(-n // TILE_ROWS) * TILE_ROWS * groups_per_row(k, self.group)
        check_length("scales", scales, groups, n, k)
        check_dtype("scales", scales, tuple(_SCALES)[self.scale])
        if self.asymmetric:
            check_length("zero_points", zero_points, groups, n, k)
            check_dtype("zero_points", zero_points, torch.uint8)

    def macros(self, bf16: bool) -> dict[str, object]:
        """What `tiles.cuh` asks for."""
        return {
            "BF16": bf16,
            **plane_macros(self.planes),
            "REST": self.rest,
            "ZERO": self.zero,
            "ASYMMETRIC": self.asymmetric,
            "SCALE": self.scale,
            "GROUP": self.group,
        }


class Launch(NamedTuple):
    """A kernel, and the grid and block that cover a product."""

    kernel: Kernel
    grid: tuple[int, int]
    threads: int
    shared: int
    rows: int  # of x, that a block of each z takes
    early: bool  # may be brought up while the kernel in front runs
    wide: Wide | None = None

    def on(self, device: int, m: int, settled: bool = True) -> Call:
        """The launch for m rows of x, early only with a weight that is settled."""
        grid = (*self.grid, -(-m // self.rows))
        return Call(self.kernel, device, grid, (self.threads,), self.shared, self.early and settled)


class Stream(NamedTuple):
    """How `matmul_stream.cu` is shaped: macros of the same names."""

    r_tiles: int
    warps: int
    stages: int
    units: int
    blocks: int

    def shared(self, weight: Weight, rows: int) -> int:
        """Bytes of shared memory for so many rows of x: of the stages of each warp, and of its sums.

        More rows than an instruction multiplies come through the stages too.
        """
        codes = self.r_tiles * self.units * weight.bits * TILE_ROWS * UNIT_COLUMNS // 8
        halves = weight.group // 32
        span = 1 if halves % 2 else 2 if halves % 4 or self.units == 1 else 4
        group = TILE_ROWS * ((4 if weight.scale == 2 else 2) + weight.asymmetric)
        groups = self.r_tiles * (2 * self.units // span) * group
        columns = -(-rows // COLUMNS) * COLUMNS
        activations = columns * self.units * UNIT_COLUMNS * 2 if rows > COLUMNS else 0
        sums = rows * (self.r_tiles * TILE_ROWS + 4) * 4
        return self.warps * (self.stages * (codes + groups + activations) + sums)

    def smaller(self) -> Stream:
        """The next shape, for a GPU with less shared memory."""
        if self.stages > 2:
            return self._replace(stages=self.stages - 1)
        if self.units > 1:
            return self._replace(units=self.units // 2, stages=3)
        if self.r_tiles > 1:
            return self._replace(r_tiles=self.r_tiles // 2)
        return self._replace(warps=self.warps // 2)


class Block(NamedTuple):
    """How `matmul_block.cu` is shaped: macros of the same names."""

    r_tiles: int
    warps_r: int
    warps_k: int
    stages: int
    blocks: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_r * self.warps_k

    def shared(self, weight: Weight, columns: int) -> int:
        """Bytes of shared memory: of the stages, or of the sums that they leave room for in the end."""
        tiles, rows = self.r_tiles * self.warps_r, COLUMNS * columns
        row = self.warps_k * UNIT_COLUMNS * 2 + 64
        stage = rows * row + tiles * self.warps_k * weight.bits * TILE_ROWS * UNIT_COLUMNS // 8
        sums = self.warps_k * rows * (tiles * TILE_ROWS + 4) * 4
        return max(self.stages * stage, sums)


class Wide(NamedTuple):
    """How `matmul_wide.cu` is shaped: macros of the same names."""

    n_tiles: int
    groups: int
    shares: int
    stages: int
    units: int
    ordered: bool
    halved: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block: a warp group that copies, and those that multiply."""
        return 128 * (1 + self.groups * self.shares)

    def stays(self, splits: int) -> bool:
        """Whether a block takes one tile after the other."""
        return splits * self.shares == 1

    def halves(self, tiles: int, splits: int, processors: int) -> int:
        """Tiles that are halved: those left when all blocks have had as many, if there are so few of them."""
        rest = tiles % processors
        few = self.n_tiles == WIDE_COLUMNS[-1] and 2 * rest <= processors
        return rest if few and self.stays(splits) else 0

    def deeper(self) -> Wide:
        """With a stage more."""
        return self._replace(stages=self.stages + 1)

    @property
    def rows(self) -> int:
        """Rows of W of a block."""
        return 64 * self.groups

    @property
    def box(self) -> int:
        """Rows of x that are copied at a time."""
        return COLUMNS * self.n_tiles // (2 if self.halved else 1)

    def shared(self, weight: Weight, columns: int) -> int:
        """Bytes of shared memory: of the stages, on a multiple of 1024, and of results that leave meanwhile;
        or, in the end, of sums that meet."""
        stage_columns = self.units * UNIT_COLUMNS
        codes = self.rows * stage_columns * weight.bits // 8
        stage = COLUMNS * columns * stage_columns * 2 + -(-codes // 1024) * 1024
        results = self.rows // TILE_ROWS * WIDE_RESULTS if self.shares == 1 else 0
        sums = self.shares * COLUMNS * columns * (self.rows + 4) * 4
        return max(self.stages * stage + results, sums) + 1024


Shape = Stream | Block | Wide

RESERVED = 1024
"""Bytes of shared memory that the system takes for each block."""


BLOCKS = {4: Block(2, 2, 4, 3, 2), 8: Block(2, 2, 2, 3, 2)}
"""The shape for 4 and 8 eights of rows of x: the fastest of many on a Hopper GPU."""

SMALL_BLOCK = Block(2, 2, 4, 3, 1)
"""The shape where W has too few rows for two blocks a multiprocessor."""


DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes of x that the matrix unit takes."""


def takes(x: Tensor, scheme: SchemeArgs, rounding: RoundingArgs) -> bool:
    """Whether a product of x with such a weight in tiles has a kernel here."""
    return (
        x.dtype in DTYPES
        and x.shape[-1] % ALIGNED_COLUMNS == 0
        and x.numel() > 0
        and fits(scheme, rounding)
        and limits_of(x.get_device()).tensor_cores
    )


def multiply(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    bias: Tensor | None,
    weight: Weight,
    out: Tensor,
) -> None:
    """x (m, k) · Wᵀ (+ bias) into out (m, n), both contiguous, for which `takes` holds.

    Raises: ValueError and TypeError for a weight whose memory is not that of (n, k) in tiles.
    """
    (m, k), n = x.shape, out.shape[1]
    weight.check(packed, scales, zero_points, n, k)
    if n == 0:
        return
    bf16, device = x.dtype == torch.bfloat16, x.get_device()
    packed, scales, zero_points = (
        part if aligned(part) else part.clone() for part in (packed, scales, zero_points)
    )
    stored = (packed.data_ptr(), scales.data_ptr(), zero_points.data_ptr())
    if not aligned(x):
        x = x.clone()
    call = call_of(weight, bf16, m, n, k, device)
    if call is None:
        values = x.new_empty(n, k)
        expand_into(values, packed, scales, zero_points, weight)
        multiply_expanded(x, values, bias, out)
        return
    bias, address, wide = as_bias(bias, x.dtype)
    call(x.data_ptr(), *stored, address, wide, out.data_ptr(), m, n, k)


def expand_into(values: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, weight: Weight) -> None:
    """The weight as plain rows (n, k) of 16-bit floats."""
    stored = (packed.data_ptr(), scales.data_ptr(), zero_points.data_ptr())
    n, k = values.shape
    call = expand(weight, values.dtype == torch.bfloat16, n, k).on(values.get_device(), 1)
    call(*stored, values.data_ptr(), n, k)


def multiply_expanded(x: Tensor, values: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x (m, k) · Wᵀ (+ bias) into out (m, n) by cuBLAS."""
    (m, k), n = x.shape, out.shape[1]
    if bias is None:
        torch.mm(x, values.T, out=out)
    else:
        torch.addmm(bias.detach().to(x.dtype), x, values.T, out=out)
    # A row that is not finite is NaN throughout; cuBLAS leaves infinities.
    spoil(x.dtype == torch.bfloat16)(
        x.get_device(), (m, 1, 1), (256, 1, 1), (x.data_ptr(), out.data_ptr(), n, k)
    )


@lru_cache(maxsize=4096)
def call_of(
    weight: Weight, bf16: bool, m: int, n: int, k: int, device: int, settled: bool = False
) -> Call | WideCall | None:
    """The launch for m rows of x; None where the weight is expanded for them.

    Its arguments: x, the weight's three tensors, bias and whether that is f32, the product, m, n, k.
    Only of a weight that is `settled`, written by nothing since a launch before on its stream, are codes
    fetched while the kernel in front runs: what that writes is there for certain only once it was waited for.
    """
    found = launch(weight, bf16, m, n, k, limits_of(device))
    if found is None:
        return None
    if found.wide is not None:
        return WideCall(found, found.wide, weight, device, m, n, k, settled)
    return found.on(device, m, settled)


class WideCall:
    """The launches of `wide`, with the arguments of the others: x, ordered or as it lies, and the planes
    become tensor maps."""

    def __init__(
        self,
        launch: Launch,
        wide: Wide,
        weight: Weight,
        device: int,
        m: int,
        n: int,
        k: int,
        settled: bool,
    ) -> None:
        """The launches for m rows of x."""
        tiles, units = -(-n // TILE_ROWS), -(-k // UNIT_COLUMNS)
        self._order: Call | None = None
        self._device, self._columns = torch.device("cuda", device), k
        if wide.ordered:
            self._columns = units * UNIT_COLUMNS
            blocks = -(-m * self._columns // (8 * ORDER_THREADS))
            self._order = Call(order(), device, (blocks,), (ORDER_THREADS,))
        # Behind the kernel that orders x, which has waited, every weight is settled.
        self._call, self._box = launch.on(device, m, settled or wide.ordered), wide.box
        # Of each plane: where it begins, what a tile has of it, and what a stage has of a tile.
        self._planes, at = [], 0
        for width in weight.planes:
            row = units * UNIT_COLUMNS * TILE_ROWS * width // 8
            stage = wide.units * UNIT_COLUMNS * TILE_ROWS * width // 8
            self._planes.append((at, (tiles, row, wide.rows // TILE_ROWS, stage)))
            at += tiles * row

    def __call__(self, x: int, packed: int, *operands: int) -> None:
        """As a `Call`."""
        m, _, k = operands[-3:]
        if self._order is not None:
            ordered = torch.empty(m * self._columns, dtype=torch.int16, device=self._device)
            address = ordered.data_ptr()
            self._order(x, address, m, k, self._columns)
            x = address
        maps = tensor_map(x, m, 2 * self._columns, self._box)
        for at, shape in self._planes:
            maps += tensor_map(packed + at, *shape)
        self._call(packed, *operands, *maps)


Prepared = tuple[Call | WideCall, int, tuple[int, ...], tuple[int, ...]]
"""The launch for x of one shape, its rows, and sizes and strides of the result."""


class Product:
    """x · Wᵀ (+ bias) with one weight in tiles and float activations, called past the dispatcher, which takes
    longer than the GPU for few rows of x.

    What a call has to check of the weight is checked once. Its memory stays that of its tensors.
    """

    def __init__(self, packed: Tensor, scales: Tensor, zero_points: Tensor, k: int, *args: Any) -> None:
        """The weight of k columns; `args` are those that follow the bias in the operator's arguments."""
        scheme, rounding, (planes, read_bits, activations, layout, n) = split_args(args)
        self._kind = Weight.of(scheme, planes, read_bits)
        self._packed, self._scales = packed, scales
        self._zeros = zero_points if self._kind.asymmetric else None
        self._device, self._n, self._k = packed.get_device(), n, k
        whole = (activations, layout) == ("float", "tiles") and k % ALIGNED_COLUMNS == 0
        whole = whole and aligned(packed, scales, zero_points)
        self._fits = whole and fits(scheme, rounding) and limits_of(self._device).tensor_cores
        # Writes that had been made, and the stream, at the last launch. None are counted in inference mode.
        self._counts = not any(part.is_inference() for part in (packed, scales, zero_points))
        self._written, self._stream = -1, 0
        self._calls: dict[tuple[torch.dtype, torch.Size, bool], Prepared] = {}
        self._bias: tuple[Tensor, int, torch.dtype, int] | None = None

    def __call__(
        self, x: Tensor, bias: Tensor | None, refinement: tuple[int, float] | None = None
    ) -> tuple[Tensor, int] | None:
        """What the operator returns, bit for bit, and no rows refined. None where the operator must be asked.

        That is where somebody would see the call (a gradient, a transform, a mode, a trace, a profiler),
        where x is no plain tensor in the GPU's memory as a kernel takes it, where there are so many rows that
        the weight is expanded, for a `refinement`, and where the operands do not fit.
        """
        device = self._device
        if type(x) is not Tensor or observed() or x.get_device() != device:
            return None
        try:
            address = x.data_ptr()
        except RuntimeError:  # sparse: in no memory of its own
            return None
        if not address or address % ALIGNMENT or not x.is_contiguous() or x.is_neg():
            return None
        if is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        dtype, shape, packed, scales, zeros = x.dtype, x.shape, self._packed, self._scales, self._zeros
        settled, written, stream = False, -1, raw_stream(device)
        if self._counts:
            written = packed._version + scales._version
            if zeros is not None:
                written += zeros._version
            # A graph is launched behind all that is there now, whatever stream it is captured on.
            settled = written == self._written and (
                stream == self._stream or torch.cuda.is_current_stream_capturing()
            )
        prepared = self._calls.get((dtype, shape, settled)) or self._prepared(dtype, shape, settled)
        if prepared is None or refinement is not None:
            return None
        bias_address, wide = 0, 0
        if bias is not None:
            known = self._bias
            if (
                known is None
                or known[0] is not bias
                or known[1] != bias.data_ptr()
                or known[2] is not bias.dtype
            ):
                known = self._known(bias)
            if known is None or (not known[3] and known[2] is not dtype):
                return None
            _, bias_address, _, wide = known
        call, m, sizes, strides = prepared
        at_once = ready(device)
        out = new(sizes, strides, dtype) if at_once else x.new_empty(sizes)
        codes, scaling, zero = packed.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr()
        arguments = (address, codes, scaling, zero, bias_address, wide, out.data_ptr(), m, self._n, self._k)
        if at_once and type(call) is Call:
            code = call.queue(stream, arguments)
            if code:
                call.refuse(code)
        else:
            call(*arguments)
        self._written, self._stream = written, stream
        return out, 0

    def _prepared(self, dtype: torch.dtype, shape: torch.Size, settled: bool) -> Prepared | None:
        """The launch for x of that shape, and its result, if that is all there is to do."""
        n, k, m = self._n, self._k, shape[:-1].numel()
        if not (self._fits and dtype in DTYPES and shape and shape[-1] == k and m and n):
            return None
        call = call_of(self._kind, dtype is torch.bfloat16, m, n, k, self._device, settled)
        if call is None:
            return None
        sizes = (*shape[:-1], n)
        prepared = call, m, sizes, row_major(sizes)
        if m <= KEPT_ROWS:
            self._calls[dtype, shape, settled] = prepared
        return prepared

    def _known(self, bias: Tensor) -> tuple[Tensor, int, torch.dtype, int] | None:
        """A bias with its address, its dtype and whether that is f32, if a kernel can take it as it lies."""
        plain = type(bias) in (Tensor, Parameter) and bias.layout is torch.strided
        if (
            not plain
            or bias.get_device() != self._device
            or bias.shape != (self._n,)
            or not bias.is_contiguous()
            or bias.is_neg()
        ):
            return None
        if bias.dtype is not torch.float32 and bias.dtype not in DTYPES:
            return None
        self._bias = (bias, bias.data_ptr(), bias.dtype, int(bias.dtype is torch.float32))
        return self._bias


def _columns(m: int) -> int:
    """Rows of x that a block takes, in steps of what an instruction takes: 1, 2, 4 or 8."""
    return min(8, 1 << (-(-m // COLUMNS) - 1).bit_length())


@cache
def expand(weight: Weight, bf16: bool, n: int, k: int) -> Launch:
    """The kernel and grid that make plain rows of a weight."""
    kernel = Kernel("matmul_expand.cu", "matmul_expand", weight.macros(bf16))
    warps = -(-n // TILE_ROWS) * -(-k // UNIT_COLUMNS)
    return Launch(kernel, (-(-warps // 8), 1), 256, 0, 1, early=False)


@cache
def spoil(bf16: bool) -> Kernel:
    """The kernel that marks results of rows that are not finite."""
    return Kernel("matmul_spoil.cu", "matmul_spoil", {"BF16": bf16})


@cache
def order() -> Kernel:
    """The kernel that brings activations to the order of W."""
    return Kernel("matmul_order.cu", "matmul_order")


@lru_cache(maxsize=4096)
def launch(weight: Weight, bf16: bool, m: int, n: int, k: int, limits: Limits) -> Launch | None:
    """The kernel and grid for m rows of x; None where the weight is expanded for them."""
    if m <= STREAM_ROWS:
        return _stream(weight, bf16, m, n, k, limits)
    if limits.hopper:
        return _wide(weight, bf16, m, n, k, limits)
    return _block(weight, bf16, _columns(m), n, k, limits) if m <= BLOCK_ROWS else None


def _stream(weight: Weight, bf16: bool, m: int, n: int, k: int, limits: Limits) -> Launch:
    columns, tiles = _columns(m), -(-n // TILE_ROWS)
    stream = _stream_shape(columns, tiles, k, limits)
    while stream.blocks * (stream.shared(weight, m) + RESERVED) > limits.shared + RESERVED:
        stream = stream.smaller()
    slices, steps = -(-tiles // stream.r_tiles), -(-k // (stream.units * UNIT_COLUMNS))
    splits = _splits(slices, stream.blocks, steps // stream.warps, limits)
    kernel = _kernel(weight, bf16, columns, stream, splits, limits.shared)
    grid = min(slices, max(1, limits.processors * stream.blocks // splits)), splits
    shared = stream.shared(weight, m)
    return Launch(kernel, grid, 32 * stream.warps, shared, COLUMNS * columns, early=limits.clusters)


def _stream_shape(columns: int, tiles: int, k: int, limits: Limits) -> Stream:
    """Its shape, the fastest of many on an H200: a slice a multiprocessor while registers hold its sums."""
    each = -(-tiles // limits.processors)
    if columns == 1:
        if each <= 4:
            return Stream(each, 16, 2, 2, 1)
        return Stream(_balanced(tiles, limits), 8, 2, 2, 2)
    if each <= 2:
        # More tiles share what is read of x; blocks, which then share the columns, have to add their sums.
        shared = limits.clusters and k >= LONG_COLUMNS
        return Stream(2 * each, 8, 2, 2, 1) if shared else Stream(each, 12, 3, 1, 1)
    if each <= 4:
        return Stream(each, 8, 2, 2, 1)
    return Stream(_balanced(tiles, limits), 6, 3, 1, 2)


def _balanced(tiles: int, limits: Limits) -> int:
    """Tiles a slice with which two blocks a multiprocessor have the fewest tiles where they have most."""

    def most(r_tiles: int) -> int:
        slices = -(-tiles // r_tiles)
        blocks = min(slices, 2 * limits.processors)
        others = max(0, slices - limits.processors) if blocks > limits.processors else 0
        return r_tiles * (-(-slices // blocks) + -(-others // blocks))

    return min((4, 3, 2), key=most)


def _block(weight: Weight, bf16: bool, columns: int, n: int, k: int, limits: Limits) -> Launch:
    tiles, units = -(-n // TILE_ROWS), -(-k // UNIT_COLUMNS)
    few = tiles <= 2 * limits.processors and columns == 8
    for block in (SMALL_BLOCK, BLOCKS[columns]) if few else (BLOCKS[columns],):
        while block.stages > 2 and block.shared(weight, columns) > limits.shared:
            block = block._replace(stages=block.stages - 1)
        if block.shared(weight, columns) <= limits.shared:
            break
    blocks = -(-tiles // (block.r_tiles * block.warps_r))
    splits = _splits(blocks, block.blocks, units // (2 * block.warps_k * block.stages), limits)
    kernel = _kernel(weight, bf16, columns, block, splits)
    return Launch(kernel, (blocks, splits), block.threads, kernel.shared, COLUMNS * columns, early=False)


def _wide(weight: Weight, bf16: bool, m: int, n: int, k: int, limits: Limits) -> Launch:
    blocks = -(-m // (COLUMNS * WIDE_COLUMNS[-1]))
    columns = next(columns for columns in WIDE_COLUMNS if blocks * COLUMNS * columns >= m)
    # Seconds on an H200: to exchange codes, which products of more rows of x hide, or to order x before.
    exchange, order = 3e-15 * (weight.bits + 4) * n * k, 1.5e-6 + 1.05e-12 * m * k
    ordered = m <= ORDER_ROWS and exchange > order
    shapes = [_wide_shape(weight, columns, groups, ordered, limits) for groups in (2, 1)]
    wide, splits = min(
        itertools.product(shapes, (1, 2, 4, 8)),
        key=lambda shape: _wide_cost(shape[0], shape[1], blocks, n, k, limits),
    )
    grid = -(-n // wide.rows) * blocks
    if wide.stays(splits):
        halves = wide.halves(grid, splits, limits.processors)
        wide, grid = wide._replace(halved=halves > 0), min(grid + halves, limits.processors)
    kernel = _kernel(weight, bf16, columns, wide, splits)
    return Launch(kernel, (grid, splits), wide.threads, kernel.shared, m, early=True, wide=wide)


def _wide_shape(weight: Weight, columns: int, groups: int, ordered: bool, limits: Limits) -> Wide:
    """Its shape with so many rows of W a block: the fastest of many on an H200."""
    shares = 2 if groups == 1 or columns <= 8 else 1
    for units in (4, 2, 1):
        # A copy has 2048 bytes of a tile at most.
        if units == 4 and (columns > 8 or groups > 1 or max(weight.planes) == 8):
            continue
        wide = Wide(columns, groups, shares, 2, units, ordered)
        while wide.stages < WIDE_STAGES and wide.deeper().shared(weight, columns) <= limits.shared - RESERVED:
            wide = wide.deeper()
        # Each share takes one, has another ready, and half the time a third on its way.
        if 2 * wide.stages >= 5 * shares:
            break
    return wide


def _wide_cost(wide: Wide, splits: int, blocks: int, n: int, k: int, limits: Limits) -> float:
    """What a product costs with such blocks, in columns that a warp group multiplies.

    The constants are those of an H200: with half as many rows of W twice as much of x is read; sums of a
    cluster have to meet, and clusters of more than two leave multiprocessors idle; half a tile costs more
    than half of one, as its codes are those of a whole one.
    """
    tiles, processors = -(-n // wide.rows) * blocks, limits.processors
    if splits > 1 and tiles * splits > processors * (8 if splits == 2 else 7) // 8:
        return math.inf
    columns = max(k / splits, wide.shares * wide.units * UNIT_COLUMNS)
    one = columns * 1.15 if wide.groups == 1 else 2 * columns
    rounds = float(-(-tiles * splits // processors))
    if wide.halves(tiles, splits, processors):
        rounds -= 0.4
    return rounds * (one + (0 if splits == 1 else 800 + 50 * (splits - 2)))


def _splits(blocks: int, resident: int, most: int, limits: Limits) -> int:
    """How many blocks, a cluster, share the columns: while all are resident at once. More than two are worth
    it only where multiprocessors would be idle. Clusters came with Hopper."""
    splits = 1
    while limits.clusters and splits < 8 and 2 * splits <= most:
        if 2 * splits * blocks > limits.processors * (resident if splits == 1 else 1):
            break
        splits *= 2
    return splits


@cache
def _kernel(
    weight: Weight, bf16: bool, columns: int, shape: Shape, splits: int, shared: int | None = None
) -> Kernel:
    """One kernel for all sizes of a matrix; `shared`: bytes a launch may ask for, where they differ."""
    name = type(shape).__name__.lower()
    macros = {**weight.macros(bf16), "N_TILES": columns, "SPLITS": splits}
    macros |= {key.upper(): value for key, value in shape._asdict().items()}
    return Kernel(
        f"matmul_{name}.cu",
        f"matmul_{name}",
        macros,
        shared=shape.shared(weight, columns) if shared is None else shared,
    )
