"""fake_quantize and inject_noise: what quantization does to a tensor, and its noise without the rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from turboquant_rs import ops
from turboquant_rs.nn.convert import SchemeLike, as_scheme
from turboquant_rs.packed import as_tensor
from turboquant_rs.scheme import Rounding


def fake_quantize(
    x: Tensor,
    scheme: SchemeLike,
    *,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    rounding: Rounding | str = "nearest",
    seed: int | None = None,
    bits: int | None = None,
) -> Tensor:
    """What `tq.pack(x, scheme=scheme, …).dequantize(bits)` gives, bit for bit, in one pass and with
    gradients.

    x: `(..., k)`, f32, f64, bf16 or f16. scheme: or a number of bits, for the default scheme of that many.
    scales: `(..., groups)` floats to encode with (rounded to the scheme's scale_dtype), to nearest only;
    None: chosen from x by the scheme. zero_points: u8, with given scales of asymmetric schemes. bits: a
    prefix to decode.

    Gradients: of x that of the result where the code was not clamped, else 0 (straight-through); of given
    scales, with v = x / s, Σ grad · (Q − v) or, where clamped, Σ grad · Q, times 1 / √(N·Qp) for the N
    elements of a group (LSQ, Esser et al. 2020, equations 3 and 5 and section 2.2).

    Raises `ValueError` for NaN, ±Inf, |x| > 2^120, for rounding that stores more than codes and scales
    (preserve="mean+var", subtractive), for scales that do not fit, and for zero points without scales or for
    a symmetric scheme; `TypeError` for what is no dense tensor of floats, and no scheme.
    """
    x, scheme = _dense(x), as_scheme(scheme)
    scales = None if scales is None else as_tensor(scales, "scales")
    if zero_points is not None:
        zero_points = as_tensor(zero_points, "zero_points")
        if scheme.symmetric:
            raise ValueError(
                f"a symmetric scheme has no zero points, and some are given for {scheme}; leave zero_points "
                "out, or use symmetric=False"
            )
        if scales is None:
            raise ValueError(
                "zero_points are given without scales, and both are chosen from x or neither; give scales= "
                "too, or leave zero_points out"
            )
    parsed = Rounding.parse(rounding, seed)
    parsed.check(scheme)
    arguments = (*scheme.op_args(), *parsed.op_args(), scheme.check_bits(bits))
    return ops.fake_quantize(x, scales, zero_points, *arguments)[0]


def inject_noise(
    x: Tensor,
    scheme: SchemeLike,
    *,
    variance: float = 1.0,
    preserve: str = "mean",
    seed: int,
    step: int = 0,
    stream: str = "",
) -> Tensor:
    """x with uniform noise of the variance that rounding it would have: s² / 12 with the scale s of each
    group.

    Args:
        x: `(..., k)`, f32, f64, bf16 or f16.
        scheme: How x would be quantized, its levels uniform; or a number of bits, for the default scheme.
        variance: Of the noise, in units of s² / 12: 0 is none, 1 that of rounding to nearest, 2 that of
            stochastic rounding.
        preserve: "mean" adds noise of mean 0. "mean+var" also shrinks the deviations of each group from its
            mean by √(σ² / (σ² + v)), v the mean square of the noise drawn.
        seed, step, stream: address the random bits (purpose 2 of docs/format.md) with the place of an
            element; nothing else does.

    Returns: a tensor like x. Its gradient in x is the identity (preserve="mean" only).

    Raises `ValueError` for NaN, ±Inf, |x| > 2^120, tables of levels, a variance that is negative or infinite;
    `TypeError` for what is no dense tensor of floats, and no scheme.
    """
    x, scheme = _dense(x), as_scheme(scheme)
    if isinstance(variance, bool) or not isinstance(variance, int | float):
        raise TypeError(f"variance must be a number, got {variance!r}")
    if not 0 <= variance < math.inf:
        raise ValueError(f"variance must be at least 0 and finite, got {variance}; 1 is that of rounding")
    if preserve not in ("mean", "mean+var"):
        raise ValueError(f'preserve must be "mean" or "mean+var", got {preserve!r}')
    if scheme.levels != "uniform":
        raise ValueError("levels of a table have no one step to take the noise from; use uniform levels")
    nearest = Rounding.nearest().op_args()
    with torch.no_grad():
        _, scales, _ = ops.quantize(x, *scheme.op_args(), *nearest, False)
        widths = scales.float().abs() * math.sqrt(variance)
    draws = Rounding.stochastic(seed, step, stream)
    return ops.inject_noise(x, widths, scheme.group_size or 0, preserve == "mean+var", *draws.op_args())


def _dense(x: Tensor) -> Tensor:
    """x, or the array x, as a tensor. Raises `TypeError` for what is none, or sparse."""
    found = as_tensor(x, "x")
    if found.layout is not torch.strided:
        raise TypeError(f"x is sparse ({found.layout}); pass a dense tensor, x.to_dense()")
    return found
