"""The machine itself: copies and reads of as many bytes as a job must move."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from turboquant_rs.ops import cpu


def plain_copy(moved: int) -> Callable[[], object]:
    """`copy_` of half of `moved` bytes, so that reads and writes make `moved`."""
    source = torch.full((moved // 2,), 7, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def streaming_copy(moved: int) -> Callable[[], object]:
    """The same by the core, with stores that go past the caches."""
    source = np.full(moved // 2, 7, np.uint8)
    target = np.zeros_like(source)
    return lambda: cpu.copy_bandwidth(source, target, torch.get_num_threads())


def plain_read(moved: int) -> Callable[[], object]:
    """The core reads `moved` bytes and writes nothing."""
    source = np.full(moved, 7, np.uint8)
    return lambda: cpu.read_bandwidth(source, torch.get_num_threads())
