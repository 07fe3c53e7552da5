"""Gradients: matmul has those of its activations and bias, fake_quantize straight-through ones (Bengio et al.
2013) and those of LSQ (Esser et al. 2020) in given scales, inject_noise exact ones.

Quantizing gives integers, which have none, like `argmax`: its results do not require grad. Dequantizing is
differentiable in the scales in principle; here it refuses rather than ignore them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd

from turboquant_rs.ops.schema import LIBRARY, NAMESPACE, OPS, panels_nbytes
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


for _name in ("pack", "encode", "quantize", "to_panels", "from_panels", "fake_quantize_backward"):
    register_autograd(f"{NAMESPACE}::{_name}", _refuse(_name), setup_context=_end_graph, lib=LIBRARY)
for _name in ("unpack", "dequantize"):
    register_autograd(f"{NAMESPACE}::{_name}", _refuse(_name), lib=LIBRARY)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zero_points, bias, *args = inputs
    *ctx.args, _activations, ctx.layout, ctx.n = args
    ctx.x_shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype
    ctx.save_for_backward(packed, scales, zero_points)


def _weight(ctx: Any, stored: tuple[Tensor, ...], read_bits: int, dtype: torch.dtype) -> Tensor:
    """The dequantized weight (n, k), read at that many bits."""
    shape, scheme = (ctx.n, ctx.x_shape[-1]), ctx.args[:7]
    if ctx.layout != "canonical":
        packed, scales, zero_points = stored
        read = list(prefix_of(ctx.args[15], read_bits))
        if ctx.layout == "tiles":
            stored = from_tiles(packed, scales, zero_points, read, *shape)
        else:
            packed = packed[: panels_nbytes(*shape, scheme[1], read)]
            stored = OPS.from_panels.default(packed, scales, zero_points, *scheme, read, *shape)
    weight: Tensor = OPS.unpack.default(*stored, *ctx.args[:16], read_bits, shape, dtype)
    return weight


def _bias_gradient(ctx: Any, grad: Tensor) -> Tensor | None:
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d/dx = grad @ Ŵ with the dequantized weight; d/dbias = grad summed over the rows."""
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ _weight(ctx, ctx.saved_tensors, ctx.args[16], grad.dtype)
    return grad_x, None, None, None, _bias_gradient(ctx, grad), *[None] * (len(ctx.args) + 3)


def _keep_weight_and_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, packed, scales, zero_points, bias, *args = inputs
    *ctx.args, _threshold, ctx.layout, ctx.n = args
    ctx.x_shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(packed, scales, zero_points, output[1])


def _matmul_refined_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each row's d/dx with the weight at the bits that the row has read."""
    *stored, refined = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        low, high = (grad @ _weight(ctx, tuple(stored), bits, grad.dtype) for bits in ctx.args[16:18])
        grad_x = torch.where(refined.unsqueeze(-1), high, low)
    return grad_x, None, None, None, _bias_gradient(ctx, grad), *[None] * (len(ctx.args) + 3)


register_autograd(f"{NAMESPACE}::matmul", _matmul_backward, setup_context=_keep_weight, lib=LIBRARY)
register_autograd(
    f"{NAMESPACE}::matmul_refined",
    _matmul_refined_backward,
    setup_context=_keep_weight_and_rows,
    lib=LIBRARY,
)


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, given, _zero_points, *ctx.args = inputs
    _out, scales, zeros = output
    ctx.given_dtype = None if given is None else given.dtype
    ctx.mark_non_differentiable(scales, zeros)
    ctx.save_for_backward(x, scales, zeros)


def _fake_quantize_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Stochastic rounding never clips, so its gradient in x is that of the output."""
    x, scales, zero_points = ctx.saved_tensors
    *scheme_and_rounding, read_bits = ctx.args
    grad_x, grad_scales = grad, None
    if scheme_and_rounding[7] == "nearest":
        scheme = scheme_and_rounding[:7]
        stored = (x.detach(), scales, zero_points)
        found = OPS.fake_quantize_backward.default(grad.to(x.dtype), *stored, *scheme, read_bits)
        grad_x, grad_scales = found[0], found[1] if ctx.given_dtype is not None else None
    if grad_scales is not None:
        grad_scales = grad_scales.to(ctx.given_dtype)
    return grad_x, grad_scales, None, *[None] * len(ctx.args)


register_autograd(
    f"{NAMESPACE}::fake_quantize", _fake_quantize_backward, setup_context=_keep_codes, lib=LIBRARY
)


def _keep_draws(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, widths, ctx.group_size, ctx.preserve, *ctx.rounding = inputs
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.save_for_backward(widths)


def _inject_noise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d/dx = grad; d/dwidth = Σ grad · ξ over the group, with ξ drawn again."""
    (widths,) = ctx.saved_tensors
    grad_widths = None
    if ctx.preserve:
        raise RuntimeError(
            'inject_noise has gradients with preserve="mean" only: "mean+var" makes each element depend on '
            'all of its group; detach x, or use "mean"'
        )
    if ctx.needs_input_grad[1]:
        ones, zeros = torch.ones_like(widths), torch.zeros_like(grad, dtype=torch.float32)
        noise = OPS.inject_noise.default(zeros, ones, ctx.group_size, False, *ctx.rounding)
        groups = widths.shape[-1] if widths.dim() else 1
        size = ctx.group_size or max(grad.shape[-1], 1)
        terms = torch.nn.functional.pad(grad.float() * noise, (0, groups * size - grad.shape[-1]))
        grad_widths = terms.reshape(*grad.shape[:-1], groups, size).sum(-1)
    return grad, grad_widths, None, None, *[None] * len(ctx.rounding)


register_autograd(
    f"{NAMESPACE}::inject_noise", _inject_noise_backward, setup_context=_keep_draws, lib=LIBRARY
)
