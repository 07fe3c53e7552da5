"""When an operator may be called past PyTorch's dispatcher, where small layers spend most of their time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.nn import Parameter


def transformed() -> bool:
    """Whether tensors made in this thread now may be those of a mode, a trace or a transform, which end."""
    return bool(
        _len_torch_dispatch_stack() or _get_tracing_state() is not None or maybe_current_level() is not None
    )


def readable(*tensors: Tensor) -> bool:
    """Whether the values of these can be looked at, on a GPU by waiting for them: not in what is compiled,
    traced or transformed, nor while a graph is captured."""
    if torch.compiler.is_compiling() or transformed():
        return False
    if any(type(tensor) not in (Tensor, Parameter) or tensor.is_meta for tensor in tensors):
        return False
    return not (any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing())


def observed() -> bool:
    """Whether anything in this thread wants to see the calls of operators."""
    return bool(
        transformed()
        or _len_torch_function_stack()
        or _is_any_autocast_enabled()
        or _profiler_enabled()
        or forward_ad._current_level >= 0
    )


def unseen(*tensors: Tensor) -> bool:
    """Whether nobody sees a call with these: plain tensors, whose values lie in memory, none that asks for a
    gradient."""
    if torch.compiler.is_compiling() or observed():
        return False
    graded = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in (Tensor, Parameter) or tensor.is_neg() or tensor._is_zerotensor():
            return False
        if graded and tensor.requires_grad:
            return False
    return True
