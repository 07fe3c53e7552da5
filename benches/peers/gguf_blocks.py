"""gguf-py, the Python side of llama.cpp's file format: blocks of 32 with an f16 scale (4.5 and 8.5 bits)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType, dequantize, quantize
from numpy.typing import NDArray

KINDS = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}


def packer(x: NDArray[np.float32], bits: int) -> Callable[[], object]:
    """Q4_0 or Q8_0 of x: (m, k)."""
    return lambda: quantize(x, KINDS[bits])


def unpacker(x: NDArray[np.float32], bits: int) -> Callable[[], object]:
    """Back to f32."""
    blocks = quantize(x, KINDS[bits])
    return lambda: dequantize(blocks, KINDS[bits])
