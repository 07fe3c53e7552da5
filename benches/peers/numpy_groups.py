"""Group quantization in NumPy, temporaries allocated once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def packer(x: NDArray[np.float32], bits: int, group_size: int) -> Callable[[], object]:
    """Absmax scales, nearest codes, two 4-bit codes a byte; buffers are kept between calls."""
    half = 1 << (bits - 1)
    groups = x.reshape(-1, group_size)
    steps = np.empty_like(groups)
    codes = np.empty(groups.shape, np.uint8)

    def pack() -> object:
        scales = np.maximum(groups.max(axis=1), -groups.min(axis=1)) / np.float32(half - 1)
        np.multiply(groups, (1 / scales)[:, None], out=steps)
        np.rint(steps, out=steps)
        np.add(steps, half, out=steps)
        np.copyto(codes, steps, casting="unsafe")
        if bits == 8:
            return codes, scales
        pairs = codes.reshape(-1, 2)
        return pairs[:, 0] | (pairs[:, 1] << 4), scales

    return pack


def int4_caster(x: NDArray[np.float32], group_size: int) -> Callable[[], object]:
    """The same with ml_dtypes' int4 as the code type: one byte an element, the cast is its own."""
    import ml_dtypes

    groups = x.reshape(-1, group_size)
    steps = np.empty_like(groups)

    def cast() -> object:
        scales = np.maximum(groups.max(axis=1), -groups.min(axis=1)) / np.float32(7)
        np.multiply(groups, (1 / scales)[:, None], out=steps)
        np.rint(steps, out=steps)
        return steps.astype(ml_dtypes.int4), scales

    return cast
