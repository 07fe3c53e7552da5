"""Quantize and dequantize: scales, codes, and what they cost in SQNR."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from backends import NEAREST, VECTORS, Backend, assert_identical
from turboquant_rs import Rounding, Scheme, ops

SQNR_TOLERANCE = 0.1
"""dB. The gates are model-free: Gaussian data, groups of 64, bf16 scales."""

STOCHASTIC = Rounding.stochastic(5)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NESTED_PLANES = ((4, 4), (4, 1, 1, 2), (2, 1, 1, 1, 1, 2))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def schemes(group_size: int | None = 64, scale_dtype: str = "bf16") -> list[Scheme]:
    """Every kind of scheme."""
    fields = {"group_size": group_size, "scale_dtype": scale_dtype}
    uniform = [Scheme(bits=bits, **fields) for bits in range(1, 9)]
    asymmetric = [Scheme(bits=bits, symmetric=False, **fields) for bits in range(2, 9)]
    mse = [Scheme(bits=bits, scale="mse", **fields) for bits in (1, 2, 3, 4, 8)]
    mse.append(Scheme(bits=4, scale="mse", symmetric=False, **fields))
    tables = [Scheme(bits=4, levels="nf4", **fields), Scheme(bits=4, levels="nf4", scale="mse", **fields)]
    tables += [Scheme(bits=bits, levels="lloyd", **fields) for bits in (2, 3, 4)]
    tables.append(Scheme(bits=2, levels=(-1.0, 0.0, 1.0), **fields))
    return [*uniform, *asymmetric, *mse, *tables, Scheme.nested(**fields)]


def assert_as_specified(
    compiled: Backend, reference: Backend, x: Tensor, scheme: Scheme, rounding: Rounding = NEAREST
) -> None:
    """Codes, scales, zero points and decoded values equal the specification's, bit for bit."""
    expected = reference.quantize(x, scheme, rounding)
    what = (scheme, tuple(x.shape))
    assert_identical(compiled.quantize(x, scheme, rounding), expected, what)
    assert_identical(
        compiled.dequantize(expected, scheme, rounding),
        reference.dequantize(expected, scheme, rounding),
        what,
    )


# Equality with the specification --------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [8, 9, 64, 100, 128, None])
def test_every_scheme_at_every_kind_of_length(
    compiled: Backend, reference: Backend, group_size: int | None
) -> None:
    """Lengths below, at and above the vector, the tile and the group; the last group may be short."""
    for scheme in schemes(group_size):
        for rows, k in ((1, 1), (1, 7), (2, 16), (3, 63), (1, 65), (2, 130), (1, 1000)):
            assert_as_specified(compiled, reference, normal(rows, k, seed=k), scheme)


@pytest.mark.parametrize("scale_dtype", ["bf16", "f16", "f32"])
def test_every_scheme_with_every_scale_dtype(compiled: Backend, reference: Backend, scale_dtype: str) -> None:
    for scheme in schemes(64, scale_dtype):
        assert_as_specified(compiled, reference, normal(9, 200, seed=3), scheme)
    for bits in range(1, 9):
        scheme = Scheme(bits=bits, scale_dtype=scale_dtype)
        assert_as_specified(compiled, reference, normal(9, 200, seed=3), scheme, STOCHASTIC)


@pytest.mark.parametrize("size", [2e35, 1e30, 1e-3, 1e-30, 2.0**-118, 2.0**-124, 1e-39])
def test_huge_tiny_and_subnormal_values(compiled: Backend, reference: Backend, size: float) -> None:
    """Near 2^120, near the smallest scale, and where inputs count as ±0."""
    x = normal(16, 130, seed=1) * size
    for scheme in schemes():
        if scheme.levels == "lloyd" and size > 1e18:
            continue  # the sum of squares overflows: refused, see below
        assert_as_specified(compiled, reference, x, scheme)
    for bits in range(1, 9):
        assert_as_specified(compiled, reference, x, Scheme(bits=bits), STOCHASTIC)
        if bits > 1:
            preserving = Rounding.stochastic(5, preserve="mean+var")
            assert_as_specified(compiled, reference, x, Scheme(bits=bits, symmetric=False), preserving)


def test_subnormals_are_zeros_to_a_table_with_a_middle_at_zero(backend: Backend) -> None:
    """There the smallest number above zero has another level than zero, however large the scale is, though
    its quotient be subnormal."""
    x = torch.tensor([[2.0**17, 1e-39, -1e-39, 0.0, -0.0, 1e-33, -1e-33, 2e-38]])
    scheme = Scheme(bits=4, levels="lloyd", group_size=8)
    for values in (x, x.double(), x.bfloat16()):
        assert backend.quantize(values, scheme)[0].tolist() == [[15, 7, 7, 7, 7, 8, 7, 8]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_input_dtype_is_first_rounded_to_f32(
    compiled: Backend, reference: Backend, dtype: torch.dtype
) -> None:
    x = normal(7, 333, seed=2).double().mul(1.0 + 2.0**-30).to(dtype)
    for scheme in schemes(50):
        assert_as_specified(compiled, reference, x, scheme)
        assert_identical(compiled.quantize(x, scheme), reference.quantize(x.float(), scheme), scheme)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 64), (64, 0), (2, 3, 70), (1, 1, 1, 5)])
@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC], ids=["nearest", "stochastic"])
def test_any_shape(compiled: Backend, reference: Backend, shape: tuple[int, ...], rounding: Rounding) -> None:
    for scheme in (Scheme(), Scheme(bits=3, group_size=None), Scheme(bits=8, symmetric=False)):
        x = normal(*shape)
        assert_as_specified(compiled, reference, x, scheme, rounding)
        codes, scales, _ = compiled.quantize(x, scheme, rounding)
        lead, k = (x.shape[:-1], x.shape[-1]) if shape else ((), 1)
        assert codes.shape == x.shape and scales.shape == (*lead, scheme.groups(k))


def test_strided_inputs_are_quantized_as_their_copy(backend: Backend) -> None:
    base = normal(66, 140)
    for view in (base.t(), base[::2, ::3], base[:, 1:], base.flip(1), base[:1].expand(5, -1)):
        expected = backend.quantize(view.contiguous(), Scheme())
        assert_identical(backend.quantize(view, Scheme()), tuple(part.cpu() for part in expected))


def test_the_input_is_left_alone(backend: Backend) -> None:
    x = normal(3, 100).to(backend.device)
    before = x.clone()
    backend.quantize(x, Scheme())
    assert torch.equal(x, before)
    x.requires_grad_(True)
    assert not backend.quantize(x, Scheme())[1].requires_grad


# Scales ---------------------------------------------------------------------------------------------------


def test_the_extreme_gets_the_end_with_one_more_level(backend: Backend) -> None:
    for sign in (1.0, -1.0):
        x = torch.tensor([[8.0, -7.0, 1.0, 0.5, -0.5, 0.0, 3.0, 1.5]]) * sign
        codes, scales, _ = backend.quantize(x, Scheme(bits=4, group_size=8))
        assert scales.item() == -sign
        assert codes.tolist() == [[0, 15, 7, 8, 8, 8, 5, 6]]


def test_asymmetric_ends_are_the_extremes(backend: Backend) -> None:
    x = torch.tensor([[-1.0, 2.75, 0.0, 1.0, 0.25, -0.75, 2.0, 0.5]])
    codes, scales, zero_points = backend.quantize(x, Scheme(bits=4, group_size=8, symmetric=False))
    assert (scales.item(), zero_points.item()) == (0.25, 4)
    assert codes.tolist() == [[0, 15, 4, 8, 5, 1, 12, 6]]


def test_one_bit_is_the_sign_times_the_mean_magnitude(backend: Backend) -> None:
    x = torch.tensor([[1.0, -2.0, 0.0, -0.0, 1e-39, -1e-39, 5.0, -8.0]])
    scheme = Scheme(bits=1, group_size=8)
    stored = backend.quantize(x, scheme)
    assert stored[0].tolist() == [[1, 0, 1, 1, 1, 1, 1, 0]]
    assert stored[1].item() == 4.0
    assert backend.dequantize(stored, scheme).tolist() == [[2.0, -2.0, 2.0, 2.0, 2.0, 2.0, 2.0, -2.0]]


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC], ids=["nearest", "stochastic"])
def test_a_group_of_zeros_decodes_to_zeros(backend: Backend, rounding: Rounding) -> None:
    for zero in (0.0, -0.0, 1e-40, -1e-40):
        x = torch.full((2, 64), zero)
        for scheme in schemes() if rounding is NEAREST else [Scheme(bits=b) for b in range(1, 9)]:
            stored = backend.quantize(x, scheme, rounding)
            assert_identical(stored[1].float(), torch.zeros(2, 1), scheme)
            assert (backend.dequantize(stored, scheme, rounding) == 0).all(), scheme


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", ["bf16", "f16", "f32"])
def test_the_stochastic_scale_is_the_smallest_that_never_clips(
    backend: Backend, bits: int, symmetric: bool, scale_dtype: str
) -> None:
    if bits == 1 and not symmetric:
        pytest.skip("one-bit codes are symmetric only")
    x = normal(200, 64, seed=bits)
    scheme = Scheme(bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
    scales = backend.quantize(x, scheme, STOCHASTIC)[1].cpu()
    if symmetric:
        reach, steps = x.double().abs().amax(1), 0.5 if bits == 1 else 2 ** (bits - 1) - 1
    else:
        high, low = x.double().amax(1).clamp(min=0), x.double().amin(1).clamp(max=0)
        reach, steps = high - low, 2**bits - 2
    below = torch.nextafter(scales, torch.zeros_like(scales))
    assert (scales.double()[:, 0] * steps >= reach).all()
    assert (below.double()[:, 0] * steps < reach).all()


def test_nested_codes_keep_clear_of_the_lowest_prefix(backend: Backend) -> None:
    """u is in 8 … 255: the prefixes then round to nearest, not down."""
    x = normal(500, 64, seed=9)
    codes, scales, _ = backend.quantize(x, Scheme.nested())
    assert codes.min() >= 8
    extreme = torch.where(x.amax(1) >= -x.amin(1), 1.0, -1.0)
    assert torch.equal(scales.cpu().float().sign()[:, 0], -extreme)


def test_the_multiples_of_the_mse_search_are_the_recorded_ones() -> None:
    recorded = json.loads((VECTORS / "mse_multiples.json").read_text())
    assert recorded["multiples"] == [n / recorded["denominator"] for n in recorded["numerators"]]
    assert tuple(recorded["multiples"]) == ops.reference.MSE_MULTIPLES
    assert recorded["multiples"][0] == 1.0


def test_the_mse_search_never_loses(backend: Backend) -> None:
    """Per group, in exact arithmetic up to the rounding of the sums that the search compares."""
    x = normal(300, 64, seed=12)
    for bits in (2, 3, 4, 8):
        power = {}
        for rule in ("extreme", "mse"):
            scheme = Scheme(bits=bits, scale=rule)
            values = backend.dequantize(backend.quantize(x, scheme), scheme).cpu()
            power[rule] = (values.double() - x.double()).square().sum(1)
        assert (power["mse"] <= power["extreme"] * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_mse_search_does_not_lose_on_lloyd_levels(fast: Backend, gaussian: Tensor, bits: int) -> None:
    """One and two bits keep the scale of the mean square: multiples of the extreme one are far from it."""
    plain, searched = (Scheme(bits=bits, levels="lloyd", scale=scale) for scale in ("extreme", "mse"))
    assert sqnr(fast, gaussian, searched) >= sqnr(fast, gaussian, plain)


def test_a_level_in_the_middle_takes_the_lower_one(backend: Backend) -> None:
    """Levels −1, 0, 1 on the grid of 127 steps: the middles are at ±63.5."""
    scheme = Scheme(bits=2, group_size=8, levels=(-1.0, 0.0, 1.0), scale_dtype="f32")
    x = torch.tensor([[127.0, 63.5, 63.6, -63.5, -63.4, 0.0, -127.0, 1.0]])
    stored = backend.quantize(x, scheme)
    assert stored[1].item() == 1.0
    assert stored[0].tolist() == [[2, 1, 2, 0, 1, 1, 0, 1]]
    assert backend.dequantize(stored, scheme).tolist() == [[127, 0, 127, -127, 0, 0, -127, 0]]


# Signal to noise ------------------------------------------------------------------------------------------


def sqnr(
    backend: Backend, x: Tensor, scheme: Scheme, rounding: Rounding = NEAREST, bits: int | None = None
) -> float:
    """Signal power over error power, in dB."""
    stored = backend.pack(x, scheme, rounding)
    error = backend.unpack(stored, scheme, x.shape, rounding, bits=bits).double() - x.double()
    return decibel(x.double().square().mean() / error.square().mean())


def decibel(ratio: Tensor) -> float:
    return 10 * math.log10(ratio.item())


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return normal(2**14, 256, seed=42)


BITS = (2, 3, 4, 5, 6, 8)
ABSMAX = (2.9, 12.0, 19.3, 25.9, 32.3, 44.5)
GATES = {
    "extreme": (8.1, 14.3, 20.4, 26.5, 32.5, 44.5),
    "asymmetric": (6.8, 14.2, 20.8, 27.1, 33.2, 45.3),
    "mse": (9.0, 15.1, 20.9, 26.9, 32.9, 44.8),
}


@pytest.mark.parametrize("rule", GATES)
def test_sqnr_gates(fast: Backend, gaussian: Tensor, rule: str) -> None:
    for bits, gate in zip(BITS, GATES[rule], strict=True):
        if rule == "asymmetric":
            scheme = Scheme(bits=bits, symmetric=False)
        else:
            scheme = Scheme(bits=bits, scale=rule)
        assert sqnr(fast, gaussian, scheme) == pytest.approx(gate, abs=SQNR_TOLERANCE), bits


def test_sqnr_of_one_bit(fast: Backend, gaussian: Tensor) -> None:
    assert sqnr(fast, gaussian, Scheme(bits=1)) == pytest.approx(4.4, abs=SQNR_TOLERANCE)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_group_size_moves_sqnr(fast: Backend, gaussian: Tensor, bits: int) -> None:
    """+0.9 dB at 32, −0.7 dB at 128."""
    at = {size: sqnr(fast, gaussian, Scheme(bits=bits, group_size=size)) for size in (32, 64, 128)}
    assert at[32] - at[64] == pytest.approx(0.9, abs=SQNR_TOLERANCE)
    assert at[128] - at[64] == pytest.approx(-0.7, abs=SQNR_TOLERANCE)


@pytest.mark.parametrize("bits", BITS)
def test_stochastic_rounding_costs_three_decibels(fast: Backend, gaussian: Tensor, bits: int) -> None:
    """Twice the error power of rounding to nearest on the same grid (absmax over 2^(B−1) − 1): 3.01 dB."""
    grid = gaussian.view(-1, 64)
    scale = grid.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    nearest = decibel(grid.square().mean() / (grid - scale * (grid / scale).round()).square().mean())
    assert nearest == pytest.approx(ABSMAX[BITS.index(bits)], abs=SQNR_TOLERANCE)
    drawn = sqnr(fast, gaussian, Scheme(bits=bits, scale_dtype="f32"), STOCHASTIC)
    # At 2 and 3 bits the fractions of Gaussian data are not uniform on the few steps there are.
    tolerance = SQNR_TOLERANCE if bits > 3 else 0.35
    assert drawn - nearest == pytest.approx(-3.01, abs=tolerance)


def test_nested_gates(fast: Backend, gaussian: Tensor) -> None:
    scheme = Scheme.nested()
    assert sqnr(fast, gaussian, scheme) == pytest.approx(44.4, abs=SQNR_TOLERANCE)
    assert sqnr(fast, gaussian, scheme, bits=4) == pytest.approx(20.4, abs=SQNR_TOLERANCE)


@pytest.mark.parametrize("planes", NESTED_PLANES)
def test_nested_prefixes_lose_a_tenth_of_a_decibel_where_truncation_loses_five(
    fast: Backend, gaussian: Tensor, planes: tuple[int, ...]
) -> None:
    """Against independent quantizers of 4 and 8 bits. With bf16 scales, rounding the nested scale up (it must
    not clip) costs up to 0.06 dB more at 8 bits, which the gates above allow for."""
    scheme = Scheme.nested(planes=planes, scale_dtype="f16")
    independent = {bits: sqnr(fast, gaussian, Scheme(bits=bits, scale_dtype="f16")) for bits in (4, 8)}
    for bits in (4, 8):
        assert independent[bits] - sqnr(fast, gaussian, scheme, bits=bits) <= 0.1

    # Naive: the top four bits of an ordinary 8-bit code, with zeros for the rest.
    ordinary = Scheme(bits=8, scale_dtype="f16")
    codes, scales, zero_points = fast.quantize(gaussian, ordinary)
    values = fast.dequantize((codes >> 4 << 4, scales, zero_points), ordinary)
    naive = decibel(gaussian.square().mean() / (values - gaussian).square().mean())
    assert independent[4] - naive == pytest.approx(5.6, abs=0.2)


LLOYD_DISTORTION = {2: 0.117482, 3: 0.034548, 4: 0.009501}
"""Mean squared error of the Lloyd-Max quantizers of N(0, 1)."""


@pytest.mark.parametrize("bits", LLOYD_DISTORTION)
def test_lloyd_levels_reach_the_distortion_of_lloyd_and_max(
    fast: Backend, gaussian: Tensor, bits: int
) -> None:
    """Whole rows, so that the RMS of a group is that of the distribution."""
    scheme = Scheme(bits=bits, levels="lloyd", group_size=None, scale_dtype="f32")
    limit = -10 * math.log10(LLOYD_DISTORTION[bits])
    assert sqnr(fast, gaussian.view(64, -1), scheme) == pytest.approx(limit, abs=0.03)


# What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r'x\[150\] is NaN; use nan="zero"'),
        (math.inf, r"x\[150\] is infinite"),
        (-math.inf, r"x\[150\] is infinite"),
        (2.0**121, r"x\[150\] = 2.6\d*e\+?36 is outside the domain"),
        (-1.5e36, r"x\[150\] = -1.5\d*e\+?36 is outside the domain"),
    ],
)
@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC], ids=["nearest", "stochastic"])
def test_values_outside_the_domain_are_named_by_their_first_index(
    backend: Backend, value: float, message: str, rounding: Rounding
) -> None:
    for scheme in (Scheme(), Scheme(bits=1), Scheme(bits=8, symmetric=False, group_size=None)):
        x = normal(3, 100)
        x[1, 50] = x[2, 7] = value
        with pytest.raises(ValueError, match=message):
            backend.quantize(x, scheme, rounding)


def test_the_ends_of_the_domain_are_inside(backend: Backend) -> None:
    x = torch.tensor([[2.0**120, -(2.0**120), 1.0, 0.0]])
    for scheme in (Scheme(), Scheme(bits=8), Scheme(bits=3, symmetric=False), Scheme.nested()):
        stored = backend.quantize(x, scheme)
        assert backend.dequantize(stored, scheme).isfinite().all()


def test_nan_counts_as_zero_where_asked(backend: Backend) -> None:
    x = normal(3, 100)
    x[1, 50] = math.nan
    zeroed = x.nan_to_num(nan=0.0)
    for rounding in (NEAREST, STOCHASTIC):
        for scheme in (Scheme(), Scheme(bits=1), Scheme(bits=4, scale="mse", symmetric=True)):
            if rounding is STOCHASTIC and scheme.scale == "mse":
                continue
            expected = tuple(part.cpu() for part in backend.quantize(zeroed, scheme, rounding))
            assert_identical(backend.quantize(x, scheme, rounding, nan_zero=True), expected, scheme)
    with pytest.raises(ValueError, match="infinite"):
        backend.quantize(torch.full((4,), math.inf), Scheme(), nan_zero=True)


def test_a_scale_beyond_its_type_names_bf16(backend: Backend) -> None:
    x = normal(4, 64)
    x[2, 0] = 1e9
    with pytest.raises(ValueError, match=r"scale of group 2 exceeds the largest finite f16 value.*bf16"):
        backend.quantize(x, Scheme(scale_dtype="f16"))
    with pytest.raises(ValueError, match="scale of group 2 exceeds"):
        backend.quantize(x, Scheme(scale_dtype="f16"), STOCHASTIC)


def test_a_sum_beyond_f32_says_to_rescale(backend: Backend) -> None:
    with pytest.raises(ValueError, match="the largest finite bf16 value; rescale the tensor"):
        backend.quantize(normal(1, 64) * 1e20, Scheme(bits=3, levels="lloyd"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_only_floating_point_is_quantized(backend: Backend, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"x must be float32, bfloat16, float16 or float64"):
        backend.quantize(torch.zeros(2, 64, dtype=dtype), Scheme())


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme.nested(), "nested schemes round to nearest only"),
        (Scheme(bits=4, levels="nf4"), "level tables round to nearest only"),
        (Scheme(scale="mse"), "stochastic rounding never clips"),
    ],
)
def test_schemes_that_only_round_to_nearest(backend: Backend, scheme: Scheme, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backend.quantize(normal(2, 64), scheme, STOCHASTIC)
