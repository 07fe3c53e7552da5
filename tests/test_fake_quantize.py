"""fake_quantize, its gradients, encode and inject_noise: each backend against the rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import turboquant_rs as tq
from backends import Backend, assert_identical
from turboquant_rs import Rounding, Scheme, ops

SCHEMES = (
    Scheme(bits=4),
    Scheme(bits=2, group_size=32),
    Scheme(bits=1),
    Scheme(bits=3, group_size=24, symmetric=False),
    Scheme(bits=8, group_size=None, scale_dtype="f32"),
    Scheme(bits=4, levels="nf4", scale_dtype="f16"),
    Scheme(bits=2, levels=(-3.0, -1.0, 1.0, 3.0)),
    Scheme(bits=4, scale="mse"),
    Scheme.nested(),
)
SHAPES = ((3, 70), (2, 128), (1, 4500))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def numbers(x: Tensor, scheme: Scheme, factor: float) -> tuple[Tensor, Tensor]:
    """Scales of x times a factor, which clips below 1, and zero points."""
    _, scales, zero_points = ops.quantize(x, *scheme.op_args(), *Rounding.nearest().op_args(), False)
    return (scales.float() * factor).to(scales.dtype), zero_points


# Values


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_value_is_what_packing_and_unpacking_gives(backend: Backend, scheme: Scheme) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(*shape, dtype=dtype)
            stored = backend.quantize(x, scheme)
            value, scales, zero_points = backend.fake_quantize(x, scheme)
            assert_identical(value, backend.dequantize(stored, scheme, dtype=dtype), shape)
            assert_identical((scales, zero_points), stored[1:], shape)


@pytest.mark.parametrize("mode", ["iid", "systematic"])
def test_stochastic_values_have_the_codes_of_the_same_draws(backend: Backend, mode: str) -> None:
    scheme, rounding = Scheme(bits=4), Rounding.stochastic(5, step=3, stream="w", mode=mode)
    x = normal(4, 200)
    expected = backend.dequantize(backend.quantize(x, scheme, rounding), scheme, rounding)
    assert_identical(backend.fake_quantize(x, scheme, rounding)[0], expected)


@pytest.mark.parametrize("planes", [(4, 4), (2, 1, 1, 1, 1, 2)])
def test_a_prefix_is_what_reading_it_gives(backend: Backend, planes: tuple[int, ...]) -> None:
    scheme, x = Scheme.nested(planes=planes), normal(3, 130)
    stored = backend.pack(x, scheme)
    for bits in scheme.prefixes:
        value, _, _ = backend.fake_quantize(x, scheme, bits=bits)
        assert_identical(value, backend.unpack(stored, scheme, x.shape, bits=bits), bits)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_given_scales_encode_and_clip_as_specified(
    compiled: Backend, reference: Backend, scheme: Scheme
) -> None:
    for shape in SHAPES:
        for factor in (1.0, 0.6, 1e-30, 1e20):
            x = normal(*shape)
            if scheme.scale_dtype == "f16" and factor not in (1.0, 0.6):
                continue
            given = numbers(x, scheme, factor)
            assert_identical(
                compiled.fake_quantize(x, scheme, given=given),
                reference.fake_quantize(x, scheme, given=given),
            )
            assert_identical(compiled.encode(x, *given, scheme), reference.encode(x, *given, scheme))


def test_encoding_on_the_scales_that_were_chosen_changes_no_code(backend: Backend) -> None:
    for scheme in SCHEMES:
        x = normal(3, 100)
        packed, scales, zero_points = backend.pack(x, scheme)
        assert_identical(backend.encode(x, scales, zero_points, scheme), packed, scheme)


# Gradients


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_are_those_of_the_specification_bit_for_bit(
    compiled: Backend, reference: Backend, scheme: Scheme
) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x, grad = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
            for factor in (1.0, 0.5):
                args = (grad, x, *numbers(x, scheme, factor), scheme)
                assert_identical(
                    compiled.fake_quantize_backward(*args), reference.fake_quantize_backward(*args), dtype
                )


def test_the_gradient_of_a_scale_is_that_of_lsq_by_hand(backend: Backend) -> None:
    scheme = Scheme(bits=3, group_size=8, scale_dtype="f32")  # codes −4 … 3
    x = torch.tensor([[0.3, 1.25, -0.75, 9.0, -9.0, 3.25, -4.25, 0.0]])
    scales, zero_points = torch.tensor([[1.0]]), torch.empty(0, dtype=torch.uint8)
    grad = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]])
    grad_x, grad_scale = backend.fake_quantize_backward(grad, x, scales, zero_points, scheme)
    assert grad_x.tolist() == [[1.0, 2.0, 4.0, 0.0, 0.0, 32.0, 64.0, 128.0]]
    slopes = [0.0 - x[0, 0].item(), -0.25, -0.25, 3.0, -4.0, -0.25, 0.25, 0.0]
    expected = sum(g * s for g, s in zip(grad[0].tolist(), slopes, strict=True)) / math.sqrt(8 * 3)
    assert grad_scale.item() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_the_scale_is_the_slope_where_nothing_is_rounded_differently() -> None:
    """Against finite differences in f64: of s·Q(x / s), codes held, minus the straight-through part."""
    scheme, x = Scheme(bits=4, group_size=16, scale_dtype="f32"), normal(2, 32)
    scales = numbers(x, scheme, 0.7)[0].requires_grad_()
    weights = normal(2, 32, seed=2)
    (tq.fake_quantize(x, scheme, scales=scales) * weights).sum().backward()
    s = scales.detach().double().repeat_interleave(16, 1)
    v = x.double() / s
    inside = (v.round() >= -8) & (v.round() <= 7)
    slope = (weights.double() * (v.round().clamp(-8, 7) - torch.where(inside, v, 0.0))).view(2, 2, 16).sum(-1)
    torch.testing.assert_close(scales.grad.double(), slope / math.sqrt(16 * 7), rtol=1e-5, atol=1e-6)


def test_gradients_pass_straight_through_where_scales_are_chosen() -> None:
    x = normal(4, 64).requires_grad_()
    grad = normal(4, 64, seed=3)
    tq.fake_quantize(x, Scheme(bits=4), rounding="stochastic", seed=1).backward(grad)
    assert torch.equal(x.grad, grad)  # stochastic rounding clips nothing
    x.grad = None
    tq.fake_quantize(x, Scheme(bits=2)).backward(grad)
    assert 0 < int((x.grad == 0).sum()) < x.numel()
    assert torch.equal(x.grad[x.grad != 0], grad[x.grad != 0])


def test_gradients_that_are_not_finite_are_handed_on(backend: Backend) -> None:
    x, scheme = normal(1, 64), Scheme(bits=4, scale_dtype="f32")
    grad = torch.zeros(1, 64)
    grad[0, 5] = math.inf
    grad_x, grad_scales = backend.fake_quantize_backward(grad, x, *numbers(x, scheme, 1.0), scheme)
    assert grad_x[0, 5] == math.inf and not grad_scales.isfinite().any()


@pytest.mark.parametrize("threads", [2, 7])
def test_threads_do_not_matter(threads: int) -> None:
    x, grad = normal(700, 300), normal(700, 300, seed=1)
    scheme = Scheme(bits=3)

    def everything() -> list[Tensor]:
        given = numbers(x, scheme, 0.8)
        noise = tq.inject_noise(x, scheme, seed=1, preserve="mean+var")
        return [
            tq.fake_quantize(x, scheme),
            *ops.fake_quantize_backward(grad, x, *given, *scheme.op_args(), 3),
            noise,
        ]

    alone = everything()
    torch.set_num_threads(threads)
    try:
        for a, b in zip(everything(), alone, strict=True):
            assert_identical(a, b)
    finally:
        torch.set_num_threads(1)


# Noise


@pytest.mark.parametrize("preserve", [False, True])
def test_noise_is_that_of_the_specification(compiled: Backend, reference: Backend, preserve: bool) -> None:
    rounding = Rounding.stochastic(2**63 + 5, step=9, stream="layer.weight")
    for shape, size in (((3, 70), 32), ((2, 128), 64), ((1, 4500), 0), ((5, 24), 24)):
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(*shape, dtype=dtype)
            widths = torch.rand(shape[0], -(-shape[1] // (size or shape[1])))
            args = (x, widths, size, rounding, preserve)
            assert_identical(compiled.inject_noise(*args), reference.inject_noise(*args), shape)


def test_noise_of_a_slice_is_that_of_the_whole(backend: Backend) -> None:
    x, rounding = torch.zeros(6, 100), Rounding.stochastic(1)
    whole = backend.inject_noise(x, torch.ones(6, 2), 64, rounding)
    part = backend.inject_noise(x[2:], torch.ones(4, 2), 64, rounding, offset=200)
    assert_identical(part, whole[2:].contiguous())


def test_noise_is_uniform_of_the_quantizers_variance() -> None:
    n = 1 << 20
    x, scheme = torch.zeros(1, n), Scheme(bits=4, group_size=None, scale_dtype="f32")
    x[0, 0] = 8.0  # a step of 1
    noise = (tq.inject_noise(x, scheme, seed=3) - x)[0].double()
    assert float(noise.abs().max()) <= 0.5
    assert abs(float(noise.mean())) <= 5 * math.sqrt(1 / 12 / n)
    assert abs(float(noise.square().mean()) - 1 / 12) <= 5 * math.sqrt(1 / 180 / n)
    half = (tq.inject_noise(x, scheme, seed=3, variance=0.25) - x)[0].double()
    assert torch.allclose(half, noise / 2, atol=1e-6)
    others = [tq.inject_noise(x, scheme, seed=3, step=1), tq.inject_noise(x, scheme, seed=3, stream="w")]
    for other in (*others, tq.inject_noise(x, scheme, seed=4)):
        assert abs(float((noise * (other - x)[0].double()).mean()) * 12) <= 5 / math.sqrt(n)


def test_noise_may_keep_the_variance_of_each_group() -> None:
    x = normal(1, 1 << 16)
    scheme = Scheme(bits=2, group_size=None)
    added = tq.inject_noise(x, scheme, seed=1)
    kept = tq.inject_noise(x, scheme, seed=1, preserve="mean+var")
    assert float(added.var()) > 1.2 * float(x.var())
    assert float(kept.var()) == pytest.approx(float(x.var()), rel=0.02)
    assert float(kept.mean()) == pytest.approx(float(x.mean()), abs=0.01)


def test_gradients_of_noise_are_exact() -> None:
    x, widths = normal(2, 40).requires_grad_(), torch.rand(2, 2).requires_grad_()
    args = (32, False, *Rounding.stochastic(7).op_args())
    noise = ops.inject_noise(torch.zeros(2, 40), torch.ones(2, 2), *args)
    grad = normal(2, 40, seed=5)
    ops.inject_noise(x, widths, *args).backward(grad)
    assert torch.equal(x.grad, grad)
    expected = torch.stack([(grad * noise)[:, :32].sum(1), (grad * noise)[:, 32:].sum(1)], 1)
    torch.testing.assert_close(widths.grad, expected)


# Bad input


def test_bad_input_is_refused_with_the_numbers(backend: Backend) -> None:
    x, scheme = normal(2, 64), Scheme(bits=4)
    none = torch.empty(0, dtype=torch.uint8)
    scales = torch.ones(2, 1, dtype=torch.bfloat16)
    for bad, message in (
        (math.nan, "given scale of group 1 is"),
        (1e-40, "finite, and 0 or at least 2\\^-126"),
    ):
        broken = scales.clone()
        broken[1, 0] = bad
        with pytest.raises(ValueError, match=message):
            backend.encode(x, broken, none, scheme)
        with pytest.raises(ValueError, match=message):
            backend.fake_quantize_backward(x, x, broken, none, scheme)
    asymmetric = Scheme(bits=2, symmetric=False)
    with pytest.raises(ValueError, match="given zero point of group 0 is 4, above the last code 3"):
        backend.encode(x, scales, torch.full((2, 1), 4, dtype=torch.uint8), asymmetric)
    x[1, 3] = math.nan
    with pytest.raises(ValueError, match=r"x\[67\] is NaN"):
        backend.fake_quantize(x, scheme)
    with pytest.raises(ValueError, match="noise width of group 1 is"):
        backend.inject_noise(x, torch.tensor([[1.0], [-1.0]]), 64, Rounding.stochastic(0))


def test_what_does_not_go_together_is_refused() -> None:
    x, scheme = normal(2, 64), Scheme(bits=4)
    with pytest.raises(ValueError, match="codes and scales alone"):
        tq.fake_quantize(x, scheme, rounding=Rounding.stochastic(1, mode="subtractive"))
    with pytest.raises(ValueError, match="stochastic rounding must not; round to nearest"):
        tq.fake_quantize(x, scheme, scales=torch.ones(2, 1), rounding="stochastic", seed=1)
    with pytest.raises(ValueError, match=r"given scales must be floats \(2, 1\), got torch.float32 \(2, 2\)"):
        tq.fake_quantize(x, scheme, scales=torch.ones(2, 2))
    with pytest.raises(ValueError, match="cannot read 3 of 4 bits"):
        tq.fake_quantize(x, scheme, bits=3)
    zero_points = torch.zeros(2, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"a symmetric scheme has no zero points, .* use symmetric=False"):
        tq.fake_quantize(x, scheme, scales=torch.ones(2, 1), zero_points=zero_points)
    with pytest.raises(ValueError, match=r"zero_points are given without scales, .* give scales= too"):
        tq.fake_quantize(x, Scheme(bits=4, symmetric=False), zero_points=zero_points)
    with pytest.raises(ValueError, match="variance must be at least 0"):
        tq.inject_noise(x, scheme, seed=0, variance=-1.0)
    with pytest.raises(TypeError, match="variance must be a number"):
        tq.inject_noise(x, scheme, seed=0, variance="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="levels of a table"):
        tq.inject_noise(x, Scheme(bits=4, levels="nf4"), seed=0)
    with pytest.raises(ValueError, match='preserve must be "mean"'):
        tq.inject_noise(x, scheme, seed=0, preserve="var")
    noisy = tq.inject_noise(x.requires_grad_(), scheme, seed=0, preserve="mean+var")
    with pytest.raises(RuntimeError, match='gradients with preserve="mean" only'):
        noisy.sum().backward()


def test_a_number_of_bits_is_the_default_scheme_as_in_pack() -> None:
    x = normal(3, 70)
    assert torch.equal(tq.fake_quantize(x, 4), tq.pack(x, 4).dequantize())
    assert torch.equal(tq.inject_noise(x, 4, seed=1), tq.inject_noise(x, Scheme(bits=4), seed=1))
    for use in (tq.fake_quantize, lambda x, scheme: tq.inject_noise(x, scheme, seed=1), tq.pack):
        with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
            use(x, 9)
        with pytest.raises(TypeError, match="bits must be an int, got '4'"):
            use(x, "4")


def test_arrays_are_tensors_and_what_is_no_dense_tensor_is_refused() -> None:
    x = normal(3, 70)
    for use in (tq.fake_quantize, lambda x, scheme: tq.inject_noise(x, scheme, seed=1)):
        assert torch.equal(use(x.numpy(), 4), use(x, 4))
        with pytest.raises(TypeError, match=r"x must be a torch.Tensor or a numpy.ndarray, got list"):
            use(x.tolist(), 4)
        with pytest.raises(TypeError, match=r"x is sparse \(torch.sparse_coo\); .* x.to_dense\(\)"):
            use(x.to_sparse(), 4)
    with pytest.raises(TypeError, match=r"scales must be a torch.Tensor or a numpy.ndarray, got list"):
        tq.fake_quantize(x, 4, scales=[1.0])  # type: ignore[arg-type]  # the mistake
