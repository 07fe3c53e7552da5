"""What this installation can do here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from turboquant_rs import ops

__all__ = ["info"]

_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def info() -> dict[str, Any]:
    """The instruction sets, threads, versions and CUDA state, as JSON knows them.

    Keys: `isa` (in use), `isas` (this CPU has, best first), `compiled_isas` (of this build), `threads` (as
    torch.get_num_threads()), `thread_pool` ("torch": PyTorch's own, or "own"), `versions`, `cuda`
    (`available`, `device`, `cupy`, `reason`).
    """
    return {
        "isa": ops.cpu.active_isa(),
        "isas": list(ops.cpu.available_isas()),
        "compiled_isas": list(ops.cpu.compiled_isas()),
        "threads": torch.get_num_threads(),
        "thread_pool": "torch" if ops.cpu.shares_threads else "own",
        "versions": {
            "turboquant_rs": ops.cpu.version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": importlib.metadata.version("numpy"),
            "safetensors": _version("safetensors"),
        },
        "cuda": _cuda(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    """Whether a GPU can be used; CuPy is looked for, not imported."""
    cupy = next((version for name in _CUPY if (version := _version(name)) is not None), None)
    available = torch.cuda.is_available()
    reason = None
    if not available:
        reason = "torch finds no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
    elif importlib.util.find_spec("cupy") is None:
        major = (torch.version.cuda or "13").partition(".")[0]
        reason = f"CuPy is not installed; pip install 'turboquant-rs[cuda{major}]'"
    device = torch.cuda.get_device_name() if available else None
    return {"available": available, "device": device, "cupy": cupy, "reason": reason}
