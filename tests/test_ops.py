"""The operators as PyTorch sees them: schemas, shape rules, dispatch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import turboquant_rs as tq
from backends import NEAREST, assert_identical
from turboquant_rs import Rounding, Scheme, ops
from turboquant_rs.ops import schema

SCHEMES = {
    "symmetric": (Scheme(bits=4, group_size=32), NEAREST),
    "asymmetric": (Scheme(bits=3, group_size=None, symmetric=False), NEAREST),
    "table": (Scheme(bits=4, levels="nf4"), NEAREST),
    "nested": (Scheme.nested(), NEAREST),
    "stochastic": (Scheme(bits=5), Rounding.stochastic(1, mode="systematic")),
    "preserving": (Scheme(bits=8, scale_dtype="f32"), Rounding.stochastic(1, preserve="mean+var")),
}


def calls(scheme: Scheme, rounding: Rounding) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator, for the same small tensor."""
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    args = (*scheme.op_args(), *rounding.op_args())
    planes, bits = list(scheme.planes), scheme.bits
    packed, scales, zero_points = ops.pack(x, *args, planes, False)
    codes = ops.unpack_codes(packed, planes, bits, [3, 70])
    stored = (packed, scales, zero_points)
    activations = "float" if rounding.op_args()[6] else "int8"
    product = (torch.randn(2, 70), *stored, torch.randn(3), *args, planes, bits, activations, "canonical", 3)
    # Rows choose their bits, and values, gradients and given scales are, of codes rounded to nearest.
    nearest = (*scheme.op_args(), *NEAREST.op_args())
    low = bits if scheme.levels != "uniform" else planes[0]
    refined = (product[0], *ops.pack(x, *nearest, planes, False), product[4], *nearest, planes, low, bits)
    refined = (*refined, 0.2, "canonical", 3)
    panels = ops.to_panels(*stored, *scheme.op_args(), planes, 70)
    numbers = ops.quantize(x, *nearest, False)[1:]
    noise = (x, torch.ones(3, scales.shape[1]), scheme.group_size or 0, args[13], *args[7:])
    backward = (x, x, *numbers, *scheme.op_args(), bits)
    return {
        "encode": (x, *numbers, *scheme.op_args(), planes),
        "fake_quantize": (x, *numbers, *nearest, bits),
        "fake_quantize_backward": backward,
        "inject_noise": noise,
        "encode_out": (x, *numbers, *scheme.op_args(), planes, torch.empty_like(packed)),
        "fake_quantize_out": (x, *nearest, False, bits, *map(torch.empty_like, numbers), torch.empty_like(x)),
        "fake_quantize_backward_out": (*backward, torch.empty_like(x), torch.empty(scales.shape)),
        "inject_noise_out": (*noise, torch.empty_like(x)),
        "pack": (x, *args, planes, False),
        "quantize": (x, *args, False),
        "unpack": (*stored, *args, planes, bits, [3, 70], torch.bfloat16),
        "dequantize": (codes, scales, zero_points, *args, torch.float32),
        "pack_codes": (codes, planes),
        "unpack_codes": (packed, planes, bits, [3, 70]),
        "matmul": product,
        "matmul_refined": refined,
        "to_panels": (*stored, *scheme.op_args(), planes, 70),
        "from_panels": (*panels, *scheme.op_args(), planes, 3, 70),
        "pack_out": (x, *args, planes, False, *(torch.empty_like(part) for part in stored)),
        "unpack_out": (*stored, *args, planes, bits, torch.empty(3, 70)),
        "pack_codes_out": (codes, planes, torch.empty_like(packed)),
        "unpack_codes_out": (packed, planes, bits, torch.empty_like(codes)),
        "matmul_out": (*product, torch.empty(2, 3)),
        "matmul_refined_out": (*refined, torch.empty(2, 3), torch.empty(2, dtype=torch.bool)),
        "to_panels_out": (*stored, *scheme.op_args(), planes, 70, *map(torch.empty_like, panels)),
        "from_panels_out": (*panels, *scheme.op_args(), planes, 70, *map(torch.empty_like, stored)),
    }


OPERATORS = (*schema.RULES, *schema.OUT_OPS)


def test_every_operator_is_tried_below() -> None:
    assert sorted(calls(*SCHEMES["symmetric"])) == sorted(OPERATORS)


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, kind: str) -> None:
    """Schema, aliasing, shape rules (dynamic shapes included) and tracing, by PyTorch's own checks."""
    torch.library.opcheck(getattr(ops, name), calls(*SCHEMES[kind])[name])


@pytest.mark.parametrize("kind", SCHEMES)
def test_shape_rules_give_the_shapes_and_dtypes_of_the_results(kind: str) -> None:
    for name, args in calls(*SCHEMES[kind]).items():
        if name in schema.OUT_OPS:
            continue
        meta = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args]
        real, ruled = getattr(ops, name)(*args), getattr(ops, name)(*meta)
        if isinstance(real, Tensor):
            real, ruled = (real,), (ruled,)
        for a, b in zip(real, ruled, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), name


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 70), (1,), (2, 3, 70)])
def test_shape_rules_of_odd_shapes(shape: tuple[int, ...]) -> None:
    for scheme, rounding in SCHEMES.values():
        args = (*scheme.op_args(), *rounding.op_args(), list(scheme.planes), False)
        for a, b in zip(
            ops.pack(torch.ones(shape), *args), ops.pack(torch.ones(shape, device="meta"), *args), strict=True
        ):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("kind", SCHEMES)
def test_the_operators_that_return_are_the_ones_that_fill(kind: str) -> None:
    scheme, rounding = SCHEMES[kind]
    arguments = calls(scheme, rounding)
    names = ("pack", "encode", "inject_noise", "pack_codes", "unpack_codes", "matmul", "matmul_refined")
    for name in (*names, "to_panels"):
        # The shape, the last argument of unpack_codes, is that of the memory to fill.
        inputs = arguments[name][: -1 if name == "unpack_codes" else None]
        result = getattr(ops, name)(*arguments[name])
        outputs = result if isinstance(result, tuple) else (result,)
        filled = tuple(torch.empty_like(part) for part in outputs)
        getattr(ops, f"{name}_out")(*inputs, *filled)
        for a, b in zip(filled, outputs, strict=True):
            assert_identical(a, b, name)


def test_operators_can_be_compiled() -> None:
    """Traced whole, with shapes that change from call to call."""
    scheme = Scheme(bits=4, group_size=32)
    args = (*scheme.op_args(), *NEAREST.op_args())

    def round_trip(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        stored = ops.pack(x, *args, [4], False)
        values = ops.unpack(*stored, *args, [4], 4, x.shape, torch.float32)
        return values, ops.matmul(y, *stored, None, *args, [4], 4, "int8", "canonical", x.shape[0])

    compiled = torch.compile(round_trip, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, k in ((3, 64), (5, 100), (2, 33)):
        x, y = torch.randn(rows, k), torch.randn(4, k)
        for a, b in zip(compiled(x, y), round_trip(x, y), strict=True):
            assert_identical(a, b)


def test_outputs_are_contiguous() -> None:
    scheme = Scheme(bits=4, group_size=32)
    args = (*scheme.op_args(), *NEAREST.op_args())
    stored = ops.pack(torch.ones(4, 32), *args, [4], False)
    with pytest.raises(ValueError, match=r"outputs are contiguous, got strides \(1, 4\)"):
        ops.unpack_out(*stored, *args, [4], 4, torch.empty(32, 4).t())


def test_buffers_of_the_wrong_length_are_refused() -> None:
    scheme = Scheme(bits=4, group_size=32)
    args = (*scheme.op_args(), *NEAREST.op_args())
    packed, scales, zero_points = ops.pack(torch.ones(4, 32), *args, [4], False)
    with pytest.raises(ValueError, match="packed has 63 elements"):
        ops.unpack(packed[:-1].clone(), scales, zero_points, *args, [4], 4, [4, 32], torch.float32)
    with pytest.raises(ValueError, match="scales has 3 elements"):
        ops.unpack(packed, scales[:-1], zero_points, *args, [4], 4, [4, 32], torch.float32)


def cpu_flags() -> set[str]:
    """The instruction sets that the host itself names (Linux); empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return set(flags.split(":", 1)[1].split())


AVX2 = {"avx2", "fma"}
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@pytest.mark.parametrize(("isa", "flags"), [("avx2", AVX2), ("avx512", AVX512), ("neon", {"asimd"})])
def test_what_the_cpu_has_is_used(isa: str, flags: set[str]) -> None:
    """Tests of an instruction set are skipped where the CPU lacks it, and only there."""
    if flags <= cpu_flags():
        assert isa in ops.cpu.available_isas()


def test_the_widest_instruction_set_is_active_and_any_can_be_forced() -> None:
    available = ops.cpu.available_isas()
    assert set(available) <= set(ops.cpu.compiled_isas())
    try:
        for isa in available:
            ops.cpu.force_isa(isa)
            assert ops.cpu.active_isa() == isa
    finally:
        ops.cpu.force_isa(None)
    with pytest.raises(ValueError, match=r'"sse9" is not available here'):
        ops.cpu.force_isa("sse9")


FORKED = """
import os, torch
from turboquant_rs import Scheme, Rounding, ops
torch.set_num_threads(2)
args = (*Scheme().op_args(), *Rounding.nearest().op_args(), [4], False)
x = torch.randn(512, 4096)
before = ops.pack(x, *args)
child = os.fork()
after = ops.pack(x, *args)
# Not by torch.equal: where PyTorch's own threads have run, its operators may wait for them in a child.
memory = lambda tensors: [t.view(torch.uint8).numpy().tobytes() for t in tensors]
same = memory(before) == memory(after)
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    """Data loaders fork: a child that waited for its parent's threads would wait for ever."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=120)


def test_autograd_is_told_of_what_is_written() -> None:
    """What it has kept of memory that was filled again gives no gradient, instead of a wrong one."""
    p, w = tq.pack(torch.randn(4, 64)), torch.randn(4, 64, requires_grad=True)
    kept = torch.randn(4, 64)
    for write in (
        lambda: tq.unpack(p, out=kept),
        lambda: ops.unpack_out(*p._stored, *p._op_args(), 4, kept),
    ):
        loss = (w * kept).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    y = tq.matmul(w, p)
    tq.pack(torch.randn(4, 64), out=p)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        assert torch.equal(tq.unpack(p, out=torch.empty(4, 64)), p.dequantize())
        ops.unpack_out(*p._stored, *p._op_args(), 4, kept)
