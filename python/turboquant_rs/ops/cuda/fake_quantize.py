"""What a quantized tensor decodes to, its gradients, noise: `cuda/fake_quantize.cu` and `cuda/noise.cu`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from turboquant_rs.ops import reference
from turboquant_rs.ops.cuda.launcher import Kernel
from turboquant_rs.ops.cuda.macros import aligned, check_dtype, check_length, check_written, device_of
from turboquant_rs.ops.cuda.quantize import (
    HELD,
    NEAREST,
    Launch,
    Memory,
    Plan,
    Report,
    Team,
    check_source,
    draw_macros,
    encoder_launch,
    encoder_macros,
    group_length,
    in_order,
    named,
    plan_key,
    raise_refused,
    report,
    shape_words,
    team_grid,
    team_macros,
)
from turboquant_rs.ops.schema import RoundingArgs, SchemeArgs, groups_per_row, rows_and_k


@cache
def kernel(entry: str, macros: tuple[tuple[str, object], ...]) -> Kernel:
    """`fake_quantize` or `fake_quantize_backward` of fake_quantize.cu."""
    return Kernel("fake_quantize.cu", entry, dict(macros))


@cache
def noise_kernel(macros: tuple[tuple[str, object], ...]) -> Kernel:
    """`inject_noise` of noise.cu."""
    return Kernel("noise.cu", "inject_noise", dict(macros))


def macros(
    dtype: torch.dtype,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    k: int,
    whole: bool,
    *,
    given: bool,
    read_bits: int,
    tensors: int = 1,
) -> dict[str, object]:
    """What fake_quantize.cu is compiled for; `whole` as for `quantize.team_macros`, `tensors` as for
    `quantize.encoder_macros`."""
    names = encoder_macros(dtype, scheme, rounding, k, whole, given=given, tensors=tensors)
    return {**names, "REST": scheme.bits - read_bits}


def noise_team(k: int, group_size: int) -> Team:
    """The team of a group that gets its noise."""
    return Team.of(group_length(k, group_size), HELD)


def noise_macros(
    dtype: torch.dtype, rounding: RoundingArgs, preserve: bool, k: int, group_size: int, whole: bool
) -> dict[str, object]:
    """What noise.cu is compiled for; `whole` as for `quantize.team_macros`."""
    # Noise has the draws of 32 bits that iid rounding would have, for another purpose.
    drawn = rounding._replace(mode="iid", draw_bits=32, variance=1.0)
    team = noise_team(k, group_size)
    return {
        **team_macros(team, dtype, k, group_size, whole),
        **draw_macros(drawn, in_order(team, k, group_size)),
        "PRESERVE": preserve,
    }


@lru_cache(maxsize=4096)
def plan(
    entry: str,
    dtype: torch.dtype,
    given: bool,
    read_bits: int,
    rows: int,
    k: int,
    whole: bool,
    *key: Any,
) -> Plan:
    """How x `(rows, k)` passes through `entry`; `whole` as for `quantize.team_macros`."""
    scheme, rounding = named(key)
    check_source(dtype)
    reference.check_fake_quantize(scheme, rounding, given, read_bits)
    reference.check_rounding(scheme, rounding, k)
    memory = Memory.of(scheme, rounding, (), rows, k)
    if rows * k == 0:
        return Plan(memory, None)
    tensors = 2 if entry == "fake_quantize_backward" else 1
    names = macros(dtype, scheme, rounding, k, whole, given=given, read_bits=read_bits, tensors=tensors)
    launch = encoder_launch(kernel(entry, tuple(names.items())), dtype, scheme, rounding, rows, k)
    return Plan(memory, launch)


@lru_cache(maxsize=4096)
def noise_launch(
    dtype: torch.dtype, preserve: bool, group_size: int, offset: int, rows: int, k: int, whole: bool
) -> Launch:
    """How x `(rows, k)`, not empty, gets its noise; `whole` as for `quantize.team_macros`."""
    check_source(dtype)
    rounding = RoundingArgs(*NEAREST)._replace(offset=offset)
    names = noise_macros(dtype, rounding, preserve, k, group_size, whole)
    return Launch(
        noise_kernel(tuple(names.items())),
        *team_grid(noise_team(k, group_size), rows, k, group_size),
        shape_words(rows, k, group_size, offset),
        (),
    )


# The operators --------------------------------------------------------------------------------------------


def fake_quantize_out(x: Tensor, *args: Any) -> None:
    """Quantize and dequantize x `(..., k)` into out, on `given` scales or filling scales and zero_points."""
    given, read_bits, scales, zero_points, out = args[15:]
    check_written(scales, zero_points, out)
    x, own = x.contiguous(), report()
    _check_like(x, out)
    _run("fake_quantize", (x,), args[:15], given, read_bits, scales, zero_points, (out,), own)
    raise_refused(own, x.get_device(), reference.fake_quantize_out, x, *args)


def fake_quantize_backward_out(
    grad: Tensor, x: Tensor, scales: Tensor, zero_points: Tensor, *args: Any
) -> None:
    """The gradients of `fake_quantize` in x `(..., k)` and, f32, in the scales `(..., groups)` it used."""
    read_bits, grad_x, grad_scales = args[7:]
    check_written(grad_x, grad_scales)
    grad, x, own = grad.contiguous(), x.contiguous(), report()
    _check_like(x, grad, grad_x)
    check_dtype("grad_scales", grad_scales, torch.float32)
    check_length("grad_scales", grad_scales, scales.numel(), *rows_and_k(x.shape))
    numbers, outputs = (scales.contiguous(), zero_points.contiguous()), (grad_x, grad_scales)
    rounding = (*args[:7], *NEAREST)
    _run("fake_quantize_backward", (grad, x), rounding, True, read_bits, *numbers, outputs, own)
    given = (grad, x, scales, zero_points)
    raise_refused(own, x.get_device(), reference.fake_quantize_backward_out, *given, *args)


def _run(
    entry: str,
    inputs: tuple[Tensor, ...],
    args: Sequence[Any],
    given: bool,
    read_bits: int,
    scales: Tensor,
    zero_points: Tensor,
    outputs: tuple[Tensor, ...],
    own: Report | None,
) -> None:
    """Launches `entry`, whose last input is x; args: SCHEME and ROUNDING."""
    x = inputs[-1]
    rows, k = rows_and_k(x.shape)
    whole = aligned(*inputs, outputs[0])
    found = plan(entry, x.dtype, given, read_bits, rows, k, whole, *plan_key(args))
    found.memory.check_groups(scales, zero_points)
    tensors = (*inputs, scales, zero_points, *outputs)
    device = device_of(*tensors)
    if found.launch is not None:
        pointers = (*(tensor.data_ptr() for tensor in tensors), own.address if own else 0)
        found.launch(device, pointers, args[8:11])


def inject_noise_out(x: Tensor, widths: Tensor, group_size: int, preserve: bool, *args: Any) -> None:
    """Add uniform noise of ±width / 2 to x `(..., k)`, one of the f32 widths `(..., groups)` a group."""
    *rounding, out = args
    check_written(out)
    rows, k = rows_and_k(x.shape)
    x, widths, own = x.contiguous(), widths.contiguous(), report()
    _check_like(x, out)
    check_dtype("widths", widths, torch.float32)
    check_length("widths", widths, rows * groups_per_row(k, group_size), rows, k)
    device = device_of(x, widths, out)
    if x.numel() == 0:
        return
    _mode, seed, step, stream, *_, offset = rounding
    launch = noise_launch(x.dtype, preserve, group_size, offset, rows, k, aligned(x, out))
    pointers = (x.data_ptr(), widths.data_ptr(), out.data_ptr(), own.address if own else 0)
    launch(device, pointers, (seed, step, stream))
    raise_refused(own, device, reference.inject_noise_out, x, widths, group_size, preserve, *args)


def _check_like(x: Tensor, *others: Tensor) -> None:
    """Refuses tensors of another length or dtype than x."""
    for other in others:
        check_length("a tensor beside x", other, x.numel(), *rows_and_k(x.shape))
        check_dtype("a tensor beside x", other, x.dtype)
