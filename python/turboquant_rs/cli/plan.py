"""`turboquant-rs plan`: scores a causal language model on a text, and says how many bits each layer gets.

transformers loads the model and cuts the text into tokens; no other verb needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turboquant_rs.errors import BackendUnavailable
from turboquant_rs.precision import Budget, PhasedPlan, Phases, Plan, allocate, sensitivity
from turboquant_rs.quality import windows
from turboquant_rs.scheme import Scheme

__all__ = ["Request", "run"]


@dataclass(frozen=True)
class Request:
    """What is asked for: see `tq.sensitivity` and `tq.allocate`; `count` windows of `length` tokens count."""

    budget: Budget
    scheme: Scheme
    choices: Sequence[int]
    score: str
    tie: Sequence[str]
    floor: int
    ceiling: int
    refine: int
    count: int
    length: int
    phases: Phases | None = None


def run(folder: Path, text: Path, request: Request) -> Plan | PhasedPlan:
    """The plan for the model in `folder`, scored on the UTF-8 text.

    Raises BackendUnavailable without transformers; OSError where a file cannot be read; ValueError for a text
    that is too short, and what scoring and allocation raise.
    """
    model, tokenizer = _load(folder)
    batches = list(_tokens(tokenizer, text.read_text(encoding="utf-8"), request).unsqueeze(1))
    options: dict[str, Any] = {"choices": request.choices, "scheme": request.scheme, "score": request.score}
    bounds: dict[str, Any] = {"tie": request.tie, "floor": request.floor, "ceiling": request.ceiling}
    bounds |= {"refine": request.refine, "model": model, "batches": batches}
    if request.phases is None:
        found = sensitivity(model, batches, intervals=None, **options)
        return allocate(found, request.budget, **bounds)
    phased = sensitivity(model, batches, intervals=request.phases, **options)
    return allocate(phased, request.budget, **bounds)


def _load(folder: Path) -> tuple[nn.Module, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no directory with a model; give one that transformers can load")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise BackendUnavailable(
            "plan loads models with transformers, which is not installed; pip install 'turboquant-rs[hf]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _tokens(tokenizer: Any, text: str, request: Request) -> Tensor:
    """(windows, length): as many as the text has, up to `count`."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return windows(ids, max(1, min(request.count, len(ids) // request.length)), request.length)
