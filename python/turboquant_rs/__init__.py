"""Quantization of PyTorch tensors and models, at the speed of the hardware.

>>> import torch, turboquant_rs as tq
>>> packed = tq.pack(torch.randn(8, 64), bits=4)
>>> tq.matmul(torch.randn(2, 64), packed).shape
torch.Size([2, 8])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turboquant_rs import nn
from turboquant_rs.errors import BackendUnavailable, NoLayersMatched, QuantizationFormatError
from turboquant_rs.formats.store import load, save
from turboquant_rs.info import info
from turboquant_rs.nn import bench, dequantize_, quantize_
from turboquant_rs.ops.cpu import version
from turboquant_rs.packed import PackedTensor, matmul, pack, unpack
from turboquant_rs.precision import (
    SLO,
    Budget,
    Categorical,
    Event,
    Gaussian,
    History,
    PhasedPlan,
    Phases,
    Plan,
    PrecisionController,
    Quality,
    Refinement,
    Sensitivity,
    allocate,
    precision,
    refine,
    sensitivity,
    set_precision,
)
from turboquant_rs.report import Report
from turboquant_rs.scheme import Rounding, Scheme

if TYPE_CHECKING:
    from turboquant_rs.qat import QAT, PrecisionSchedule, fake_quantize, inject_noise
    from turboquant_rs.qat.sandwich import sandwich  # mypy takes that of the room for the file
else:

    def __getattr__(name: str) -> Any:
        """Training, imported when it is asked for: it brings PyTorch's compiler, a second of import."""
        from importlib import import_module

        if name == "qat" or name in ("QAT", "PrecisionSchedule", "fake_quantize", "inject_noise", "sandwich"):
            room = import_module("turboquant_rs.qat")
            found = globals()[name] = room if name == "qat" else getattr(room, name)
            return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = version()

__all__ = [
    "QAT",
    "SLO",
    "BackendUnavailable",
    "Budget",
    "Categorical",
    "Event",
    "Gaussian",
    "History",
    "NoLayersMatched",
    "PackedTensor",
    "PhasedPlan",
    "Phases",
    "Plan",
    "PrecisionController",
    "PrecisionSchedule",
    "Quality",
    "QuantizationFormatError",
    "Refinement",
    "Report",
    "Rounding",
    "Scheme",
    "Sensitivity",
    "__version__",
    "allocate",
    "bench",
    "dequantize_",
    "fake_quantize",
    "info",
    "inject_noise",
    "load",
    "matmul",
    "nn",
    "pack",
    "precision",
    "quantize_",
    "refine",
    "sandwich",
    "save",
    "sensitivity",
    "set_precision",
    "unpack",
]
