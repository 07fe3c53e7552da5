"""Gradients: matmul has those of its activations and bias.

Quantizing gives integers, which have none, like `argmax`: its results do not require grad. Dequantizing is
differentiable in the scales in principle; here it refuses rather than ignore them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import register_autograd

from turboquant_rs.ops.schema import LIBRARY, NAMESPACE, OPS
from turboquant_rs.ops.tiles import from_tiles, prefix_of


def _end_graph(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


def _refuse(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{name} has no gradient in the scales; detach them, or multiply by the packed weight with "
            "matmul, which is differentiable in x and bias"
        )

    return backward


for _name in ("pack", "quantize", "to_panels", "from_panels"):
    register_autograd(f"{NAMESPACE}::{_name}", _refuse(_name), setup_context=_end_graph, lib=LIBRARY)
for _name in ("unpack", "dequantize"):
    register_autograd(f"{NAMESPACE}::{_name}", _refuse(_name), lib=LIBRARY)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zero_points, bias, *args = inputs
    *ctx.args, _activations, ctx.layout, ctx.n = args
    ctx.x_shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype
    ctx.save_for_backward(packed, scales, zero_points)


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d/dx = grad @ Ŵ with the dequantized weight; d/dbias = grad summed over the rows."""
    packed, scales, zero_points = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        shape = (ctx.n, ctx.x_shape[-1])
        if ctx.layout == "panels":
            scheme, planes = ctx.args[:7], ctx.args[15]
            stored = OPS.from_panels.default(packed, scales, zero_points, *scheme, planes, *shape)
            packed, scales, zero_points = stored
        elif ctx.layout == "tiles":
            planes = prefix_of(*ctx.args[15:])
            packed, scales, zero_points = from_tiles(packed, scales, zero_points, planes, *shape)
        weight = OPS.unpack.default(packed, scales, zero_points, *ctx.args, shape, grad.dtype)
        grad_x = grad @ weight
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, *[None] * (len(ctx.args) + 3)


register_autograd(f"{NAMESPACE}::matmul", _matmul_backward, setup_context=_keep_weight, lib=LIBRARY)
