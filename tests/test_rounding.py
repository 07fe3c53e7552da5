"""Rounding: random bits addressed by element, and what each mode promises about its errors.

Statistics run on the fast backend, over many draws; bounds are 5σ unless a line says otherwise. Equality with
the specification, which every backend is held to, carries them over.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from backends import Backend, assert_identical
from turboquant_rs import Rounding, Scheme, ops

UNBIASED = ("iid", "antithetic", "stratified", "systematic")
MODES = (*UNBIASED, "subtractive")
STEP_OF_1 = Scheme(bits=8, group_size=None)
"""With 127 as the largest element the stochastic scale is exactly 1: codes are integers around x."""

SIGMA = 5.0

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""Random123's vectors for Philox4x32-10: counter, key, words."""


def stochastic(mode: str = "iid", seed: int = 11, **fields: object) -> Rounding:
    return Rounding.stochastic(seed, mode=mode, **fields)


def with_step_of_1(x: Tensor) -> Tensor:
    """Rows of x with a first element that makes the scale 1."""
    x[..., 0] = 127.0
    return x


def errors(backend: Backend, x: Tensor, rounding: Rounding) -> Tensor:
    """x̂ − x in units of the step, f64, without the element that sets the scale."""
    x = with_step_of_1(x)
    stored = backend.quantize(x, STEP_OF_1, rounding)
    assert (stored[1] == 1).all()
    return (backend.dequantize(stored, STEP_OF_1, rounding).double() - x.double())[..., 1:]


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Uniform over 64 steps, in multiples of 2^−16 so that sums of fractions are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**21), 2**21, shape, generator=generator) * 2.0**-16


# Random bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert tuple(map(int, ops.reference.philox([torch.tensor(c) for c in counter], key))) == words
    assert tuple(ops.cpu.philox(counter, key)) == words


@pytest.mark.parametrize("draw_bits", [16, 32])
@pytest.mark.parametrize("index", [0, 15, 16, 63, 64, 127, 128, 1000, 2**40 + 77])
def test_draws_are_word_major_in_tiles(index: int, draw_bits: int) -> None:
    """Element j of a tile of 64 takes word j div 16 of counter 16·tile + j mod 16; with 16 bits a draw the
    next 64 elements take the high halves."""
    seed, step, stream = 2**63 + 5, 9, 77
    tile, j = divmod(index, 64 if draw_bits == 32 else 128)
    n = 16 * tile + j % 16
    word = ops.cpu.philox((n & 0xFFFFFFFF, n >> 32, stream, step), (seed & 0xFFFFFFFF, seed >> 32))[
        j % 64 // 16
    ]
    expected = word if draw_bits == 32 else (word >> 16 * (j // 64)) & 0xFFFF
    args = ops.reference.RoundingArgs("iid", seed - 2**64, step, stream, draw_bits, 1.0, False, 0)
    assert int(ops.reference.element_draws(args, index, 1, torch.device("cpu"))) == expected


def test_permutations_are_permutations_and_equally_likely() -> None:
    draws = torch.arange(0, 2**32, 2**13 + 1)
    order = ops.reference.permutations(draws)
    assert_identical(order.sort(-1).values, torch.arange(8).expand(len(draws), 8))
    first = torch.bincount(order[:, 0], minlength=8) / len(draws)
    assert (first - 1 / 8).abs().max() < 0.001


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("draw_bits", [16, 32])
@pytest.mark.parametrize("offset", [0, 1, 63, 64, 100, 127, 129, 2**40 + 5])
def test_codes_are_those_of_the_specification_at_any_offset(
    compiled: Backend, reference: Backend, mode: str, draw_bits: int, offset: int
) -> None:
    x = torch.randn(7, 100, generator=torch.Generator().manual_seed(3))
    rounding = stochastic(mode, seed=2**64 - 1, step=3, stream="layer.0", draw_bits=draw_bits)
    if mode in ("stratified", "systematic"):
        offset *= 100
    for scheme in (
        Scheme(bits=4, group_size=32),
        Scheme(bits=1, group_size=None),
        Scheme(8, symmetric=False),
    ):
        got = compiled.quantize(x, scheme, rounding, offset=offset)
        expected = reference.quantize(x, scheme, rounding, offset=offset)
        assert_identical(got, expected, scheme)
        assert_identical(
            compiled.dequantize(expected, scheme, rounding, offset=offset),
            reference.dequantize(expected, scheme, rounding, offset=offset),
            scheme,
        )


@pytest.mark.parametrize("mode", MODES)
def test_a_slice_of_rows_draws_the_bits_of_the_whole(backend: Backend, mode: str) -> None:
    x = torch.randn(8, 136, generator=torch.Generator().manual_seed(4))
    scheme, rounding = Scheme(bits=3, group_size=40), stochastic(mode)
    whole, scales, _ = backend.quantize(x, scheme, rounding)
    part, part_scales, _ = backend.quantize(x[3:6], scheme, rounding, offset=3 * 136)
    assert_identical(part, whole[3:6].cpu())
    assert_identical(part_scales, scales[3:6].cpu())


@pytest.mark.parametrize("change", [{"seed": 12}, {"step": 1}, {"stream": "other"}])
@pytest.mark.parametrize("mode", MODES)
def test_seed_step_and_stream_each_give_other_draws(
    backend: Backend, mode: str, change: dict[str, object]
) -> None:
    x = uniform(4, 500)
    codes = backend.quantize(x, STEP_OF_1, stochastic(mode))[0]
    others = backend.quantize(x, STEP_OF_1, stochastic(mode, **change))[0]
    assert (codes != others).float().mean() > 0.1


@pytest.mark.parametrize("mode", ["stratified", "systematic"])
def test_block_draws_refuse_an_offset_inside_a_row(backend: Backend, mode: str) -> None:
    with pytest.raises(ValueError, match="offset 7 is not a multiple of the row length 100"):
        backend.quantize(torch.zeros(2, 100), Scheme(), stochastic(mode), offset=7)


# Means ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draw_bits", "n"), [(16, 2**22), (32, 2**20)])
def test_iid_rounding_is_unbiased_and_independent_of_the_lane(fast: Backend, draw_bits: int, n: int) -> None:
    """33 fractions × n draws: each mean within 5σ; χ² of the counts over fraction × lane within 5σ too."""
    chi_square, cells = 0.0, 0
    for i in range(33):
        fraction = i / 32
        rounding = stochastic(step=i, draw_bits=draw_bits)
        codes = fast.quantize(with_step_of_1(torch.full((n,), fraction)), STEP_OF_1, rounding)[0][16:] - 128
        assert codes.max() <= 1
        mean = codes.double().mean().item()
        assert abs(mean - fraction) <= SIGMA * math.sqrt(fraction * (1 - fraction) / len(codes)), fraction
        if 0 < fraction < 1:
            lanes = codes.view(-1, 16)
            ups, draws = lanes.double().sum(0), len(lanes)
            spread = draws * fraction * (1 - fraction)
            chi_square += (((ups - draws * fraction) ** 2).sum() / spread).item()
            cells += 16
    # χ² with d degrees of freedom is close to normal with mean d and variance 2d.
    assert abs(chi_square - cells) <= SIGMA * math.sqrt(2 * cells)


@pytest.mark.parametrize("mode", UNBIASED)
def test_every_mode_is_unbiased_at_every_position_of_a_block(fast: Backend, mode: str) -> None:
    """The blocks of 64 are summed position by position; each keeps the fraction of its element."""
    blocks = 2**15
    x = uniform(64).repeat(blocks).view(1, -1)
    e = errors(fast, torch.cat((torch.zeros(1, 64), x), dim=1), stochastic(mode))[0, 63:]
    mean = e.view(blocks, 64).mean(0)
    f = x[0, :64].double().frac() % 1
    assert (mean.abs() <= SIGMA * (f * (1 - f) / blocks).sqrt() + 1e-12).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_element_is_clipped_so_the_mean_over_seeds_is_the_input(
    fast: Backend, bits: int, symmetric: bool
) -> None:
    """Each element, the extremes of its group included, averages to itself over 4096 steps."""
    if bits == 1 and not symmetric:
        pytest.skip("one-bit codes are symmetric only")
    x = torch.randn(64, generator=torch.Generator().manual_seed(bits))
    scheme = Scheme(bits=bits, group_size=64, symmetric=symmetric)
    many = x.repeat(4096, 1)
    stored = fast.quantize(many, scheme, stochastic())
    values = fast.dequantize(stored, scheme, stochastic()).double()
    scale = stored[1].double().abs().max().item()
    t = x.double() / scale
    f = (t + 0.5) if bits == 1 else t - t.floor()
    bound = SIGMA * scale * (f * (1 - f) / 4096).sqrt() + 1e-4 * scale
    assert ((values.mean(0) - x.double()).abs() <= bound).all()


# Powers and correlations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MODES, "nearest"])
def test_error_power(fast: Backend, mode: str) -> None:
    """E e² is Δ²/6, and Δ²/12 for nearest and subtractive rounding."""
    rounding = Rounding.nearest() if mode == "nearest" else stochastic(mode)
    power, deviation = (1 / 6, 0.197) if mode in UNBIASED else (1 / 12, 0.0746)
    n = 2**22
    if mode == "nearest":
        # The scale of nearest rounding is the extreme over −128.
        x = uniform(n)
        x[0] = -128.0
        stored = fast.quantize(x, STEP_OF_1, rounding)
        e = fast.dequantize(stored, STEP_OF_1, rounding).double() - x.double()
    else:
        e = errors(fast, uniform(n), rounding)
    assert abs(e.square().mean().item() - power) <= SIGMA * deviation / math.sqrt(n)
    assert abs(e.mean().item()) <= SIGMA * math.sqrt(power / n)


def test_iid_errors_are_uncorrelated(fast: Backend) -> None:
    """Serially at lags 1 … 64, and between tensors, steps and seeds: at most 5/√N."""
    n = 2**20
    x = uniform(n + 1)
    e = errors(fast, x, stochastic())
    bound = SIGMA / math.sqrt(n)

    def correlation(a: Tensor, b: Tensor) -> float:
        return abs((a @ b / (a.norm() * b.norm())).item())

    for lag in range(1, 65):
        assert correlation(e[lag:], e[:-lag]) <= bound * 1.001, lag
    for change in ({"stream": "b"}, {"step": 1}, {"seed": 12}, {"seed": 11 + 2**32}):
        assert correlation(e, errors(fast, x, stochastic(**change))) <= bound, change


DIRECTIONS = ("constant", "random", "alternating")
VARIANCE = {
    "iid": (0.167, 0.167, 0.167),
    "antithetic": (0.083, None, 0.250),
    "stratified": (0.086, None, 0.182),
    "systematic": (0.0026, 0.165, 0.320),
    "subtractive": (0.083, 0.083, 0.083),
}
"""Error variance in a direction over that of the direction, in Δ²: the table of the specification's §3."""


@pytest.mark.parametrize("mode", MODES)
def test_variance_table(fast: Backend, mode: str) -> None:
    """The error of a block of 64 in a direction v, from 65536 blocks: relative error √(2/65536) = 0.55 %."""
    blocks = 2**16
    x = uniform(1, 64 + 64 * blocks)
    e = errors(fast, x, stochastic(mode))[0, 63:].view(blocks, 64)
    generator = torch.Generator().manual_seed(8)
    directions = (
        torch.ones(64, dtype=torch.float64),
        torch.randn(64, dtype=torch.float64, generator=generator),
        torch.tensor([1.0, -1.0] * 32, dtype=torch.float64),
    )
    for name, v, expected in zip(DIRECTIONS, directions, VARIANCE[mode], strict=True):
        if expected is not None:
            variance = ((e @ v).square().mean() / v.square().sum()).item()
            assert variance == pytest.approx(expected, rel=0.05), name


def test_systematic_partial_sums_stay_below_one_step(fast: Backend) -> None:
    """Every contiguous partial sum of a block: the largest prefix sum less the smallest."""
    blocks = 2**14
    e = errors(fast, uniform(1, 64 + 64 * blocks), stochastic("systematic"))[0, 63:].view(blocks, 64)
    prefix = torch.cat((torch.zeros(blocks, 1), e.cumsum(1)), dim=1)
    assert (prefix.amax(1) - prefix.amin(1)).max() < 1
    iid = errors(fast, uniform(1, 64 + 64 * blocks), stochastic("iid"))[0, 63:].view(blocks, 64)
    assert iid.sum(1).abs().max() > 8


@pytest.mark.parametrize("size", [8, 9, 65, 100])
def test_systematic_blocks_begin_anew_in_each_group(fast: Backend, size: int) -> None:
    scheme = Scheme(bits=4, group_size=size)
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1))
    stored = fast.quantize(x, scheme, stochastic("systematic"))
    e = fast.dequantize(stored, scheme, stochastic("systematic")).double() - x.double()
    steps = e / stored[1].double().repeat_interleave(size, dim=1)[:, :1000]
    for start in range(0, 1000, size):
        for block in range(start, min(start + size, 1000), 64):
            stop = min(block + 64, start + size, 1000)
            assert steps[:, block:stop].sum(1).abs().max() < 1 + 1e-4


def test_antithetic_pairs_share_one_draw(fast: Backend) -> None:
    """Where two neighbours both have the fraction ½, exactly one of them is rounded up."""
    codes = fast.quantize(with_step_of_1(torch.full((2**12,), 0.5)), STEP_OF_1, stochastic("antithetic"))[0]
    pairs = codes[2:].view(-1, 2).int() - 128
    assert (pairs.sum(1) == 1).all()


def test_stratified_blocks_have_one_draw_in_every_eighth(fast: Backend) -> None:
    """Where all eight elements have the fraction i/8, exactly i of them are rounded up."""
    for i in range(9):
        x = with_step_of_1(torch.full((2**12,), i / 8))
        codes = fast.quantize(x, STEP_OF_1, stochastic("stratified", step=i))[0]
        assert ((codes[8:].view(-1, 8).int() - 128).sum(1) == i).all()


def test_subtractive_error_is_uniform_and_independent_of_the_input(fast: Backend) -> None:
    """Kolmogorov and Smirnov's D ≤ 1.95/√N in each of 16 bins of the fraction (p ≈ 0.001 a bin)."""
    n = 2**20
    x = uniform(n + 1)
    e = errors(fast, x, stochastic("subtractive"))
    f = x[1:].double() % 1
    for low, high in pairwise(i / 16 for i in range(17)):
        sample = e[(f >= low) & (f < high)].sort().values + 0.5
        rank = torch.arange(len(sample), dtype=torch.float64)
        above = ((rank + 1) / len(sample) - sample).max()
        below = (sample - rank / len(sample)).max()
        assert max(above, below) <= 1.95 / math.sqrt(len(sample)), low


# Controlled variance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.25, 0.5, 1.0])
def test_variance_states_its_bias_and_variance(fast: Backend, rho: float) -> None:
    """Over uniform fractions: P(up) = clip((f − ½)/ρ + ½), RMS bias (1 − ρ)/√12, variance ρ/6."""
    rounding = stochastic(variance=rho)
    rows, fractions = 2**12, 2**9
    x = ((torch.arange(fractions) + 0.5) / fractions).repeat(rows, 1)
    x = torch.cat((torch.zeros(rows, 1), x), dim=1)
    e = errors(fast, x, rounding)
    bias, variance = e.mean(0), e.var(0, correction=0)
    assert bias.square().mean().sqrt().item() == pytest.approx(rounding.bias, abs=0.01)
    assert variance.mean().item() == pytest.approx(rounding.variance_of_error, abs=0.002)


def test_variance_0_rounds_to_nearest_and_1_is_unchanged(backend: Backend) -> None:
    x = uniform(4, 333)
    still = backend.quantize(with_step_of_1(x), STEP_OF_1, stochastic(variance=0.0))[0]
    assert_identical(still, ((x + 0.5).floor() + 128).to(torch.uint8))
    assert_identical(
        backend.quantize(x, STEP_OF_1, stochastic(variance=1.0)),
        tuple(part.cpu() for part in backend.quantize(x, STEP_OF_1, stochastic())),
    )


@pytest.mark.parametrize("mode", UNBIASED)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rho", [1.0, 0.3])
def test_variance_and_preserved_variance_agree_with_the_specification(
    compiled: Backend, reference: Backend, mode: str, symmetric: bool, rho: float
) -> None:
    x = torch.randn(9, 203, generator=torch.Generator().manual_seed(6)) * 1e-3 + 0.002
    for preserve in ("mean", "mean+var"):
        for bits, size in ((2, 64), (4, 9), (8, None)):
            scheme = Scheme(bits=bits, group_size=size, symmetric=symmetric)
            rounding = stochastic(mode, variance=rho, preserve=preserve)
            expected = reference.quantize(x, scheme, rounding)
            assert_identical(compiled.quantize(x, scheme, rounding), expected, (scheme, preserve))
            assert_identical(
                compiled.dequantize(expected, scheme, rounding),
                reference.dequantize(expected, scheme, rounding),
                (scheme, preserve),
            )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_preserving_the_variance_keeps_mean_and_variance_of_groups(fast: Backend, bits: int) -> None:
    x = torch.randn(2**13, 128, generator=torch.Generator().manual_seed(2)) + 0.5
    scheme = Scheme(bits=bits, group_size=128, symmetric=False, scale_dtype="f32")

    def moments(rounding: Rounding) -> tuple[float, float]:
        values = fast.dequantize(fast.quantize(x, scheme, rounding), scheme, rounding).double()
        inflation = values.var(1, correction=0) / x.double().var(1, correction=0)
        return (values - x.double()).mean().item(), inflation.mean().item()

    _, inflated = moments(stochastic())
    shift, kept = moments(stochastic(preserve="mean+var"))
    assert abs(shift) < 0.002
    assert abs(kept - 1) < 0.02 < inflated - 1
