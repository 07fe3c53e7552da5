"""What each peer of the matmul contest hands to `linear.py`: layers of one product, memory of their own each.

The peers are no dependencies of this project: each imports its library when its first layer is asked for, and
an error there is the reason that the record gives for its absence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """x @ Wᵀ by one library.

    bind: takes x: (m, k) f32 over into the library's own type and memory and returns the call to time, which
        returns y: (m, n), a tensor or an array.
    nbytes: what a call reads of the weight: codes, scales, zero points.
    """

    bind: Callable[[Tensor], Call]
    nbytes: int


@dataclass(frozen=True)
class Contender:
    """One way to multiply.

    kind: bits of weights and activations and the groups; nf4's blocks of 64 go with the groups of 128.
    layers: gives layers of weight: (n, k) f32, to be called with so many threads, for as long as one asks.
    max_error: relative to the product of the floats; a result farther away is refused.
    """

    name: str
    kind: str
    layers: Callable[[Tensor, int], Iterator[Layer]]
    max_error: float = 0.2


@cache
def output(m: int, n: int) -> NDArray[np.float32]:
    """Memory for y, touched; one for all layers, as a model would reuse it."""
    return np.zeros((m, n), np.float32)


def signed(codes: Tensor) -> Tensor:
    """u8 codes about 128 as int8 about 0."""
    return codes.bitwise_xor(0x80).view(torch.int8)
