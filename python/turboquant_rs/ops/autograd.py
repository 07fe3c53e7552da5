"""Gradients: matmul has those of its activations and bias, fake_quantize straight-through ones (Bengio et al.
2013) and those of LSQ (Esser et al. 2020) in given scales, inject_noise exact ones.

Quantizing gives integers, which have none, like `argmax`: its results do not require grad. Dequantizing is
differentiable in the scales in principle; here it refuses rather than ignore them.

Forward mode (`torch.func.jvp`, dual numbers) has the same derivatives, in activations and bias; a tangent of
anything else is refused, as PyTorch would drop it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from turboquant_rs.ops.schema import LIBRARY, OPS, OUT_OPS, count_writes, panels_nbytes, written_by
from turboquant_rs.ops.tiles import from_tiles, prefix_of

Tangent = Callable[[Any, tuple[Any, ...], Mapping[int, Tensor]], Tensor]
"""The tangent of the first result, from all results, the arguments, and the tangents of some, by position."""

LEVEL = 0
"""Of dual numbers: PyTorch has one, which transforms share."""

_make_dual: Any = forward_ad.make_dual  # untyped in torch
_unpack_dual: Any = forward_ad.unpack_dual


def _register(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    tangent: Tangent | None = None,
    differentiable: tuple[int, ...] = (),
) -> None:
    """`torch.library.register_autograd`, and the forward mode that it leaves out.

    differentiable: positions of the arguments whose tangents `tangent` knows.
    """
    operator = getattr(OPS, name).default
    arguments = [argument.name for argument in operator._schema.arguments]
    reverse = make_autograd_impl(operator, Info(backward, setup_context))

    def kernel(keyset: Any, *args: Any) -> Any:
        found = _duals(args) if _dual_level() else None
        if not found:
            return reverse(keyset, *args)
        _require_derivative(name, arguments, found, differentiable)
        assert tangent is not None  # as something is differentiable
        primals = tuple(found[at].primal if at in found else value for at, value in enumerate(args))
        results = operator(*primals)
        own = tangent(results, primals, {at: dual.tangent for at, dual in found.items()})
        if isinstance(results, Tensor):
            return _make_dual(results, own.to(results.dtype), level=LEVEL)
        return _make_dual(results[0], own.to(results[0].dtype), level=LEVEL), *results[1:]

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _register_out(name: str) -> None:
    """An operator that fills its last arguments: those have no derivative, as PyTorch's `out=`."""
    operator = getattr(OPS, name).default
    arguments = [argument.name for argument in operator._schema.arguments]
    written = written_by(name)

    def kernel(keyset: Any, *args: Any) -> None:
        if _dual_level():
            _require_derivative(name, arguments, _duals(args), ())
        with torch._C._AutoDispatchBelowAutograd():
            operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        count_writes(args, written)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _require_derivative(
    name: str, arguments: Sequence[str], found: Mapping[int, Any], known: Sequence[int]
) -> None:
    """Refuses tangents of other arguments than those known, and what compiled code would drop."""
    if refused := [arguments[at] for at in found if at not in known]:
        raise NotImplementedError(
            f"{name} has no forward-mode derivative in {', '.join(refused)}; detach it, or multiply by "
            "the packed weight with matmul, which has one in x and bias"
        )
    if found and torch.compiler.is_compiling() and maybe_current_level() is None:
        raise NotImplementedError(
            f"{name} has no derivative in dual numbers that compiled code makes; use torch.func.jvp, or "
            "make them around the compiled function"
        )


def _dual_level() -> bool:
    """Whether there may be dual numbers. Code that was compiled enters a transform without a word to
    `forward_ad`."""
    return bool(forward_ad._current_level >= 0 or maybe_current_level() is not None)


def _duals(args: Sequence[Any]) -> dict[int, Any]:
    """The arguments that have a tangent, each with it, by position."""
    floats = (
        (at, _unpack_dual(value, level=LEVEL))
        for at, value in enumerate(args)
        if isinstance(value, Tensor) and value.is_floating_point()
    )
    return {at: dual for at, dual in floats if dual.tangent is not None}


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
    _register(_name, _refuse(_name), _end_graph)
for _name in ("unpack", "dequantize"):
    _register(_name, _refuse(_name))
for _name in OUT_OPS:
    _register_out(_name)


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


def _product_tangent(args: tuple[Any, ...], tangents: Mapping[int, Tensor], read_bits: int) -> Tensor:
    """That of x times the dequantized weight: rounding x to int8 counts as the identity, as backward."""
    x, *stored, _bias = args[:5]
    of_x, of_bias = tangents.get(0), tangents.get(4)
    if of_x is None:
        return tangents[4].expand(*x.shape[:-1], args[-1])
    product: Tensor = OPS.matmul.default(of_x, *stored, of_bias, *args[5:21], read_bits, "float", *args[-2:])
    return product


def _matmul_tangent(y: Tensor, args: tuple[Any, ...], tangents: Mapping[int, Tensor]) -> Tensor:
    return _product_tangent(args, tangents, args[21])


def _matmul_refined_tangent(
    results: tuple[Tensor, Tensor], args: tuple[Any, ...], tangents: Mapping[int, Tensor]
) -> Tensor:
    """Each row's with the weight at the bits that the row has read."""
    low, high = (_product_tangent(args, tangents, bits) for bits in args[21:23])
    return torch.where(results[1].unsqueeze(-1), high, low)


_X_AND_BIAS = (0, 4)
_register("matmul", _matmul_backward, _keep_weight, _matmul_tangent, _X_AND_BIAS)
_register(
    "matmul_refined", _matmul_refined_backward, _keep_weight_and_rows, _matmul_refined_tangent, _X_AND_BIAS
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


def _fake_quantize_tangent(
    results: tuple[Tensor, ...], args: tuple[Any, ...], tangents: Mapping[int, Tensor]
) -> Tensor:
    """What passes backward passes forward: an element's derivative is 1 or 0."""
    x, _scales, _zero_points, *scheme_and_rounding, read_bits = args
    tangent = tangents[0].to(x.dtype)
    if scheme_and_rounding[7] != "nearest":
        return tangent
    stored, scheme = (x, *results[1:]), scheme_and_rounding[:7]
    passed: Tensor = OPS.fake_quantize_backward.default(tangent, *stored, *scheme, read_bits)[0]
    return passed


_register("fake_quantize", _fake_quantize_backward, _keep_codes, _fake_quantize_tangent, (0,))


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


def _inject_noise_tangent(y: Tensor, args: tuple[Any, ...], tangents: Mapping[int, Tensor]) -> Tensor:
    if args[3]:
        raise NotImplementedError(
            'inject_noise has forward-mode derivatives with preserve="mean" only; detach x, or use "mean"'
        )
    return tangents[0]


_register("inject_noise", _inject_noise_backward, _keep_draws, _inject_noise_tangent, (0,))
