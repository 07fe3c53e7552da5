"""Tensor maps: matrices of bytes as the copy engine of Hopper reads them, described by the CUDA driver."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np

__all__ = ["TILE_COLUMNS", "tensor_map"]

TILE_COLUMNS = 128
"""Bytes of a row of a tile, which change places by the number of the row (`CU_TENSOR_MAP_SWIZZLE_128B`)."""

_WORDS = 16
_ALIGNMENT = 64

_UINT8, _UINT64 = 0, 4
_NO_INTERLEAVE, _NO_SWIZZLE, _SWIZZLE_64B, _SWIZZLE_128B, _PROMOTE_256B, _ZEROS_OUTSIDE = 0, 0, 2, 3, 3, 0
"""Of the enumerations of cuda.h that `cuTensorMapEncodeTiled` takes, in their order there."""


@cache
def _encode() -> Callable[..., int]:
    driver: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    encode: Callable[..., int] = driver.cuTensorMapEncodeTiled
    return encode


@lru_cache(maxsize=16384)  # a plane of a layer each: of large models, at several numbers of rows of x
def tensor_map(
    address: int,
    rows: int,
    row_bytes: int,
    tile_rows: int,
    plain: int | None = None,
    columns: int = TILE_COLUMNS,
) -> tuple[int, ...]:
    """The words of a map, for a kernel that copies tiles of `tile_rows` rows; outside are zeros.

    Args:
        address: Of the first byte, a multiple of 16.
        rows: Of the matrix.
        row_bytes: Of each row, a multiple of 16; one follows the other.
        tile_rows: At most 256.
        plain: Bytes of a row of a tile that keep their places, at most 2048; columns are counted by 8 then.
        columns: Bytes of a row of a tile that change places, 128 or 64.

    Raises: RuntimeError if the driver refuses.
    """
    memory = np.zeros(_WORDS + _ALIGNMENT // 8, np.int64)
    start = -memory.ctypes.data % _ALIGNMENT // 8
    own = memory[start : start + _WORDS]
    size = 1 if plain is None else 8
    swizzle = _NO_SWIZZLE if plain else _SWIZZLE_128B if columns == TILE_COLUMNS else _SWIZZLE_64B
    status = _encode()(
        ctypes.c_void_p(own.ctypes.data),
        ctypes.c_int(_UINT8 if plain is None else _UINT64),
        ctypes.c_uint32(2),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(row_bytes // size, rows),
        (ctypes.c_uint64 * 1)(row_bytes),
        (ctypes.c_uint32 * 2)((plain or columns) // size, tile_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(_NO_INTERLEAVE),
        ctypes.c_int(swizzle),
        ctypes.c_int(_PROMOTE_256B),
        ctypes.c_int(_ZEROS_OUTSIDE),
    )
    if status:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled refused {rows} rows of {row_bytes} bytes at {address:#x}: "
            f"CUresult {status}"
        )
    return tuple(own.tolist())
