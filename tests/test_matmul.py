"""Matmul: y = x @ Wᵀ + bias with W packed; integer activations are exact, float ones within their error."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from backends import NEAREST, Backend, assert_identical
from turboquant_rs import Rounding, Scheme, ops

F32_EPSILON = 2.0**-24
"""Relative error of one f32 rounding."""

STOCHASTIC = Rounding.stochastic(5)
LAYOUTS = ("canonical", "panels")
NESTED_PLANES = ((4, 4), (4, 1, 1, 2), (2, 1, 1, 1, 1, 2))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def schemes(group_size: int | None) -> list[Scheme]:
    """Every kind that has an integer form."""
    return [
        *(Scheme(bits=bits, group_size=group_size) for bits in range(1, 9)),
        *(Scheme(bits=bits, symmetric=False, group_size=group_size) for bits in (2, 3, 4, 8)),
        Scheme(bits=4, levels="nf4", group_size=group_size),
        Scheme(bits=3, levels="lloyd", group_size=group_size, scale_dtype="f32"),
        *(Scheme(bits=bits, levels="lloyd", group_size=group_size) for bits in (1, 2)),
        Scheme.nested(group_size=group_size),
    ]


# Integer activations --------------------------------------------------------------------------------------


def test_the_emulated_fma_rounds_once() -> None:
    """Against exact rational arithmetic, on triples where the two roundings of f64 and f32 would differ."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 30, (3, 20000), generator=generator)
    a, b, c = (torch.randn(3, 20000, generator=generator) * 2.0**exponents).unbind()
    c[::2] = -(a[::2] * b[::2])  # cancellation
    tie = 1 + 2.0**-23
    a[1], b[1], c[1] = 2.0**-12 * tie, 2.0**-12, 1.0
    got = ops.reference._fma(a, b, c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        step = torch.tensor(result)
        up = torch.nextafter(step, torch.tensor(math.inf)).item()
        down = torch.nextafter(step, torch.tensor(-math.inf)).item()
        distance = abs(Fraction(result) - exact)
        assert distance <= abs(Fraction(up) - exact) and distance <= abs(Fraction(down) - exact)
        if distance in (abs(Fraction(up) - exact), abs(Fraction(down) - exact)):
            assert step.view(torch.int32).item() % 2 == 0  # ties to even


@pytest.mark.parametrize("group_size", [8, 9, 64, 100, None])
def test_integer_matmul_is_that_of_the_specification(
    compiled: Backend, reference: Backend, group_size: int | None
) -> None:
    """Sizes below, at and above the tiles of rows, of columns and of k, in both layouts."""
    for scheme in schemes(group_size):
        for m, n, k in ((1, 1, 1), (1, 5, 64), (2, 17, 63), (7, 3, 130), (1, 33, 257), (4, 65, 96)):
            x, w, bias = normal(m, k, seed=m), normal(n, k, seed=n), normal(n, seed=k)
            stored, bias = reference.pack(w, scheme), bias if m % 2 else None
            expected = reference.matmul(x, stored, scheme, bias)
            for layout in LAYOUTS:
                got = compiled.matmul(x, stored, scheme, bias, layout=layout)
                assert_identical(got, expected, (scheme, m, n, k, layout))


@pytest.mark.parametrize("planes", NESTED_PLANES)
def test_a_prefix_multiplies_as_the_specification(
    compiled: Backend, reference: Backend, planes: tuple[int, ...]
) -> None:
    scheme = Scheme.nested(group_size=48, planes=planes)
    x, stored = normal(3, 200), reference.pack(normal(70, 200, seed=1), scheme)
    for count in range(1, len(planes) + 1):
        bits = sum(planes[:count])
        expected = reference.matmul(x, stored, scheme, bits=bits)
        for layout in LAYOUTS:
            got = compiled.matmul(x, stored, scheme, bits=bits, layout=layout)
            assert_identical(got, expected, (bits, layout))


@pytest.mark.parametrize("symmetric", [True, False])
def test_long_groups_are_cut_into_segments(compiled: Backend, reference: Backend, symmetric: bool) -> None:
    """Sums of groups longer than 32768, at the largest codes and activations there are."""
    k = 2 * 32768 + 100
    scheme = Scheme(bits=8, group_size=None, symmetric=symmetric)
    w = torch.stack((torch.ones(k), normal(k), torch.linspace(0, 1, k)))
    x = torch.stack((torch.ones(k), -torch.ones(k), normal(k, seed=1)))
    stored = reference.pack(w, scheme)
    expected = reference.matmul(x, stored, scheme)
    for layout in LAYOUTS:
        assert_identical(compiled.matmul(x, stored, scheme, layout=layout), expected, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_activations_of_any_dtype(compiled: Backend, reference: Backend, dtype: torch.dtype) -> None:
    scheme, x, bias = Scheme(group_size=32), normal(2, 3, 100).to(dtype), normal(7).to(dtype)
    stored = reference.pack(normal(7, 100, seed=1), scheme)
    got = compiled.matmul(x, stored, scheme, bias)
    assert got.dtype == dtype and got.shape == (2, 3, 7)
    assert_identical(got, reference.matmul(x, stored, scheme, bias))
    assert_identical(got, reference.matmul(x.float(), stored, scheme, bias.float()).to(dtype))


@pytest.mark.parametrize("size", [1e38, 1e30, 1e-30, 1e-37, 1e-44, 0.0])
def test_huge_and_tiny_activations(compiled: Backend, reference: Backend, size: float) -> None:
    scheme = Scheme(bits=4)
    x = normal(5, 192).clamp(-3, 3) * size
    stored = reference.pack(normal(6, 192, seed=2), scheme)
    assert_identical(compiled.matmul(x, stored, scheme), reference.matmul(x, stored, scheme))


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_row_does(backend: Backend, activations: str) -> None:
    scheme, x = Scheme(), normal(4, 130)
    stored = backend.pack(normal(5, 130, seed=1), scheme)
    clean = backend.matmul(x, stored, scheme, activations=activations)
    x[1, 129], x[3, 0] = math.nan, math.inf
    got = backend.matmul(x, stored, scheme, torch.zeros(5), activations=activations)
    assert got[[1, 3]].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


def test_integer_activations_err_by_half_a_step(backend: Backend) -> None:
    """|y − ŷ| ≤ Σ_g ½·s_x·Σ|ŵ|, and the rounding of the sums."""
    scheme = Scheme(bits=8, group_size=50)
    x, w = normal(6, 200), normal(9, 200, seed=1)
    stored = backend.pack(w, scheme)
    exact = x.double() @ backend.unpack(stored, scheme, w.shape).cpu().double().T
    weight = backend.unpack(stored, scheme, w.shape).cpu().abs().view(9, 4, 50).sum(-1)
    step = x.abs().view(6, 4, 50).amax(-1) / 127
    bound = (step @ weight.T) * (0.5 + 1e-4) + 1e-5
    assert ((backend.matmul(x, stored, scheme).cpu() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    "rounding", [Rounding.stochastic(5, preserve="mean+var"), Rounding.stochastic(5, mode="subtractive")]
)
def test_weights_without_an_integer_form_name_the_way_out(backend: Backend, rounding: Rounding) -> None:
    scheme, w, x = Scheme(bits=4), normal(5, 100), normal(2, 100, seed=1)
    stored = backend.pack(w, scheme, rounding)
    with pytest.raises(ValueError, match='activations="float"'):
        backend.matmul(x, stored, scheme, rounding=rounding)
    weight = backend.unpack(stored, scheme, w.shape, rounding)
    got = backend.matmul(x, stored, scheme, rounding=rounding, activations="float")
    assert_close(got, x, weight)


# Float activations ----------------------------------------------------------------------------------------


def assert_close(got: Tensor, x: Tensor, weight: Tensor) -> None:
    """Within the worst error of summing k products in f32 in any order: k·ε·Σ|x·w|."""
    k = x.shape[-1]
    exact = x.double() @ weight.cpu().double().T
    bound = 2 * k * F32_EPSILON * (x.double().abs() @ weight.cpu().double().abs().T)
    assert ((got.cpu().double() - exact).abs() <= bound + 1e-37).all()


@pytest.mark.parametrize("group_size", [8, 9, 64, 100, None])
def test_float_matmul_is_the_product_with_the_dequantized_weight(
    backend: Backend, group_size: int | None
) -> None:
    for scheme in schemes(group_size):
        for m, n, k in ((1, 1, 1), (1, 5, 64), (2, 17, 63), (7, 3, 130), (1, 33, 257)):
            x, w = normal(m, k, seed=m), normal(n, k, seed=n)
            stored = backend.pack(w, scheme)
            got = backend.matmul(x, stored, scheme, activations="float")
            assert_close(got, x, backend.unpack(stored, scheme, w.shape))


@pytest.mark.parametrize("planes", NESTED_PLANES)
def test_float_matmul_of_a_prefix(backend: Backend, planes: tuple[int, ...]) -> None:
    scheme = Scheme.nested(group_size=48, planes=planes)
    x, w = normal(3, 200), normal(19, 200, seed=1)
    stored = backend.pack(w, scheme)
    for count in range(1, len(planes) + 1):
        bits = sum(planes[:count])
        got = backend.matmul(x, stored, scheme, bits=bits, activations="float")
        assert_close(got, x, backend.unpack(stored, scheme, w.shape, bits=bits))


# Shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize(
    ("shape", "n", "k"),
    [((0, 64), 3, 64), ((2, 0), 3, 0), ((2, 64), 0, 64), ((64,), 3, 64), ((2, 1, 3, 9), 4, 9)],
)
def test_empty_and_many_dimensional_activations(
    backend: Backend, activations: str, shape: tuple[int, ...], n: int, k: int
) -> None:
    scheme = Scheme(bits=5, group_size=16)
    stored = backend.pack(normal(n, k), scheme)
    bias = normal(n, seed=1)
    got = backend.matmul(normal(*shape, seed=2), stored, scheme, bias, activations=activations)
    assert got.shape == (*shape[:-1], n)
    if k == 0:
        assert_identical(got, bias.expand(2, n))


def test_matmul_wants_a_matrix(backend: Backend) -> None:
    scheme = Scheme()
    stored = backend.pack(normal(2, 3, 64), scheme)
    with pytest.raises(
        ValueError, match=r"a packed matrix \(n, k\), got x of shape \(2, 64\) and scales of shape"
    ):
        ops.matmul(
            normal(2, 64),
            *stored,
            None,
            *scheme.op_args(),
            *NEAREST.op_args(),
            [4],
            4,
            "int8",
            "canonical",
            2,
        )


# Panels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [8, 9, 32, 96, None])
def test_panels_are_those_of_the_specification_and_go_back(
    compiled: Backend, reference: Backend, group_size: int | None
) -> None:
    for scheme in schemes(group_size):
        for n, k in ((1, 1), (16, 32), (17, 33), (63, 64), (65, 100), (130, 257)):
            stored = reference.pack(normal(n, k, seed=n), scheme)
            panels = compiled.to_panels(stored, scheme, k)
            for got, expected in zip(panels, reference.to_panels(stored, scheme, k), strict=True):
                assert_identical(got, expected, (scheme, n, k))
            for backend in (compiled, reference):
                for got, expected in zip(backend.from_panels(panels, scheme, n, k), stored, strict=True):
                    assert_identical(got, expected, (scheme, n, k, backend.name))


def test_an_empty_matrix_has_empty_panels(backend: Backend) -> None:
    scheme = Scheme(bits=4)
    for n, k in ((0, 64), (3, 0)):
        stored = backend.pack(torch.empty(n, k), scheme)
        back = backend.from_panels(backend.to_panels(stored, scheme, k), scheme, n, k)
        for got, expected in zip(back, stored, strict=True):
            assert_identical(got, expected)


# Threads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_many_callers_at_once_get_the_bits_of_one(compiled: Backend, activations: str, layout: str) -> None:
    """Each of them asks for threads, more or fewer than the others, while PyTorch's own operators do too."""
    scheme = Scheme(bits=4, symmetric=False)
    w, bias = normal(300, 1024), normal(300, seed=1)
    stored = compiled.pack(w, scheme)
    xs = [normal(m, 1024, seed=m) for m in (1, 3, 8, 20, 33, 65)]

    def product(x: Tensor) -> Tensor:
        return compiled.matmul(x, stored, scheme, bias, activations=activations, layout=layout)

    expected = [product(x) for x in xs]
    together = threading.Barrier(len(xs))

    def call(caller: int) -> None:
        torch.set_num_threads(1 + caller % 4)
        together.wait()
        for turn in range(2 * len(xs)):
            each = (caller + turn) % len(xs)
            assert_identical(product(xs[each]), expected[each], (caller, turn))
            torch.nn.functional.linear(xs[each], w, bias)

    try:
        with ThreadPoolExecutor(len(xs)) as callers:
            list(callers.map(call, range(len(xs))))
    finally:
        torch.set_num_threads(1)


# Gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_gradients_of_activations_and_bias(activations: str, layout: str) -> None:
    """d/dx = grad @ Ŵ, straight through the rounding of the activations; d/dbias = Σ grad."""
    scheme = Scheme(bits=4, group_size=32)
    w, x, bias = normal(5, 100), normal(2, 3, 100, seed=1), normal(5, seed=2)
    x.requires_grad_(True)
    bias.requires_grad_(True)
    stored = ops.pack(w, *scheme.op_args(), *NEAREST.op_args(), [4], False)
    tail = (bias, *scheme.op_args(), *NEAREST.op_args(), [4], 4, activations, layout, 5)
    laid_out = stored if layout == "canonical" else ops.to_panels(*stored, *scheme.op_args(), [4], 100)
    grad = normal(2, 3, 5, seed=3)
    ops.matmul(x, *laid_out, *tail).backward(grad)
    weight = ops.unpack(*stored, *scheme.op_args(), *NEAREST.op_args(), [4], 4, [5, 100], torch.float32)
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ weight)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


def test_quantizing_ends_the_graph_and_dequantizing_refuses_to() -> None:
    scheme = Scheme()
    x = normal(3, 64).requires_grad_(True)
    codes, scales, zero_points = ops.quantize(x, *scheme.op_args(), *NEAREST.op_args(), False)
    assert not scales.requires_grad
    scales.requires_grad_(True)
    values = ops.dequantize(codes, scales, zero_points, *scheme.op_args(), *NEAREST.op_args(), torch.float32)
    with pytest.raises(RuntimeError, match="dequantize has no gradient"):
        values.sum().backward()
