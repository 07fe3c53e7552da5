"""The `backend` fixture: every implementation of the operators.

A test that takes `backend` runs on the specification, on each instruction set of the CPU backend and on CUDA;
one that takes `compiled` runs on all but the specification, to be compared with it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
import torch.compiler.config

from backends import Backend, Specification
from turboquant_rs import ops

# Garbage is collected before a CUDA graph is captured. In the middle of it, as Python may do, graphs that
# earlier tests have left in cycles would be destroyed, which ends the capture (pytorch/pytorch#161037).
torch.compiler.config.force_cudagraph_gc = True

ISAS = ("scalar", "neon") if platform.machine() in ("aarch64", "arm64") else ("scalar", "avx2", "avx512")
COMPILED = (*(f"cpu:{isa}" for isa in ISAS), "cuda")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors here are small: waking threads, torch's or ours, would cost more than the work. Tests of
    threads set their number themselves."""
    torch.set_num_threads(1)


def _backend(name: str) -> Iterator[Backend]:
    kind, _, isa = name.partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield Backend(name, "cuda")
    elif kind == "cpu":
        if isa not in ops.cpu.available_isas():
            pytest.skip(f"this CPU has {', '.join(ops.cpu.available_isas())}, not {isa}")
        ops.cpu.force_isa(isa)
        try:
            yield Backend(name)
        finally:
            ops.cpu.force_isa(None)
    else:
        yield Backend(name)


@pytest.fixture(params=("reference", *COMPILED))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn."""
    yield from _backend(request.param)


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn, except the specification itself."""
    yield from _backend(request.param)


@pytest.fixture(scope="session")
def reference() -> Backend:
    """The specification."""
    return Specification()


@pytest.fixture(scope="session")
def fast() -> Backend:
    """The CPU backend with the instruction set it chose: for statistics, which need many draws. That the
    others give the same codes is proved in test_bit_identity.py."""
    return Backend("cpu")
