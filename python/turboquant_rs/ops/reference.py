"""The specification, executable: every operator in plain torch, for any device.

Slow and literal. The backends must agree with this file bit for bit, so each arithmetic step is one f32
rounding and stands on its own line of thought: no fused operation, no reduction whose order torch chooses
(maxima are exact in any order; sums go through `_sum16`), no division by a Python scalar (CUDA multiplies by
the reciprocal instead). Integers are int64 tensors, wide enough for every product below.

Rows of x `(..., k)` are cut into groups; a short last group is filled up with +0, which changes no maximum
with 0 and no sum. Shapes below: `x: (rows, groups, size)`, scales and zero points `(rows, groups)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant_rs.ops.schema import (
    BYTE_CODES,
    FLOAT_NAMES,
    OUT_OPS,
    PANEL_COLUMNS,
    PANEL_ROWS,
    RoundingArgs,
    SchemeArgs,
    packed_nbytes,
    panel_columns,
    register,
    rows_and_k,
    split_args,
)
from turboquant_rs.ops.tiles import from_tiles, prefix_of

MSE_MULTIPLES = (64 / 64, 63 / 64, 62 / 64, 66 / 64, 60 / 64, 68 / 64, 56 / 64, 52 / 64, 47 / 64)
"""Candidate scales of "mse", as multiples of the extreme scale. Chosen by measurement on Gaussian groups of
64: the shortest list of 64ths that comes within 0.08 dB of an exhaustive search at 2 to 8 bits."""

LLOYD_MAX = {1: 0.7978845608, 2: 1.51042, 3: 2.15195, 4: 2.73259}
"""The largest level of the Lloyd-Max quantizer of N(0, 1), by bits."""

DOMAIN = 2.0**120
SMALLEST_NORMAL = 2.0**-126
SMALLEST_SCALE = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24, torch.float32: 2.0**-126}
CODE_LIMIT = 2.0**20
"""|x · inv| is cut off here before it becomes an integer; far outside every range of codes."""

NESTED_ZERO, TABLE_ZERO = 136.0, 128.0
SEGMENT = 32768
"""Longest run of a group that the integer matmul sums at once, so that an i32 never overflows."""

MASK32 = 0xFFFFFFFF


# f32 arithmetic -------------------------------------------------------------------------------------------


def _full(like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value)


def _divide(a: Tensor, b: Tensor | float) -> Tensor:
    return torch.div(a, b if isinstance(b, Tensor) else _full(a, b))


def _sqrt(a: Tensor) -> Tensor:
    """Correctly rounded, which torch's f32 square root is not on every CPU; one of f64 rounded to f32 is."""
    return a.double().sqrt().float()


def _lengths(k: int, groups: int, size: int, device: torch.device) -> Tensor:
    """Elements of each group of a row, as f32."""
    starts = torch.arange(groups, device=device) * size
    return (k - starts).clamp(max=size).float()


def _split(v: Tensor, size: int) -> Tensor:
    """The last dimension in parts of `size`, the last one filled up with zeros: `(..., parts, size)`."""
    v = F.pad(v, (0, -v.shape[-1] % size))
    return v.reshape(*v.shape[:-1], v.shape[-1] // size, size)


def _sum16(v: Tensor) -> Tensor:
    """Sum over the last dimension in the contract's order: 16 running lanes, then halves onto halves."""
    chunks = _split(v, 16)
    lanes = torch.zeros_like(chunks[..., 0, :])
    for chunk in chunks.unbind(-2):
        lanes = lanes + chunk
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c of f32 tensors with one rounding.

    In f64 the product is exact (24 + 24 <= 53 bits). Its sum with c is rounded to odd: where the two-sum
    error says that the rounded sum is not exact and its last bit is even, the neighbour on the error's side
    is taken. Rounding to odd at 53 >= 2·24 + 2 bits loses nothing that the final rounding to f32 could see,
    so there is no double rounding (Boldo and Melquiond, 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    added = total - product
    error = (product - (total - added)) + (addend - added)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    to_odd = (error != 0) & total.isfinite() & (bits % 2 == 0)
    return torch.where(to_odd, (bits + away).view(torch.float64), total).float()


# Random bits ----------------------------------------------------------------------------------------------


def _multiply(multiplier: int, c: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two 32-bit words, in halves that int64 can hold."""
    low, high = multiplier * (c & 0xFFFF), multiplier * (c >> 16)
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & MASK32


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of Salmon et al. (2011): four words of counter and two of key to four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def _words(rounding: RoundingArgs, purpose: int, first: int, count: int, device: torch.device) -> Tensor:
    """Words `(count, 4)` of the counters first … first + count − 1."""
    n = first + torch.arange(count, device=device)
    c2, c3 = torch.full_like(n, rounding.stream), torch.full_like(n, rounding.step & MASK32)
    key = (rounding.seed & MASK32, (rounding.seed >> 32) & MASK32)
    return torch.stack(philox((n & MASK32, (n >> 32) | (purpose << 24), c2, c3), key), dim=-1)


def element_draws(
    rounding: RoundingArgs, first: int, count: int, device: torch.device, purpose: int = 0
) -> Tensor:
    """Purpose 0, or that of noise: the `draw_bits` random bits of elements first … first + count − 1.

    A tile owns 16 counters, word-major: element j of its 64 takes word j div 16 of counter j mod 16. With 16
    bits a draw a tile has 128 elements: first the low halves of those 64 words, then the high halves.
    """
    size = 64 if rounding.draw_bits == 32 else 128
    tiles = range(first // size, -(-(first + count) // size))
    words = _words(rounding, purpose, 16 * tiles.start, 16 * len(tiles), device)
    words = words.view(len(tiles), 16, 4).transpose(1, 2)
    if rounding.draw_bits == 16:
        words = torch.stack((words & 0xFFFF, words >> 16), dim=1)
    return words.flatten()[first - size * tiles.start :][:count]


def block_draws(rounding: RoundingArgs, first: int, count: int, device: torch.device) -> Tensor:
    """Purpose 1: one word a block, blocks first … first + count − 1."""
    counters = range(first // 4, -(-(first + count) // 4))
    words = _words(rounding, 1, counters.start, len(counters), device)
    return words.flatten()[first - 4 * counters.start :][:count]


def permutations(draws: Tensor) -> Tensor:
    """A permutation of 0 … 7 for every word `(...)`: Fisher-Yates, `(..., 8)`."""
    order = torch.arange(8, device=draws.device).repeat(*draws.shape, 1)
    for i in range(7, 0, -1):
        product = draws * (i + 1)
        j, draws = (product >> 32)[..., None], product & MASK32
        taken = order.gather(-1, j)
        order.scatter_(-1, j, order[..., i : i + 1].clone())
        order[..., i : i + 1] = taken
    return order


def _shrink(draws: Tensor, bits: int, variance: float) -> Tensor:
    """R' = ½ + ρ·(R − ½) in integers of `bits` bits; ρ in units of 2^−16."""
    rho = int(torch.tensor(variance, dtype=torch.float32).mul(65536).round())
    half = 1 << (bits - 1)
    return half + ((rho * (draws - half)) >> 16)


def _group_draws(rounding: RoundingArgs, scheme: SchemeArgs, rows: int, k: int, x: Tensor) -> Tensor:
    """The draw of every element, in the shape `(rows, groups, size)` of x."""
    first, count = rounding.offset, rows * k
    if rounding.mode == "antithetic":
        # An even element and the odd one after it share a draw; the odd one takes the complement.
        start = first & ~1
        draws = element_draws(rounding, start, count + 2, x.device).clone()
        draws = draws[: len(draws) & ~1].view(-1, 2)
        draws[:, 1] = (1 << rounding.draw_bits) - 1 - draws[:, 0]
        draws = draws.flatten()[first - start :][:count]
    else:
        draws = element_draws(rounding, first, count, x.device)
    draws = _split(draws.view(rows, k), x.shape[-1])
    if rounding.mode == "stratified":
        order = permutations(_blocks_of_group(rounding, scheme, k, x, 8)).flatten(-2)
        draws = (order[..., : x.shape[-1]] << (rounding.draw_bits - 3)) | (draws >> 3)
    return _shrink(draws, rounding.draw_bits, rounding.variance)


def _blocks_of_group(rounding: RoundingArgs, scheme: SchemeArgs, k: int, x: Tensor, block: int) -> Tensor:
    """The draw of each block of each group, `(rows, groups, blocks)`.

    Blocks are numbered by the nominal group size: group number · ceil(group_size / block) + position.
    """
    rows, groups, size = x.shape
    per_group = -(-(scheme.group_size or k) // block)
    first_group = rounding.offset // k * groups if k else 0
    draws = block_draws(rounding, first_group * per_group, rows * groups * per_group, x.device)
    return draws.view(rows, groups, per_group)[..., : -(-size // block)]


# Scales ---------------------------------------------------------------------------------------------------


def _round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """round_sd: to nearest even in dtype. A magnitude below the smallest allowed becomes +0."""
    stored = scale.to(dtype).float()
    return torch.where(stored.abs() < SMALLEST_SCALE[dtype], 0.0, stored)


def _smallest_scale(target: Tensor, factor: int, dtype: torch.dtype) -> Tensor:
    """The smallest value s of dtype with s·factor >= target, compared in f64; target is f64 and >= 0."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    nearest = _divide(target, float(factor)).float().to(dtype).view(integer)
    # The nearest value is at most one step away, and values of one sign are ordered like their bits.
    candidates = torch.stack(((nearest - 1).clamp(min=0), nearest, nearest + 1)).view(dtype)
    enough = candidates.double() * factor >= target
    first = enough.int().argmax(0, keepdim=True)
    return _round_scale(candidates.float().gather(0, first)[0], dtype)


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest element or 0, and smallest element or 0, of each group."""
    return x.amax(-1).clamp(min=0), x.amin(-1).clamp(max=0)


def choose_scales(x: Tensor, n: Tensor, scheme: SchemeArgs, stochastic: bool) -> tuple[Tensor, Tensor]:
    """Scales as stored (widened to f32) and zero points of the groups of x; n: elements of each group."""
    high, low = _extremes(x)
    peak = torch.maximum(high, -low)
    dtype, top = scheme.scale_dtype, 2.0 ** (scheme.bits - 1)
    if scheme.table:
        if scheme.scale == "rms":
            factor = _full(peak, LLOYD_MAX[scheme.bits] / 127)
            scale = _sqrt(_divide(_sum16(x * x), n)) * factor
        else:
            scale = _divide(peak, 127.0)
        return _round_scale(scale, dtype), _full(peak, TABLE_ZERO)
    if scheme.nested:
        opposite = torch.minimum(high, -low)
        scale = torch.maximum(
            _smallest_scale(peak.double(), 128, dtype), _smallest_scale(opposite.double(), 119, dtype)
        )
        return torch.where(high >= -low, -scale, scale) + 0.0, _full(peak, NESTED_ZERO)
    if scheme.bits == 1:
        if stochastic:
            scale = _smallest_scale(2 * peak.double(), 1, dtype)
        else:
            scale = _round_scale(_divide(2.0 * _sum16(x.abs()), n), dtype)
        return scale, _full(peak, 0.5)
    if scheme.symmetric:
        if stochastic:
            scale = _smallest_scale(peak.double(), int(top) - 1, dtype)
        else:
            scale = _round_scale(torch.where(high >= -low, high, low) * -(1.0 / top), dtype)
        return scale, _full(peak, top)
    return _asymmetric_scales(high, low, scheme, stochastic)


def _asymmetric_scales(
    high: Tensor, low: Tensor, scheme: SchemeArgs, stochastic: bool
) -> tuple[Tensor, Tensor]:
    steps = 2**scheme.bits - 1
    if stochastic:
        scale = _smallest_scale(high.double() - low.double(), steps - 1, scheme.scale_dtype)
        zero = _divide(-low.double(), scale.double()).ceil().float()
    else:
        scale = _round_scale(_divide(high - low, float(steps)), scheme.scale_dtype)
        zero = _divide(-low, scale).round().clamp(0, steps)
    # The addition turns −0 into 0: zero points are integers.
    return scale, torch.where(scale == 0, 0.0, zero + 0.0)


def search_scales(x: Tensor, scale: Tensor, zero: Tensor, scheme: SchemeArgs) -> Tensor:
    """The multiple of each scale with the smallest squared error of its group; ties take the earlier."""
    best, least = scale, None
    for multiple in MSE_MULTIPLES:
        candidate = _round_scale(scale * multiple, scheme.scale_dtype)
        value = _levels(nearest_codes(x, candidate, zero, scheme), scheme) - zero[..., None]
        difference = x - candidate[..., None] * value
        error = _sum16(difference * difference)
        if least is None:
            least = error
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


# Codes ----------------------------------------------------------------------------------------------------


def _levels(codes: Tensor, scheme: SchemeArgs) -> Tensor:
    """Codes as the numbers they stand for: themselves, or the levels of the table."""
    if not scheme.table:
        return codes.float()
    table = torch.tensor(list(scheme.table), dtype=torch.float32, device=codes.device)
    return table[codes.long().clamp(max=len(scheme.table) - 1)]


def quotients(x: Tensor, scale: Tensor) -> Tensor:
    """x · (1 / s), and 0 where s is 0; cut off far outside the codes."""
    inverse = torch.where(scale == 0, 0.0, _divide(_full(scale, 1.0), scale))
    return (x * inverse[..., None]).clamp(-CODE_LIMIT, CODE_LIMIT)


def nearest_codes(x: Tensor, scale: Tensor, zero: Tensor, scheme: SchemeArgs) -> Tensor:
    """Codes by rounding to nearest: u = clamp(RNE(x · (1 / s)) + z); B = 1: u = 1 where x >= 0."""
    if scheme.bits == 1 and not scheme.table:
        return (x >= 0).long()
    t = quotients(x, scale)
    if scheme.table:
        # The level nearest t; in the middle between two, the lower one. The middles are exact in f32.
        table = torch.tensor(list(scheme.table), dtype=torch.float32, device=x.device)
        middles = (table[:-1] + table[1:]) / 2 - TABLE_ZERO
        return sum(((t > middle).long() for middle in middles), torch.zeros_like(t, dtype=torch.int64))
    return (t.round() + zero[..., None]).clamp(0, 2**scheme.bits - 1).long()


def stochastic_codes(
    x: Tensor, scale: Tensor, zero: Tensor, scheme: SchemeArgs, rounding: RoundingArgs, rows: int, k: int
) -> tuple[Tensor, Tensor]:
    """Codes by stochastic rounding, and the fractions f of the elements."""
    t = torch.where(scale[..., None] == 0, 0.0, _divide(x, scale[..., None].expand_as(x)))
    floor = t.floor()
    fraction = t + 0.5 if scheme.bits == 1 else t - floor
    if rounding.mode == "systematic":
        up = _systematic(fraction, scheme, rounding, k)
    else:
        threshold = (fraction * 2.0**rounding.draw_bits).round().long()
        draws = _group_draws(rounding, scheme, rows, k, x)
        up = (draws + threshold >= 1 << rounding.draw_bits).long()
    if scheme.bits == 1:
        # A group of zeros has no scale to compare with: by sign.
        return torch.where(scale[..., None] == 0, (x >= 0).long(), up), fraction
    codes = floor.long() + up + zero[..., None].long()
    return codes.clamp(0, 2**scheme.bits - 1), fraction


def _systematic(fraction: Tensor, scheme: SchemeArgs, rounding: RoundingArgs, k: int) -> Tensor:
    """One phase a block of 64: the running sum of the fractions rounds up where it passes an integer."""
    size = fraction.shape[-1]
    parts = (fraction * 2.0**24).round().long()
    parts = _split(parts, 64)
    phase = _shrink(_blocks_of_group(rounding, scheme, k, fraction, 64) >> 8, 24, rounding.variance)
    after = phase[..., None] + parts.cumsum(-1)
    up = ((after >> 24) - ((after - parts) >> 24)) & 255
    return up.flatten(-2)[..., :size]


def preserve_variance(
    x: Tensor, n: Tensor, fraction: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that shrink each group about its mean, so that it keeps its variance.

    The mean error power of stochastic rounding given the fractions is v = s²·mean f(1 − f); the group's
    deviations are scaled by c = sqrt(σ² / (σ² + v)). Where σ² + v is 0 or overflows, nothing changes.
    """
    mean = _divide(_sum16(x), n)
    positions = torch.arange(x.shape[-1], device=x.device)
    deviation = torch.where(positions < n[:, None], x - mean[..., None], 0.0)
    variance = _divide(_sum16(deviation * deviation), n)
    noise = _divide(_sum16(fraction * (1.0 - fraction)), n) * scale * scale
    total = variance + noise
    factor = _sqrt(_divide(variance, total))
    new_scale = _round_scale(scale * factor, dtype)
    new_zero = torch.where(new_scale == 0, zero, zero - _divide(mean * (1.0 - factor), new_scale))
    keep = (total == 0) | ~total.isfinite()
    return torch.where(keep, scale, new_scale), torch.where(keep, zero, new_zero)


# Quantize and dequantize ----------------------------------------------------------------------------------


def _group_length(k: int, group_size: int) -> int:
    """Elements of the longest group of a row: more than k are never there."""
    return max(1, min(group_size or k, k))


def _to_f32(x: Tensor) -> Tensor:
    if x.dtype not in FLOAT_NAMES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it first")
    return x.detach().to(torch.float32)


def checked_input(x: Tensor, nan_zero: bool) -> Tensor:
    """x as f32 rows `(rows, k)` inside the domain: NaN, ±Inf and |x| > 2^120 refused, subnormals ±0."""
    values = _to_f32(x).reshape(rows_and_k(x.shape))
    if nan_zero:
        values = torch.where(values.isnan(), 0.0, values)
    refused = ~(values.abs() <= DOMAIN).flatten()
    if refused.any():
        index = int(refused.int().argmax())
        raise refusal_of_value(index, float(values.flatten()[index]))
    return torch.where(values.abs() < SMALLEST_NORMAL, values * 0.0, values)


def refusal_of_value(index: int, value: float) -> ValueError:
    """The error of x[index], a value outside the domain."""
    if value != value:
        return ValueError(f'x[{index}] is NaN; use nan="zero" to treat NaN as 0')
    if abs(value) == float("inf"):
        return ValueError(f"x[{index}] is infinite; clamp the tensor to ±2^120 first")
    return ValueError(f"x[{index}] = {value:e} is outside the domain |x| <= 2^120; rescale the tensor")


def check_rounding(scheme: SchemeArgs, rounding: RoundingArgs, k: int) -> None:
    """Refuses what a rounding cannot do with a scheme."""
    if rounding.mode == "nearest":
        return
    if scheme.nested:
        raise ValueError("nested schemes round to nearest only; use a static scheme for stochastic rounding")
    if scheme.table:
        raise ValueError("level tables round to nearest only; use uniform levels for stochastic rounding")
    if scheme.scale == "mse":
        raise ValueError('stochastic rounding never clips, so scale "mse" has no use; use scale="extreme"')
    if rounding.preserve_variance and scheme.bits < 2:
        raise ValueError('preserve="mean+var" needs bits >= 2, got 1; use preserve="mean"')
    if rounding.mode in ("stratified", "systematic") and k and rounding.offset % k:
        raise ValueError(
            f"offset {rounding.offset} is not a multiple of the row length {k}; rounding {rounding.mode} "
            "counts whole rows"
        )


def quantize(
    x: Tensor, scheme: SchemeArgs, rounding: RoundingArgs, nan_zero: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes u8 `(rows, k)`, scales `(rows, groups)` and zero points (None if the scheme fixes them)."""
    values = checked_input(x, nan_zero)
    rows, k = values.shape
    check_rounding(scheme, rounding, k)
    size = _group_length(k, scheme.group_size)
    groups = _split(values, size)
    n = _lengths(k, groups.shape[1], size, x.device)

    stochastic = rounding.mode != "nearest"
    scale, zero = choose_scales(groups, n, scheme, stochastic)
    _check_scales(scale, scheme.scale_dtype)
    if scheme.scale == "mse" and scheme.bits > 1:
        scale = search_scales(groups, scale, zero, scheme)
    if stochastic:
        codes, fraction = stochastic_codes(groups, scale, zero, scheme, rounding, rows, k)
    else:
        codes = nearest_codes(groups, scale, zero, scheme)
    if rounding.preserve_variance:
        scale, zero = preserve_variance(groups, n, fraction, scale, zero, scheme.scale_dtype)

    codes = codes.flatten(1)[:, :k].to(torch.uint8)
    stored = scale.to(scheme.scale_dtype)
    if rounding.preserve_variance:
        return codes, stored, zero
    return codes, stored, None if scheme.symmetric else zero.to(torch.uint8)


def _check_scales(scale: Tensor, dtype: torch.dtype) -> None:
    refused = ~scale.isfinite().flatten()
    if refused.any():
        raise refusal_of_scale(int(refused.int().argmax()), dtype)


def refusal_of_scale(group: int, dtype: torch.dtype) -> ValueError:
    """The error of the scale of a group that its dtype cannot hold."""
    way_out = "rescale the tensor"  # sums over a group may leave the range of f32 where no element does
    if dtype == torch.float16:
        way_out = 'use scale_dtype="bf16", which has the range of f32'
    return ValueError(
        f"the scale of group {group} exceeds the largest finite {FLOAT_NAMES[dtype]} value; {way_out}"
    )


def fixed_zero_point(scheme: SchemeArgs) -> float:
    """The zero point of a symmetric scheme."""
    if scheme.table:
        return TABLE_ZERO
    if scheme.nested:
        return NESTED_ZERO
    return 0.5 if scheme.bits == 1 else 2.0 ** (scheme.bits - 1)


def _per_element(groups: Tensor, rows: int, k: int, size: int) -> Tensor:
    """One value a group, `(..., groups)`, as one an element: f32 `(rows, k)`."""
    return groups.reshape(rows, -(-k // size)).float().repeat_interleave(size, dim=1)[:, :k]


def dequantize(
    prefix: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    read_bits: int,
) -> Tensor:
    """f32 values `(rows, k)` of prefix codes `(rows, k)`: x̂ = s · (k_r·2^d + (2^d − 1)/2 − z), d = B − r."""
    rows, k = prefix.shape
    size = _group_length(k, scheme.group_size)
    rest = 2.0 ** (scheme.bits - read_bits)
    value = _levels(prefix, scheme) * rest + (rest - 1) / 2
    if zero_points.numel():
        value = value - _per_element(zero_points, rows, k, size)
    else:
        value = value - fixed_zero_point(scheme)
    if rounding.mode == "subtractive":
        value = value + _dither(rounding, rows * k, prefix.device).view(rows, k)
    return _per_element(scales, rows, k, size) * value


def _dither(rounding: RoundingArgs, count: int, device: torch.device) -> Tensor:
    """½ − U of every element, in f32: what subtractive decoding adds to a code."""
    draws = element_draws(rounding, rounding.offset, count, device)
    word = (draws << 16) | 0x8000 if rounding.draw_bits == 16 else draws | 1
    return (0x80000000 - word).float() * 2.0**-32


# Given scales, fake quantization and noise ----------------------------------------------------------------


def encode(x: Tensor, scales: Tensor, zero_points: Tensor, scheme: SchemeArgs) -> Tensor:
    """Codes u8 `(rows, k)` by rounding to nearest on scales and zero points that are given."""
    values = checked_input(x, False)
    rows, k = values.shape
    size = _group_length(k, scheme.group_size)
    scale, zero = _given(scales, zero_points, scheme, rows)
    codes = nearest_codes(_split(values, size), scale, zero, scheme)
    return codes.flatten(1)[:, :k].to(torch.uint8)


def _given(scales: Tensor, zero_points: Tensor, scheme: SchemeArgs, rows: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points `(rows, groups)` as f32; those that no rule makes are refused."""
    scale = scales.reshape(rows, -1).float() if rows else scales.reshape(0, 0).float()
    refused = ~(scale.isfinite() & ((scale == 0) | (scale.abs() >= SMALLEST_NORMAL))).flatten()
    if refused.any():
        group = int(refused.int().argmax())
        raise ValueError(
            f"the given scale of group {group} is {float(scale.flatten()[group]):e}; scales are finite, "
            "and 0 or at least 2^-126"
        )
    if not zero_points.numel():
        return scale, _full(scale, fixed_zero_point(scheme))
    zero, last = zero_points.reshape(rows, -1).float(), 2**scheme.bits - 1
    beyond = (zero > last).flatten()
    if beyond.any():
        group = int(beyond.int().argmax())
        raise ValueError(
            f"the given zero point of group {group} is {int(zero.flatten()[group])}, above the last code "
            f"{last}"
        )
    return scale, zero


def check_fake_quantize(
    scheme: SchemeArgs, rounding: RoundingArgs | None, given: bool, read_bits: int
) -> None:
    """Refuses what has no value of its own to decode to, and bits that cannot be read."""
    if rounding is not None and (rounding.preserve_variance or rounding.mode == "subtractive"):
        raise ValueError(
            'fake_quantize decodes codes and scales alone; use preserve="mean" and no subtractive dither'
        )
    if given and rounding is not None and rounding.mode != "nearest":
        raise ValueError("given scales may clip, which stochastic rounding must not; round to nearest")
    lowest = scheme.bits if scheme.table else 1
    if not lowest <= read_bits <= scheme.bits:
        raise ValueError(f"cannot read {read_bits} of {scheme.bits} bits; use {lowest} to {scheme.bits}")


def highest_level(scheme: SchemeArgs) -> float:
    """Qp of LSQ: the level farthest above the zero point; of asymmetric schemes the last code."""
    if scheme.table:
        return float(scheme.table[-1] - TABLE_ZERO)
    last = 2.0**scheme.bits - 1
    return last - fixed_zero_point(scheme) if scheme.symmetric else last


def inside(v: Tensor, zero: Tensor, scheme: SchemeArgs) -> Tensor:
    """Where the code of v = x / s is not clamped. Levels and signs have no codes beyond: by v itself."""
    if scheme.table:
        reach, low, high = v, scheme.table[0] - TABLE_ZERO, scheme.table[-1] - TABLE_ZERO
    elif scheme.bits == 1:
        reach, low, high = v, -1.0, 1.0
    else:
        reach, low, high = v.round() + zero[..., None], 0.0, 2.0**scheme.bits - 1
    return (reach >= low) & (reach <= high)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scales: Tensor, zero_points: Tensor, scheme: SchemeArgs, read_bits: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `dequantize(encode(x))` in x, f32 `(rows, k)`, and in the scales, f32 `(rows, groups)`.

    LSQ (Esser et al. 2020): x̂ = s·Q(v), v = x / s, with dQ/dv = 1 where the code is not clamped and 0 where
    it is. So ∂x̂/∂x is 1 or 0, and ∂x̂/∂s is Q − v or Q; the latter is scaled by 1 / √(N·Qp).
    """
    values = checked_input(x, False)
    rows, k = values.shape
    size = _group_length(k, scheme.group_size)
    scale, zero = _given(scales, zero_points, scheme, rows)
    elements, grads = _split(values, size), _split(_to_f32(grad).reshape(rows, k), size)
    v = quotients(elements, scale)
    passes = inside(v, zero, scheme)
    rest = 2 ** (scheme.bits - read_bits)
    codes = nearest_codes(elements, scale, zero, scheme) // rest * rest
    q = _levels(codes, scheme) + (rest - 1) / 2 - zero[..., None]
    n = _lengths(k, elements.shape[1], size, x.device)
    positions = torch.arange(size, device=x.device)
    terms = torch.where(positions < n[:, None], grads * (q - torch.where(passes, v, 0.0)), 0.0)
    factor = _divide(_full(n, 1.0), _sqrt(n * highest_level(scheme)))
    grad_x = torch.where(passes, grads, 0.0).flatten(1)[:, :k]
    return grad_x, _sum16(terms) * factor


def noise(rounding: RoundingArgs, count: int, device: torch.device) -> Tensor:
    """Purpose 2: uniform in ±½, f32; the top 24 bits of a draw, centred."""
    draws = element_draws(rounding._replace(draw_bits=32), rounding.offset, count, device, purpose=2)
    return ((draws >> 8).float() - 8388607.5) * 2.0**-24


def inject_noise(
    x: Tensor, widths: Tensor, group_size: int, preserve: bool, rounding: RoundingArgs
) -> Tensor:
    """x `(rows, k)` as f32 with uniform noise of ±width / 2, one width a group.

    `preserve`: deviations of each group from its mean are shrunk by sqrt(σ² / (σ² + v)), v the mean square of
    the noise. Where σ² + v is 0 or overflows, nothing is shrunk.
    """
    values = _to_f32(x).reshape(rows_and_k(x.shape))
    rows, k = values.shape
    size = _group_length(k, group_size)
    width = widths.reshape(rows, -1) if rows else widths.reshape(0, 0)
    refused = ~(width.isfinite() & (width >= 0)).flatten()
    if refused.any():
        group = int(refused.int().argmax())
        raise ValueError(
            f"the noise width of group {group} is {float(width.flatten()[group]):e}; widths are finite and "
            "at least 0"
        )
    elements = _split(values, size)
    added = _split(noise(rounding, rows * k, x.device).view(rows, k), size) * width[..., None]
    y = elements + added
    if preserve:
        n = _lengths(k, elements.shape[1], size, x.device)
        mean = _divide(_sum16(elements), n)[..., None]
        here = torch.arange(size, device=x.device) < n[:, None]
        deviation = elements - mean
        variance = _divide(_sum16(torch.where(here, deviation * deviation, 0.0)), n)
        power = _divide(_sum16(torch.where(here, added * added, 0.0)), n)
        total = variance + power
        factor = torch.where((total == 0) | ~total.isfinite(), 1.0, _sqrt(_divide(variance, total)))
        y = mean + (y - mean) * factor[..., None]
    return y.flatten(1)[:, :k]


# Planes ---------------------------------------------------------------------------------------------------


def pack_codes(codes: Tensor, planes: Sequence[int]) -> Tensor:
    """Codes u8 `(rows, k)` as a stack of planes: element i of a row at bit i·width, little-endian."""
    shift, blob = sum(planes), []
    for width in planes:
        shift -= width
        field = (codes >> shift) & ((1 << width) - 1)
        fields = _split(field, 8 // width) << _shifts(width, codes.device)
        blob.append(fields.sum(-1, dtype=torch.uint8).flatten())
    return torch.cat(blob)


def _shifts(width: int, device: torch.device) -> Tensor:
    """Where the fields of a byte begin."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)


def unpack_codes(packed: Tensor, planes: Sequence[int], read_bits: int, rows: int, k: int) -> Tensor:
    """The top read_bits bits of the codes, u8 `(rows, k)`."""
    codes = torch.zeros(rows, k, dtype=torch.uint8, device=packed.device)
    start, bits = 0, 0
    for width in planes:
        if bits == read_bits:
            break
        stop = start + packed_nbytes(rows, k, [width])
        plane = packed[start:stop].view(rows, packed_nbytes(1, k, [width]))
        fields = plane[..., None] >> _shifts(width, packed.device)
        field = (fields & ((1 << width) - 1)).flatten(1)[:, :k]
        codes, start, bits = (codes << width) | field, stop, bits + width
    if bits != read_bits:
        prefixes = [sum(planes[: i + 1]) for i in range(len(planes))]
        raise ValueError(f"cannot read {read_bits} bits of planes {list(planes)}; readable are {prefixes}")
    return codes


def _read(
    packed: Tensor,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    planes: Sequence[int],
    read_bits: int,
    rows: int,
    k: int,
) -> Tensor:
    """The prefix codes of a packed tensor; what has no prefixes is refused."""
    bytes_ = list(planes) == BYTE_CODES
    if read_bits != scheme.bits and (scheme.table or rounding.mode == "subtractive" or bytes_):
        raise ValueError(
            f"level tables, subtractive dither and unpacked codes are read with all their bits, got "
            f"read_bits={read_bits}; use {scheme.bits}"
        )
    return unpack_codes(packed, planes, 8 if bytes_ else read_bits, rows, k)


# Matmul ---------------------------------------------------------------------------------------------------


def _int8_scale(x: Tensor) -> Tensor:
    """The scale (m, 1) of a group (m, length) of int8 activations."""
    scale = _divide(x.abs().amax(1, keepdim=True), 127.0)
    return torch.where(scale < SMALLEST_NORMAL, 0.0, scale)


def row_sizes(x: Tensor, group_size: int) -> Tensor:
    """√ Σ s_x² of each row of x `(..., k)`, s_x the scales of its groups in int8: f64 `(...)`.

    NaN for a row with NaN or ±Inf. Squares of f32 are exact in f64, and added in the order of the groups.
    """
    m, k = rows_and_k(x.shape)
    rows = _to_f32(x).reshape(m, k)
    total = torch.zeros(m, 1, dtype=torch.float64, device=x.device)
    for start in range(0, k, _group_length(k, group_size)):
        total += _int8_scale(rows[:, start : start + _group_length(k, group_size)]).double().square()
    finite = rows.isfinite().all(1)
    return torch.where(finite, total[:, 0].sqrt(), math.nan).view(x.shape[:-1])


def _matmul_int8(
    x: Tensor, prefix: Tensor, scales: Tensor, zero_points: Tensor, scheme: SchemeArgs, read_bits: int
) -> Tensor:
    """x `(m, k)` times codes `(n, k)` transposed, x quantized to int8 by row and group."""
    m, k = x.shape
    n = prefix.shape[0]
    size = _group_length(k, scheme.group_size)
    rest = 2 ** (scheme.bits - read_bits)
    levels = _levels(prefix, scheme).long()
    if zero_points.numel():
        zeros = zero_points.view(n, -1).double()
    else:
        zeros = _full(scales.double(), fixed_zero_point(scheme))
    acc = torch.zeros(m, n, device=x.device)
    for group, start in enumerate(range(0, k, size)):
        stop = min(start + size, k)
        scale_x = _int8_scale(x[:, start:stop])
        inverse = torch.where(scale_x == 0, 0.0, _divide(_full(scale_x, 1.0), scale_x))
        q = (x[:, start:stop] * inverse).round().double()
        scale_w = scales[:, group].float() * rest
        # 2·2^d times the bracket Σ k_r·q − z_r·Σ q: an integer, which f64 holds exactly.
        offset = 2 * zeros[:, group] - (rest - 1)
        weights = 2 * rest * levels[:, start:stop].double() - offset[:, None]
        for low in range(0, stop - start, SEGMENT):
            part = slice(low, low + SEGMENT)
            bracket = (q[:, part] @ weights[:, part].T).float() * (0.5 / rest)
            acc = _fma(scale_w * scale_x, bracket, acc)
    return acc


# Panels ---------------------------------------------------------------------------------------------------


def _padded_columns(codes: Tensor, group_size: int) -> Tensor:
    """Codes `(n, k)`, each group padded to words of four columns, then rows and columns to whole panels."""
    n, k = codes.shape
    size = _group_length(k, group_size)
    words = _split(codes, size)
    words = F.pad(words, (0, -size % 4)).flatten(1)
    # The last group, filled up by `_split`, may be longer than what it is padded to.
    return F.pad(words, (0, panel_columns(k, group_size) - words.shape[1], 0, -n % PANEL_ROWS))


def _panels(rows: int) -> list[slice]:
    """The panels of `rows` rows, as slices of vectors of 16: four, or what is left."""
    vectors = -(-rows // PANEL_ROWS)
    return [slice(first, min(first + 4, vectors)) for first in range(0, vectors, 4)]


def _panel_order(values: Tensor, n: int) -> Tensor:
    """Scales or zero points `(n, groups)` in the order of panels: panel, group, row."""
    rows = F.pad(values, (0, 0, 0, -n % PANEL_ROWS))
    vectors = rows.view(rows.shape[0] // PANEL_ROWS, PANEL_ROWS, values.shape[1])
    parts = [vectors[panel].permute(2, 0, 1).reshape(-1) for panel in _panels(n)]
    return torch.cat(parts).view_as(rows) if parts else rows


def _row_order(values: Tensor, n: int) -> Tensor:
    """The inverse of `_panel_order`."""
    groups = values.shape[1]
    rows = values.new_empty(values.shape[0] // PANEL_ROWS, PANEL_ROWS, groups)
    for panel in _panels(n):
        vectors = panel.stop - panel.start
        part = values[panel.start * PANEL_ROWS : panel.stop * PANEL_ROWS]
        rows[panel] = part.reshape(groups, vectors, PANEL_ROWS).permute(1, 2, 0)
    return rows.flatten(0, 1)[:n]


def to_panels(
    packed: Tensor, scales: Tensor, zero_points: Tensor, scheme: SchemeArgs, planes: Sequence[int], k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A packed matrix `(n, k)` in the order of the CPU's kernels.

    Plane by plane, panel of 64 rows by panel: units of 8 words of 4 columns, vectors of 16 rows, then as many
    times 64 bytes as the plane has bits, each of which holds the fields of 8 / width words, the first lowest.
    """
    n = scales.shape[0]
    codes = _padded_columns(unpack_codes(packed, planes, sum(planes), n, k), scheme.group_size)
    shape = (codes.shape[0] // PANEL_ROWS, PANEL_ROWS, codes.shape[1] // PANEL_COLUMNS, 8, 4)
    words = codes.view(shape)
    parts, shift = [], sum(planes)
    for width in planes:
        shift -= width
        fields = (words >> shift) & (2**width - 1)
        for panel in _panels(n):
            stacks = fields[panel].permute(2, 0, 3, 1, 4).unflatten(2, (width, 8 // width))
            places = _shifts(width, codes.device)[:, None, None]
            parts.append((stacks << places).sum(3, dtype=torch.uint8).reshape(-1))
    panels = torch.cat(parts) if parts else packed.new_empty(0)
    zeros = _panel_order(zero_points, n) if zero_points.numel() else zero_points
    return panels, _panel_order(scales, n), zeros


def from_panels(
    panels: Tensor,
    panel_scales: Tensor,
    panel_zero_points: Tensor,
    scheme: SchemeArgs,
    planes: Sequence[int],
    n: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `to_panels`."""
    size = _group_length(k, scheme.group_size)
    columns = panel_columns(k, scheme.group_size)
    units, vectors = columns // PANEL_COLUMNS, panel_scales.shape[0] // PANEL_ROWS
    codes = panels.new_zeros(vectors, PANEL_ROWS, units, 8, 4)
    rest = panels
    for width in planes:
        for panel in _panels(n):
            shape = (units, panel.stop - panel.start, width, 1, PANEL_ROWS, 4)
            stacks, rest = rest[: math.prod(shape)], rest[math.prod(shape) :]
            places = _shifts(width, panels.device)[:, None, None]
            fields = (stacks.view(shape) >> places) & (2**width - 1)
            codes[panel] = codes[panel] << width | fields.flatten(2, 3).permute(1, 3, 0, 2, 4)
    rows = codes.flatten(0, 1).flatten(1)[:n]
    if size % 4 and k > size:
        padded = size + -size % 4
        groups = [rows[:, at * padded :][:, : min(size, k - at * size)] for at in range(-(-k // size))]
        rows = torch.cat(groups, 1)
    packed = pack_codes(rows[:, :k], planes)
    zeros = _row_order(panel_zero_points, n) if panel_zero_points.numel() else panel_zero_points
    return packed, _row_order(panel_scales, n), zeros


# The operators --------------------------------------------------------------------------------------------


def pack_out(x: Tensor, *args: Any) -> None:
    """Quantize x `(..., k)` and pack the codes; fills packed, scales and zero_points."""
    scheme, rounding, (planes, nan_zero, packed, scales, zero_points) = split_args(args)
    codes, new_scales, new_zeros = quantize(x, scheme, rounding, nan_zero)
    packed.copy_(pack_codes(codes, planes))
    scales.copy_(new_scales.view_as(scales))
    if new_zeros is not None:
        zero_points.copy_(new_zeros.view_as(zero_points))


def encode_out(x: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> None:
    """Pack the codes of x `(..., k)` on given scales and zero points; fills packed."""
    planes, packed = args[7:]
    packed.copy_(pack_codes(encode(x, scales, zero_points, SchemeArgs(*args[:7])), planes))


def fake_quantize_out(x: Tensor, *args: Any) -> None:
    """Quantize and dequantize x `(..., k)` into out, on `given` scales or filling scales and zero_points."""
    scheme, rounding, (given, read_bits, scales, zero_points, out) = split_args(args)
    check_fake_quantize(scheme, rounding, given, read_bits)
    if given:
        codes = encode(x, scales, zero_points, scheme)
    else:
        codes, new_scales, new_zeros = quantize(x, scheme, rounding)
        scales.copy_(new_scales.view_as(scales))
        if new_zeros is not None:
            zero_points.copy_(new_zeros.view_as(zero_points))
    prefix = codes >> (scheme.bits - read_bits)
    out.copy_(dequantize(prefix, scales, zero_points, scheme, rounding, read_bits).view_as(out))


def fake_quantize_backward_out(
    grad: Tensor, x: Tensor, scales: Tensor, zero_points: Tensor, *args: Any
) -> None:
    """The gradients of `fake_quantize` in x `(..., k)` and, f32, in the scales `(..., groups)` it used."""
    scheme, (read_bits, grad_x, grad_scales) = SchemeArgs(*args[:7]), args[7:]
    check_fake_quantize(scheme, None, True, read_bits)
    found = fake_quantize_backward(grad, x, scales, zero_points, scheme, read_bits)
    for out, values in zip((grad_x, grad_scales), found, strict=True):
        out.copy_(values.reshape(out.shape))


def inject_noise_out(x: Tensor, widths: Tensor, group_size: int, preserve: bool, *args: Any) -> None:
    """Add uniform noise of ±width / 2 to x `(..., k)`, one of the f32 widths `(..., groups)` a group."""
    *rounding, out = args
    out.copy_(inject_noise(x, widths, group_size, preserve, RoundingArgs(*rounding)).view_as(out))


def unpack_out(packed: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> None:
    """Dequantize the top read_bits bits into out `(..., k)`, rounded to its dtype."""
    scheme, rounding, (planes, read_bits, out) = split_args(args)
    rows, k = rows_and_k(out.shape)
    prefix = _read(packed, scheme, rounding, planes, read_bits, rows, k)
    out.copy_(dequantize(prefix, scales, zero_points, scheme, rounding, read_bits).view_as(out))


def pack_codes_out(codes: Tensor, planes: Sequence[int], packed: Tensor) -> None:
    """Pack codes u8 `(..., k)` into planes."""
    packed.copy_(pack_codes(codes.reshape(rows_and_k(codes.shape)), planes))


def unpack_codes_out(packed: Tensor, planes: Sequence[int], read_bits: int, codes: Tensor) -> None:
    """Unpack the top read_bits bits of each code into codes u8 `(..., k)`."""
    codes.copy_(unpack_codes(packed, planes, read_bits, *rows_and_k(codes.shape)).view_as(codes))


def matmul_out(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, bias: Tensor | None, *args: Any
) -> None:
    """x `(..., k)` times the transposed packed matrix `(n, k)`, plus bias `(n,)`, into out `(..., n)`."""
    scheme, rounding, (planes, read_bits, activations, layout, n, out) = split_args(args)
    k = x.shape[-1]
    if layout == "panels":
        packed, scales, zero_points = from_panels(packed, scales, zero_points, scheme, planes, n, k)
    elif layout == "tiles":
        read = prefix_of(planes, read_bits)
        packed, scales, zero_points = from_tiles(packed, scales, zero_points, read, n, k)
    prefix = _read(packed, scheme, rounding, planes, read_bits, n, k)
    rows = _to_f32(x).reshape(rows_and_k(x.shape))
    broken = ~rows.isfinite().all(1, keepdim=True)
    rows = torch.where(broken, 0.0, rows)
    if activations == "float":
        weight = dequantize(prefix, scales, zero_points, scheme, rounding, read_bits)
        acc = rows @ weight.T
    else:
        if rounding.preserve_variance or rounding.mode == "subtractive":
            raise ValueError(
                'weights packed with preserve="mean+var" or subtractive dither have no integer form; '
                'use activations="float"'
            )
        acc = _matmul_int8(rows, prefix, scales, zero_points, scheme, read_bits)
    if bias is not None:
        acc = acc + bias.detach().float()
    out.copy_(torch.where(broken, float("nan"), acc).view_as(out))


def matmul_refined_out(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, bias: Tensor | None, *args: Any
) -> None:
    """`matmul_out` with int8 activations, at refined_bits where a row's size is above threshold."""
    scheme, _, (planes, read_bits, refined_bits, threshold, layout, n, out, refined) = split_args(args)
    refined.copy_(row_sizes(x, scheme.group_size) > threshold)
    low, high = torch.empty_like(out), torch.empty_like(out)
    for bits, y in ((read_bits, low), (refined_bits, high)):
        at_bits = (*args[:15], planes, bits, "int8", layout, n)
        matmul_out(x, packed, scales, zero_points, bias, *at_bits, y)
    out.copy_(torch.where(refined.unsqueeze(-1), high, low))


def to_panels_out(packed: Tensor, scales: Tensor, zero_points: Tensor, *args: Any) -> None:
    """Rearrange a packed matrix `(n, k)` into panels."""
    planes, k, *outputs = args[7:]
    results = to_panels(packed, scales, zero_points, SchemeArgs(*args[:7]), planes, k)
    for out, result in zip(outputs, results, strict=True):
        out.copy_(result)


def from_panels_out(panels: Tensor, panel_scales: Tensor, panel_zero_points: Tensor, *args: Any) -> None:
    """Bring panels back to a packed matrix `(n, k)`."""
    planes, k, *outputs = args[7:]
    n = outputs[1].shape[0]
    stored = (panels, panel_scales, panel_zero_points)
    results = from_panels(*stored, SchemeArgs(*args[:7]), planes, n, k)
    for out, result in zip(outputs, results, strict=True):
        out.copy_(result)


register({name: globals()[name] for name in OUT_OPS}, "CompositeExplicitAutograd")
