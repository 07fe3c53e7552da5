"""Float products with weights in tiles (`ops.tiles`): `cuda/matmul_*.cu`, and how each is launched.

    rows of x       kernel    what it is
    1 … 16          stream    16 rows of W a block, codes through registers: memory is the limit
    … 64 a block    block     many rows of W and of x a block, through shared memory
    more            expand    the weight as 16-bit floats, once, for cuBLAS

Codes enter the matrix unit as exact integers and sums are f32; the order of summation depends on the shapes
and on nothing else, so results are the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from turboquant_rs.ops import reference
from turboquant_rs.ops.cuda.launcher import Kernel
from turboquant_rs.ops.cuda.macros import aligned, plane_macros
from turboquant_rs.ops.schema import RoundingArgs, SchemeArgs
from turboquant_rs.ops.tiles import TILE_ROWS, UNIT_COLUMNS, fits, prefix_of

__all__ = ["Weight", "multiply", "takes"]

COLUMNS = 8
"""Rows of x that one instruction multiplies."""

EXPAND_ROWS = 129
"""Rows of x from which expanding the weight for cuBLAS costs less than reading it once for every 64."""

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
    rows: int  # of x, a block

    def __call__(self, device: int, m: int, args: tuple[int, ...]) -> None:
        """Launches it for m rows of x."""
        grid = (*self.grid, -(-m // self.rows))
        self.kernel(device, grid, (self.threads, 1, 1), args, shared=self.shared)


class Stream(NamedTuple):
    """How `matmul_stream.cu` is shaped: macros of the same names."""

    warps: int
    depth: int
    blocks: int


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

    def shared(self, bits: int, columns: int) -> int:
        """Bytes of shared memory: of the stages, or of the sums that they leave room for in the end."""
        tiles, rows = self.r_tiles * self.warps_r, COLUMNS * columns
        row = self.warps_k * UNIT_COLUMNS * 2 + 64
        stage = rows * row + tiles * self.warps_k * bits * TILE_ROWS * UNIT_COLUMNS // 8
        sums = self.warps_k * rows * (tiles * TILE_ROWS + 4) * 4
        return max(self.stages * stage, sums)


STREAM_COLUMNS = 2
"""Eights of rows of x up to which codes are streamed; beyond, activations would take more than codes."""

BLOCKS = {4: Block(2, 2, 4, 3, 2), 8: Block(2, 2, 2, 3, 2)}
"""The shape for 4 and 8 eights of rows of x: the fastest of many on a Hopper GPU."""

FEW_ROWS = Block(2, 2, 4, 3, 1)
"""The shape where W has too few rows for two blocks a multiprocessor."""


def takes(x: Tensor, scheme: SchemeArgs, rounding: RoundingArgs) -> bool:
    """Whether a product of x with such a weight in tiles has a kernel here."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[-1] % ALIGNED_COLUMNS == 0
        and x.numel() > 0
        and fits(scheme, rounding)
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
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
    """x (m, k) · Wᵀ (+ bias) into out (m, n), both contiguous, for which `takes` holds."""
    (m, k), n = x.shape, out.shape[1]
    bf16, device = x.dtype == torch.bfloat16, x.device.index or 0
    stored = (packed.data_ptr(), scales.data_ptr(), zero_points.data_ptr())
    if not aligned(x):
        x = x.clone()
    if m >= EXPAND_ROWS:
        values = torch.empty(n, k, dtype=x.dtype, device=x.device)
        expand(weight, bf16, n, k)(device, 1, (*stored, values.data_ptr(), n, k))
        if bias is None:
            torch.mm(x, values.T, out=out)
        else:
            torch.addmm(bias.detach().to(x.dtype), x, values.T, out=out)
        # A row that is not finite is NaN throughout; cuBLAS leaves infinities.
        spoil(bf16)(device, (m, 1, 1), (256, 1, 1), (x.data_ptr(), out.data_ptr(), n, k))
        return
    address, wide = 0, False
    if bias is not None:
        bias = (bias if bias.dtype == x.dtype else bias.float()).contiguous()
        address, wide = bias.data_ptr(), bias.dtype == torch.float32
    args = (x.data_ptr(), *stored, address, int(wide), out.data_ptr(), m, n, k)
    launch(weight, bf16, _columns(m), n, k, _limits(device))(device, m, args)


class Limits(NamedTuple):
    """What shapes depend on of a device."""

    processors: int
    shared: int  # bytes a block may have
    clusters: bool


def _columns(m: int) -> int:
    """Rows of x that a block takes, in steps of what an instruction takes: 1, 2, 4 or 8."""
    return min(8, 1 << (-(-m // COLUMNS) - 1).bit_length())


@cache
def _limits(device: int) -> Limits:
    found = torch.cuda.get_device_properties(device)
    return Limits(found.multi_processor_count, found.shared_memory_per_block_optin, found.major >= 9)


@cache
def expand(weight: Weight, bf16: bool, n: int, k: int) -> Launch:
    """The kernel and grid that make plain rows of a weight."""
    kernel = Kernel("matmul_expand.cu", "matmul_expand", weight.macros(bf16))
    warps = -(-n // TILE_ROWS) * -(-k // UNIT_COLUMNS)
    return Launch(kernel, (-(-warps // 8), 1), 256, 0, 1)


@cache
def spoil(bf16: bool) -> Kernel:
    """The kernel that marks results of rows that are not finite."""
    return Kernel("matmul_spoil.cu", "matmul_spoil", {"BF16": bf16})


@cache
def launch(weight: Weight, bf16: bool, columns: int, n: int, k: int, limits: Limits) -> Launch:
    """The kernel and grid for `columns` times eight rows of x."""
    tiles, units = -(-n // TILE_ROWS), -(-k // UNIT_COLUMNS)
    if columns <= STREAM_COLUMNS:
        stream = _stream(weight, columns, tiles / limits.processors)
        splits = _splits(2 * tiles, stream.blocks, units // (stream.warps * stream.depth), limits)
        kernel = _kernel(weight, bf16, columns, stream, splits)
        blocks = min(tiles, max(1, limits.processors * stream.blocks // splits))
        return Launch(kernel, (blocks, splits), 32 * stream.warps, 0, COLUMNS * columns)
    block = BLOCKS[columns] if tiles > 2 * limits.processors or columns < 8 else FEW_ROWS
    while block.stages > 2 and block.shared(weight.bits, columns) > limits.shared:
        block = block._replace(stages=block.stages - 1)
    blocks = -(-tiles // (block.r_tiles * block.warps_r))
    splits = _splits(blocks, block.blocks, units // (2 * block.warps_k * block.stages), limits)
    kernel = _kernel(weight, bf16, columns, block, splits)
    return Launch(kernel, (blocks, splits), block.threads, kernel.shared, COLUMNS * columns)


def _stream(weight: Weight, columns: int, waves: float) -> Stream:
    """Its shape, the fastest of many on a Hopper GPU; a thread's registers hold the codes on their way."""
    if columns > 1:
        return Stream(8, 2, 2)
    if weight.bits > 4:
        return Stream(8, 2, 4 if len(weight.planes) == 1 else 2)
    return Stream(8, 4, 3 if waves > 4 and len(weight.planes) == 1 else 2)


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
def _kernel(weight: Weight, bf16: bool, columns: int, shape: Stream | Block, splits: int) -> Kernel:
    """One kernel for all sizes of a matrix."""
    name = type(shape).__name__.lower()
    macros = {**weight.macros(bf16), "N_TILES": columns, "SPLITS": splits}
    macros |= {key.upper(): value for key, value in shape._asdict().items()}
    shared = shape.shared(weight.bits, columns) if isinstance(shape, Block) else 0
    return Kernel(f"matmul_{name}.cu", f"matmul_{name}", macros, shared=shared)
