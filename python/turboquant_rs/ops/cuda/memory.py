"""New memory on a GPU, past the dispatcher, which takes longer than the allocator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turboquant_rs.ops.cuda.launcher import ready

__all__ = ["new", "new_bytes", "new_on", "row_major"]


def _new(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(sizes, strides, dtype=dtype, device="cuda")


new: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _new)
"""A tensor of these sizes, strides and dtype on the current device, as compiled code allocates it. Whether
that is the right device has been asked before (`launcher.ready`)."""


def new_on(x: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One on the device of x."""
    if ready(x.get_device()):
        return new(sizes, row_major(sizes), dtype)  # type: ignore[no-any-return]  # torch leaves it untyped
    return x.new_empty(sizes, dtype=dtype)


def new_bytes(count: int, device: int) -> Tensor:
    """So many bytes on a device."""
    if ready(device):
        return new((count,), (1,), torch.uint8)  # type: ignore[no-any-return]  # torch leaves it untyped
    return torch.empty(count, dtype=torch.uint8, device=torch.device("cuda", device))


def row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of memory without gaps."""
    strides, stride = [], 1
    for size in reversed(sizes):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))
