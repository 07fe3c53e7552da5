"""Forward-mode derivatives (dual numbers, `torch.func.jvp`): those of backward, or refused; never dropped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import turboquant_rs as tq
from turboquant_rs import Rounding, Scheme, ops
from turboquant_rs.nn import QuantEmbedding, QuantLinear

# PyTorch's own, when it first transforms something.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")

NEAREST = Rounding.nearest()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tangent(function: Callable[..., Tensor], *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """By `torch.func.jvp`, which dual numbers give too."""
    primals, tangents = zip(*pairs, strict=True)
    y, found = torch.func.jvp(function, primals, tangents)
    assert torch.equal(y, function(*primals))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(*(forward_ad.make_dual(*pair) for pair in pairs)))
    assert torch.equal(dual.primal, y) and torch.equal(dual.tangent, found)
    return found


@pytest.mark.parametrize("layout", ["canonical", "panels"])
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_the_tangent_of_a_product_is_the_product_of_the_tangent(activations: str, layout: str) -> None:
    """With the dequantized weight at the bits that are read, as backward."""
    scheme, (x, t), (bias, of_bias) = Scheme.nested(group_size=32), normal(2, 3, 96), normal(2, 5)
    args = (*scheme.op_args(), *NEAREST.op_args())
    stored = ops.pack(normal(5, 96, seed=1), *args, scheme.widths, False)
    weight = ops.unpack(*stored, *args, scheme.widths, 4, (5, 96), torch.float32)
    if layout == "panels":
        stored = ops.to_panels(*stored, *scheme.op_args(), scheme.widths, 96)

    def product(x: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = ops.matmul(x, *stored, bias, *args, scheme.widths, 4, activations, layout, 5)
        return y

    found = tangent(product, (x, t), (bias, of_bias))
    torch.testing.assert_close(found, t @ weight.T + of_bias)
    torch.testing.assert_close(tangent(lambda x: product(x, bias), (x, t)), t @ weight.T)
    assert torch.equal(tangent(lambda bias: product(x, bias), (bias, of_bias)), of_bias.expand(3, 5))
    # Backward is its transpose.
    grad = normal(3, 5, seed=2)
    back = torch.autograd.grad(product(x.requires_grad_(), bias), x, grad)[0]
    torch.testing.assert_close((back * t).sum(), (grad * (t @ weight.T)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_a_layer_has_tangents_before_and_after_its_weight_is_arranged(
    activations: str, dtype: torch.dtype
) -> None:
    """And its parameters require a gradient meanwhile."""
    layer = QuantLinear(70, 9, activations=activations, dtype=dtype)
    x, t = normal(2, 3, 70).to(dtype)
    expected = t.float() @ layer.packed.dequantize(dtype=torch.float32).T

    def check() -> None:
        with torch.enable_grad():
            y, found = torch.func.jvp(layer, (x,), (t,))
        assert torch.equal(y, layer(x)) and found.dtype == dtype
        torch.testing.assert_close(found.detach().float(), expected, rtol=0.02, atol=0.02)

    with torch.no_grad():
        check()
        assert torch.equal(layer(x), layer(x)) and layer._panels is not None
        check()


def test_each_row_has_the_tangent_of_the_bits_that_it_has_read() -> None:
    scheme, x, t = Scheme.nested(group_size=32), normal(6, 64), normal(6, 64, seed=1)
    x[::2] *= 100
    args = (*scheme.op_args(), *NEAREST.op_args())
    stored = ops.pack(normal(5, 64, seed=2), *args, scheme.widths, False)

    def product(x: Tensor) -> Tensor:
        tail = (scheme.widths, 4, 8, 0.2, "canonical", 5)
        y: Tensor = ops.matmul_refined(x, *stored, None, *args, *tail)[0]
        return y

    found = tangent(product, (x, t))
    for rows, bits in ((slice(0, None, 2), 8), (slice(1, None, 2), 4)):
        weight = ops.unpack(*stored, *args, scheme.widths, bits, (5, 64), torch.float32)
        torch.testing.assert_close(found[rows], t[rows] @ weight.T)


def test_second_derivatives_of_a_loss_behind_a_product() -> None:
    """Backward through the tangent: of Σ y³ they are 6 · Ŵᵀ diag(y) Ŵ t."""
    p, x, t = tq.pack(normal(5, 64, seed=1)), normal(64), normal(64, seed=2)
    weight = p.dequantize()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), t)
        slope = forward_ad.unpack_dual(tq.matmul(dual, p, activations="float").pow(3).sum()).tangent
        (found,) = torch.autograd.grad(slope, x)
    with torch.no_grad():
        expected = 6 * weight.T @ ((weight @ x) * (weight @ t))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("rounding", [NEAREST, Rounding.stochastic(1)])
def test_values_that_pass_straight_through_backward_do_so_forward(rounding: Rounding) -> None:
    scheme, x, t = Scheme(bits=3, group_size=32), normal(4, 96), normal(4, 96, seed=1)

    def quantized(x: Tensor) -> Tensor:
        y: Tensor = ops.fake_quantize(x, None, None, *scheme.op_args(), *rounding.op_args(), 3)[0]
        return y

    found = tangent(quantized, (x, t))
    (back,) = torch.autograd.grad(quantized(x.requires_grad_()), x, t)  # a diagonal is its own transpose
    assert torch.equal(found, back)
    if rounding is not NEAREST:
        assert torch.equal(found, t)


def test_noise_passes_tangents_on() -> None:
    x, t, draws = normal(4, 96), normal(4, 96, seed=1), Rounding.stochastic(1).op_args()
    widths = torch.ones(4, 3)
    assert torch.equal(tangent(lambda x: ops.inject_noise(x, widths, 32, False, *draws), (x, t)), t)
    with pytest.raises(NotImplementedError, match=r'preserve="mean" only; detach x, or use "mean"'):
        tangent(lambda x: ops.inject_noise(x, widths, 32, True, *draws), (x, t))
    with pytest.raises(NotImplementedError, match="inject_noise has no forward-mode derivative in widths"):
        tangent(lambda widths: ops.inject_noise(x, widths, 32, False, *draws), (widths, widths))


def test_what_has_no_derivative_is_refused_by_name() -> None:
    x, scheme = normal(4, 64), Scheme()
    args = (*scheme.op_args(), *NEAREST.op_args())
    packed, scales, none = ops.pack(x, *args, scheme.widths, False)
    fields = (scheme.widths, 4)
    for name, argument, function, given in (
        ("pack", "x", lambda x: tq.pack(x).dequantize(), x),
        ("quantize", "x", lambda x: ops.quantize(x, *args, False)[1].float(), x),
        ("fake_quantize", "scales", lambda s: ops.fake_quantize(x, s, None, *args, 4)[0], scales.float()),
        ("unpack", "scales", lambda s: ops.unpack(packed, s, none, *args, *fields, [4, 64], x.dtype), scales),
        ("matmul", "scales", lambda s: product(x, s), scales),
    ):

        def product(x: Tensor, scales: Tensor) -> Tensor:
            y: Tensor = ops.matmul(x, packed, scales, none, None, *args, *fields, "int8", "canonical", 4)
            return y

        message = f"{name} has no forward-mode derivative in {argument}; detach it"
        with pytest.raises(NotImplementedError, match=message):
            tangent(function, (given, torch.ones_like(given)))


def test_what_has_no_tangent_is_left_alone() -> None:
    """Beside dual numbers: constants are packed, multiplied, looked up."""
    table = QuantEmbedding.from_float(nn.Embedding.from_pretrained(normal(20, 64)))
    x = normal(3, 64)

    def forward(scale: Tensor) -> Tensor:
        p = tq.pack(x)
        return scale * (tq.matmul(x, p).sum() + table(torch.arange(3)).sum() + p.dequantize().sum())

    one = torch.tensor(1.0)
    assert torch.equal(tangent(forward, (one, one)), forward(one))


def test_compiled_code_has_the_tangents_of_eager_code() -> None:
    """It begins a transform, and dual numbers, without a word to Python's part of them."""
    p, x, t = tq.pack(normal(5, 64, seed=1)), normal(3, 64), normal(3, 64, seed=2)

    def product(x: Tensor) -> Tensor:
        return tq.matmul(x, p, activations="float") + x[:, :5]

    def transformed(x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(product, (x,), (t,))[1]
        return found

    def dual(x: Tensor, t: Tensor) -> Tensor:
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(product(forward_ad.make_dual(x, t))).tangent
        assert found is not None
        return found

    expected = t @ p.dequantize().T + t[:, :5]
    torch._dynamo.reset()
    for function in (transformed, dual):
        torch.testing.assert_close(torch.compile(function, backend="eager")(x, t), expected)
    compiled = torch.compile(product, backend="eager")
    torch.testing.assert_close(transformed(x, t), expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(found, expected)


def test_memory_that_is_filled_has_no_tangent() -> None:
    """Neither do operators drop that of what they read, nor leave an old one where they have written."""
    p, x, out = tq.pack(normal(4, 64)), normal(4, 64, seed=1), torch.empty(4, 4)
    tail = (*p._op_args(), 4, "float", "canonical", 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="pack_out has no forward-mode derivative in x; detach"):
            tq.pack(dual, out=p)
        with pytest.raises(NotImplementedError, match="matmul_out has no forward-mode derivative in x; de"):
            ops.matmul_out(dual, *p._stored, None, *tail, out)
        with pytest.raises(NotImplementedError, match="matmul_out has no forward-mode derivative in out; de"):
            ops.matmul_out(x, *p._stored, None, *tail, forward_ad.make_dual(out, out))
        ops.matmul_out(x, *p._stored, None, *tail, out)
    assert torch.equal(out, tq.matmul(x, p, activations="float"))
