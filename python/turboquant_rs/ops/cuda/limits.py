"""What the shape of a launch depends on of a device."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from turboquant_rs.ops.cuda.compiler import cupy

__all__ = ["Limits", "limits_of"]

MAX_SHARED = 97
"""cudaDevAttrMaxSharedMemoryPerBlockOptin of driver_types.h."""


class Limits(NamedTuple):
    """Of a device, or of one that kernels are compiled for without it."""

    processors: int
    shared: int  # bytes a block may have
    capability: tuple[int, int]

    @property
    def tensor_cores(self) -> bool:
        """Whether the matrix unit takes bfloat16, and 32 columns of int8."""
        return self.capability >= (8, 0)

    @property
    def clusters(self) -> bool:
        """Whether blocks can share memory."""
        return self.capability >= (9, 0)

    @property
    def hopper(self) -> bool:
        """Whether it has the instructions that are Hopper's alone."""
        return self.capability == (9, 0)


@cache
def limits_of(device: int) -> Limits:
    """Those of a device, by its index."""
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", None)  # not in every torch
    if shared is None:
        shared = cupy().runtime.deviceGetAttribute(MAX_SHARED, device)
    return Limits(found.multi_processor_count, shared, (found.major, found.minor))
