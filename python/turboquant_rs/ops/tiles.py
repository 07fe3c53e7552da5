"""Tiles: a packed matrix in the order in which the GPU's matrix unit takes it. Plain torch, any device.

    packed       plane ▸ tile of 16 rows ▸ unit of 64 columns ▸ lane ▸ words  (`width` words of 32 bits)
    scales       tile ▸ group ▸ row mod 8 ▸ row div 8                         (and zero points)

A warp multiplies a tile by a unit in four steps. Lane l holds eight codes of each, its slots: slot i of
step t is row l div 4 + 8·(i mod 2), column
32·(t div 2) + 8·(l mod 4) + 4·(t mod 2) + 2·(i div 2 mod 2) + i div 4. So a lane's activations are 16
consecutive bytes of a row of x, and its codes lie where the instruction wants them.

In a plane of width 1, 2 or 4, slot i of step t lies at bit 4·i + width·(t mod (4 / width)) of word
t·width div 4; in a plane of width 8, it is byte i div 2 of word 2·t + i mod 2, and words 0 to 3 of all lanes
come before words 4 to 7. Planes follow one another, so a prefix of the bits is a prefix of the bytes;
nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant_rs.ops.schema import OPS, RoundingArgs, SchemeArgs

TILE_ROWS, UNIT_COLUMNS = 16, 64
"""What rows and columns of tiles are padded to multiples of."""

GROUP_COLUMNS = 32
"""Groups in tiles are a multiple of as many columns, or a row."""

_CHUNK = 2**24
"""Codes that are rearranged at a time: they take four bytes each meanwhile."""

# The axes of a tile by a unit, as the formula above names them: half of the rows, row, half of the columns,
# lane of the column, step of the half, pair, element of the pair.
_AXES = (2, 8, 2, 4, 2, 2, 2)
_TO_SLOTS = (0, 3, 2, 5, 4, 6, 8, 7, 1)  # of (tile, half, row, unit, half, lane, step, pair, element)
_TO_CODES = (0, 8, 2, 1, 4, 3, 5, 7, 6)


def fits(scheme: SchemeArgs, rounding: RoundingArgs) -> bool:
    """Whether weights of such a scheme can be multiplied in tiles."""
    return (
        not scheme.table
        and rounding.mode != "subtractive"
        and not rounding.preserve_variance
        and scheme.group_size % GROUP_COLUMNS == 0
    )


def tiles_nbytes(n: int, k: int, bits: int) -> int:
    """Bytes of `bits` bits a code of a matrix (n, k) in tiles."""
    tiles, units = -(-n // TILE_ROWS), -(-k // UNIT_COLUMNS)
    return tiles * units * TILE_ROWS * UNIT_COLUMNS * bits // 8


def prefix_of(planes: Sequence[int], read_bits: int) -> tuple[int, ...]:
    """The planes of the top read_bits bits. Raises: ValueError for bits that end at no plane."""
    bits = 0
    for count, width in enumerate(planes):
        if bits == read_bits:
            return tuple(planes[:count])
        bits += width
    if bits != read_bits:
        raise ValueError(f"cannot read {read_bits} bits of planes {list(planes)}")
    return tuple(planes)


def to_tiles(
    packed: Tensor, scales: Tensor, zero_points: Tensor, planes: Sequence[int], k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A packed matrix (n, k) in tiles.

    Args:
        packed: u8, canonical, all of `planes`.
        scales, zero_points: (n, groups); zero_points may be empty.

    Returns: packed u8 of `tiles_nbytes`; scales and zero points (n padded to 16, groups), in their order.
    """
    n, bits, units = scales.shape[0], sum(planes), -(-k // UNIT_COLUMNS)
    blob = packed.new_empty(tiles_nbytes(n, k, bits))
    codes = OPS.unpack_codes(packed, list(planes), bits, (n, k))
    rows = max(1, _CHUNK // max(1, units * UNIT_COLUMNS * TILE_ROWS)) * TILE_ROWS
    for first in range(0, n, rows):
        part = codes[first : first + rows]
        part = F.pad(part, (0, -k % UNIT_COLUMNS, 0, -part.shape[0] % TILE_ROWS)).int()
        count = part.shape[0] // TILE_ROWS
        slots = (
            part.view(count, *_AXES[:2], units, *_AXES[2:]).permute(_TO_SLOTS).reshape(count, units, 32, 4, 8)
        )
        below, start = bits, 0
        for width in planes:
            below -= width
            words = _to_words((slots >> below) & (2**width - 1), width).reshape(-1).view(torch.uint8)
            begin = start + tiles_nbytes(first, k, width)
            blob[begin : begin + words.numel()] = words
            start += tiles_nbytes(n, k, width)
    return blob, _tile_order(scales), _tile_order(zero_points) if zero_points.numel() else zero_points


def from_tiles(
    packed: Tensor, scales: Tensor, zero_points: Tensor, planes: Sequence[int], n: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `to_tiles`; `packed` may hold the planes of more bits than `planes`."""
    units = -(-k // UNIT_COLUMNS)
    codes = packed.new_empty(n, k)
    rows = max(1, _CHUNK // max(1, units * UNIT_COLUMNS * TILE_ROWS)) * TILE_ROWS
    for first in range(0, n, rows):
        size = min(rows, n - first)
        count = -(-size // TILE_ROWS)
        slots = torch.zeros(count, units, 32, 4, 8, dtype=torch.int32, device=packed.device)
        start = 0
        for width in planes:
            begin = start + tiles_nbytes(first, k, width)
            words = packed[begin : begin + tiles_nbytes(size, k, width)].view(torch.int32)
            slots = slots << width | _from_words(words.view(count, units, 32 * width), width)
            start += tiles_nbytes(n, k, width)
        axes = slots.view(count, units, 8, 4, 2, 2, 2, 2, 2).permute(_TO_CODES)
        codes[first : first + size] = axes.reshape(count * TILE_ROWS, -1)[:size, :k].byte()
    canonical = OPS.pack_codes(codes, list(planes))
    zeros = _row_order(zero_points, n) if zero_points.numel() else zero_points
    return canonical, _row_order(scales, n), zeros


def _places(width: int, device: torch.device) -> Tensor:
    """Where the fields of a word begin: steps that share it by slots, or the bytes of a word."""
    if width == 8:
        return torch.arange(0, 32, 8, dtype=torch.int32, device=device)[:, None]
    steps = torch.arange(0, 4, width, dtype=torch.int32, device=device)
    return steps[:, None] + torch.arange(0, 32, 4, dtype=torch.int32, device=device)


def _to_words(fields: Tensor, width: int) -> Tensor:
    """Fields (tiles, units, 32 lanes, 4 steps, 8 slots) as words, in their order in memory."""
    places, shape = _places(width, fields.device), fields.shape[:3]
    if width == 8:
        halves = (fields.view(*shape, 2, 2, 4, 2) << places).sum(5, dtype=torch.int32)
        return halves.transpose(2, 3)
    words: Tensor = (fields.view(*shape, width, 4 // width, 8) << places).sum((4, 5), dtype=torch.int32)
    return words


def _from_words(words: Tensor, width: int) -> Tensor:
    """The inverse of `_to_words`, of words (tiles, units, 32·width)."""
    places, shape = _places(width, words.device), words.shape[:2]
    if width == 8:
        lanes = words.view(*shape, 2, 32, 2, 2).transpose(2, 3)
        fields = lanes[..., None, :] >> places
    else:
        fields = words.view(*shape, 32, width, 1, 1) >> places
    codes: Tensor = (fields & 2**width - 1).reshape(*shape, 32, 4, 8)
    return codes


def _tile_order(values: Tensor) -> Tensor:
    """Values (n, groups), one a group, in the order of tiles."""
    rows = F.pad(values, (0, 0, 0, -values.shape[0] % TILE_ROWS))
    return rows.view(-1, 2, 8, values.shape[1]).permute(0, 3, 2, 1).reshape(rows.shape)


def _row_order(values: Tensor, n: int) -> Tensor:
    """The inverse of `_tile_order`."""
    return values.view(-1, values.shape[1], 8, 2).permute(0, 3, 2, 1).reshape(values.shape)[:n].contiguous()
