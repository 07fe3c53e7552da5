"""What the driver is handed at a launch: here it is one of this file's own, so no GPU is needed."""

from __future__ import annotations

import ctypes
import gc
import re
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from turboquant_rs import Rounding, Scheme, ops
from turboquant_rs.errors import BackendUnavailable
from turboquant_rs.ops.cuda import int8, launcher, matmul, quantize, refined, tiles
from turboquant_rs.ops.cuda import planes as cuda_planes
from turboquant_rs.ops.cuda.launcher import Call, Kernel
from turboquant_rs.ops.cuda.limits import Limits
from turboquant_rs.ops.cuda.matmul import matmul_out
from turboquant_rs.ops.cuda.refined import matmul_refined_out
from turboquant_rs.scheme import NESTED_PLANES, static_planes

EARLY = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h."""

HOPPER = Limits(132, 227 * 1024, (9, 0))

FUNCTION, STREAM = 0x7F0000001000, 0x7F0000002000


class Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: a union of 64 bytes behind its name."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("_", ctypes.c_uint),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


@dataclass
class Driver:
    """Notes its launches, of a kernel with so many arguments of 8 bytes."""

    arguments: int = 3
    code: int = 0

    def __post_init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.POINTER(Config),
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)),
            ctypes.c_void_p,
        )
        self.cuLaunchKernelEx = kind(self._launch)

    def _launch(self, config: Any, function: int, arguments: Any, extra: int | None) -> int:
        assert function == FUNCTION and extra is None
        told = config.contents
        early = [(told.attributes[i].id, told.attributes[i].value) for i in range(told.count)]
        words = [arguments[i][0] for i in range(self.arguments)]
        self.seen.append(
            {"sizes": tuple(told.sizes), "stream": told.stream, "attributes": early, "arguments": words}
        )
        return self.code

    def cuGetErrorString(self, code: int, text: Any) -> None:
        text._obj.value = b"no such stream"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(launcher, "_driver", lambda: made)
    monkeypatch.setattr(launcher, "_launch_address", launcher._launch_address.__wrapped__)
    monkeypatch.setattr(launcher, "raw_stream", lambda device: STREAM)
    monkeypatch.setattr(launcher, "current_device", lambda: 0)
    monkeypatch.setattr(launcher._THREAD, "device", 0)
    monkeypatch.setattr(launcher._THREAD, "plain", 0)
    monkeypatch.setattr(Kernel, "load", lambda self, device: SimpleNamespace(ptr=FUNCTION))
    return made


@pytest.mark.parametrize("early", (False, True))
def test_the_driver_gets_sizes_stream_arguments_and_whether_the_kernel_may_start_early(
    driver: Driver, early: bool
) -> None:
    call = Call(Kernel("any.cu", "any"), 0, (5, 2), (32,), 1024, early)
    call(FUNCTION, -(2**63), 2**63 - 1)
    assert driver.seen == [
        {
            "sizes": (5, 2, 1, 32, 1, 1, 1024),
            "stream": STREAM,
            "attributes": [(EARLY, 1)] if early else [],
            "arguments": [FUNCTION, -(2**63), 2**63 - 1],
        }
    ]


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_driver", object)
    with pytest.raises(BackendUnavailable, match="R520"):
        launcher._launch_address.__wrapped__()


def test_what_the_driver_refuses_is_an_error_in_its_words(driver: Driver) -> None:
    driver.code = 400
    with pytest.raises(RuntimeError, match=r"refused to launch Kernel\('any.cu'.*error 400.*no such stream"):
        Call(Kernel("any.cu", "any"), 0, (1,), (32,))(1, 2, 3)


STACKS = [*map(static_planes, range(1, 9)), *NESTED_PLANES]


@pytest.mark.parametrize("planes", STACKS, ids=str)
def test_no_kernel_has_more_arguments_than_a_launch_takes(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, planes: tuple[int, ...]
) -> None:
    """A tensor map of 16 words for x and for each plane; besides, a graph tells it what chooses it."""
    monkeypatch.setattr(tiles, "tensor_map", lambda *_: (0,) * 16)
    monkeypatch.setattr(tiles, "limits_of", lambda _: HOPPER)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(Kernel, "chosen", property(lambda self: self))
    weight = tiles.Weight(planes, 0, 0, True, 0, 64)
    call = tiles.call_of.__wrapped__(weight, True, 64, 200, 512, 0)
    assert isinstance(call, tiles.WideCall)
    operands = (1, 2, 3, 4, 5, 6, 7, 64, 200, 512)  # x becomes a map
    driver.arguments = len(operands) - 1 + 16 * (1 + len(planes))
    call(*operands)
    assert driver.seen[-1]["arguments"][:9] == list(operands[1:])
    driver.arguments += 2
    with launcher.only_if(8, 1):
        call(*operands)
    assert driver.seen[-1]["arguments"][:11] == [8, 1, *operands[1:]]


@pytest.mark.parametrize(
    "planes", [(1,) * 8, (1,) * 7, (3, 1), (2, 2), (1, 2), (5,), (16,), (0, 4), ()], ids=str
)
def test_planes_that_the_number_format_has_not_are_refused_before_anything_is_launched(
    planes: tuple[int, ...],
) -> None:
    """With the CPU's words. Kernels take widths of 8, 4, 2 and 1, and six of them at most."""
    bits = sum(planes)
    expected = rf"planes {re.escape(str(list(planes)))} do not store {bits} bits; use "
    with pytest.raises(ValueError, match=expected):
        cuda_planes.kernel.__wrapped__("pack_codes", planes, 1, True)
    if 1 <= bits <= 8:
        scheme, nearest = Scheme(bits=bits).op_args(), Rounding.nearest().op_args()
        key = quantize.plan_key((*scheme, *nearest))
        with pytest.raises(ValueError, match=expected + r"\["):
            quantize.pack_plan.__wrapped__(torch.float32, planes, False, False, 4, 64, True, *key)
        with pytest.raises(ValueError, match=expected + r"\["):
            quantize.unpack_plan.__wrapped__(torch.float32, planes, bits, 4, 64, True, *key)
        for m in (1, 64):
            with pytest.raises(ValueError, match=expected + r"\["):
                tiles.launch.__wrapped__(tiles.Weight(planes, 0, 0, True, 0, 64), True, m, 64, 64, HOPPER)


def test_more_rows_of_x_than_a_grid_has_blocks_for_are_multiplied_in_parts(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid has at most 65535 blocks in y. Only the launches are looked at; nothing is multiplied."""
    monkeypatch.setattr(int8, "limits_of", lambda _: Limits(108, 163 * 1024, (8, 0)))
    monkeypatch.setattr(int8, "device_of", lambda *_: 0)
    rows: list[tuple[int, int, int]] = []

    def run(plan: int8.Plan, scheme: Any, planes: Any, x: int, packed: Any, tail: Any, device: int) -> None:
        *_, out, m, n = tail
        grid = plan.shape.grid(m, n)
        assert max(grid) <= 65535 and plan.shape.m_tile * grid[1] >= m
        rows.append((m, x, out))

    monkeypatch.setattr(int8, "_run", run)
    scheme, m = Scheme(bits=8, group_size=None), 2 * int8.MOST_ROWS + 5
    packed, scales, none = (
        torch.empty(4 * 32, dtype=torch.uint8),
        torch.empty(4, 1).bfloat16(),
        torch.empty(0),
    )
    stored = (packed, scales, none.byte())
    x, out = torch.empty(m, 32, dtype=torch.bfloat16), torch.empty(m, 4, dtype=torch.bfloat16)
    about = quantize.named(quantize.plan_key((*scheme.op_args(), *Rounding.nearest().op_args())))
    int8.multiply(x, *stored, None, *about, scheme.widths, 8, out)
    begins = (0, int8.MOST_ROWS, 2 * int8.MOST_ROWS)
    assert rows == [
        (min(int8.MOST_ROWS, m - at), x.data_ptr() + 64 * at, out.data_ptr() + 8 * at) for at in begins
    ]
    product = int8.Product(4, 32, *scheme.op_args(), *Rounding.nearest().op_args(), scheme.widths, 8)
    assert product._prepared(torch.bfloat16, x.shape, 0, True) is None  # which asks the operator


@pytest.mark.parametrize(
    ("scheme", "m", "expected"),
    [
        (Scheme(bits=8, group_size=128), 32, int8.Block),
        (Scheme(bits=8, group_size=128), 33, int8.Groups),
        (Scheme(bits=6, group_size=128), 33, int8.Groups),
        (Scheme(bits=8, group_size=128, symmetric=False), 64, int8.Block),
        (Scheme(bits=4, group_size=128), 64, int8.Block),
        (Scheme(bits=4, group_size=128), 65, int8.Groups),
        (Scheme(bits=4, group_size=32), 17, int8.Groups),
        (Scheme(bits=4, group_size=32), 16, int8.Block),
        (Scheme(bits=4, group_size=256), 33, int8.Groups),
    ],
    ids=str,
)
def test_where_w_has_few_rows_its_bytes_decide_which_kernel_multiplies_integers(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, scheme: Scheme, m: int, expected: type
) -> None:
    monkeypatch.setattr(int8, "limits_of", lambda _: HOPPER)
    about = quantize.named(quantize.plan_key((*scheme.op_args(), *Rounding.nearest().op_args())))
    sizes = (m, 4096, 4096, torch.bfloat16, True, True, 0)
    plan = int8.plan_of.__wrapped__(*about, tuple(scheme.widths), scheme.bits, *sizes)
    assert type(plan.shape) is expected


def test_what_was_refused_is_forgotten_once_it_is_read_whatever_mode_is_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that refuses is played here. The report is made by the first launch of a thread."""
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *args, pin_memory: full(*args))
    monkeypatch.setattr(quantize, "wait", lambda device: None)
    with torch.inference_mode():
        report = quantize.Report()
    for _ in range(2):
        assert report.wait(0) is None
        ctypes.c_int64.from_address(report.address + 8).value = 5
        assert report.wait(0) == [2**63 - 1, 5, 2**63 - 1]
    assert report.wait(0) is None


def operands() -> dict[str, torch.Tensor]:
    """Those of a product, as far as they can be without a GPU."""
    cuda = partial(torch.empty, device="cuda")
    return {
        "x": cuda(2, 64, dtype=torch.bfloat16),
        "packed": cuda(ops.tiles.tiles_nbytes(16, 64, 8), dtype=torch.uint8),
        "scales": cuda(16, 2, dtype=torch.bfloat16),
        "zero_points": cuda(0, dtype=torch.uint8),
        "bias": cuda(16),
    }


def multiply(layout: str, activations: str, out: torch.Tensor, **given: torch.Tensor) -> None:
    """The operators' implementations; `activations` "refined" is the one whose rows choose their bits."""
    scheme = Scheme.nested(group_size=32)
    given = {**operands(), **given}
    args = (*given.values(), *scheme.op_args(), *Rounding.nearest().op_args(), scheme.widths, 4)
    if activations == "refined":
        refined = torch.empty(2, dtype=torch.bool, device="cuda")
        matmul_refined_out(*args, 8, 0.5, layout, 16, out, refined)
    else:
        matmul_out(*args, activations, layout, 16, out)


KINDS = [("canonical", "int8"), ("canonical", "float"), ("canonical", "refined"), ("tiles", "float")]


@pytest.mark.parametrize(("layout", "activations"), KINDS)
def test_a_product_refuses_memory_that_its_kernels_would_reach_beyond(layout: str, activations: str) -> None:
    """Before one of them does, after which nothing works on that GPU any more; with the CPU's words."""
    with FakeTensorMode():
        y = partial(torch.empty, dtype=torch.bfloat16, device="cuda")
        for name in ("packed", "scales", "zero_points", "bias"):
            here = torch.empty_like(operands()[name], device="cpu")
            with pytest.raises(ValueError, match="operands are on cuda:0 and cpu; move them to one device"):
                multiply(layout, activations, y(2, 16), **{name: here})
        for out in (y(1, 16), y(3, 16), y(2, 15)):
            with pytest.raises(ValueError, match=f"out has {out.numel()} elements where rows=2, k=16"):
                multiply(layout, activations, out)
        with pytest.raises(ValueError, match="bias has 15 elements where rows=1, k=16 need 16"):
            multiply(layout, activations, y(2, 16), bias=y(15))
        with pytest.raises(TypeError, match=r"packed must be torch.uint8, got torch.int32"):
            multiply(layout, activations, y(2, 16), packed=operands()["packed"].int())
        with pytest.raises(TypeError, match=r"x must be float32, .* got torch.int32; convert it first"):
            multiply(layout, activations, y(2, 16), x=torch.empty(2, 64, dtype=torch.int32, device="cuda"))


@pytest.mark.parametrize(("layout", "activations"), KINDS)
def test_results_of_another_dtype_than_x_are_converted(
    monkeypatch: pytest.MonkeyPatch, layout: str, activations: str
) -> None:
    seen: list[torch.dtype] = []
    for module in (int8, tiles):
        monkeypatch.setattr(module, "takes", lambda *_: True)
        monkeypatch.setattr(module, "multiply", lambda *args: seen.append(args[-1].dtype))
    monkeypatch.setattr(refined, "decide", lambda *_: SimpleNamespace(data_ptr=lambda: 0))
    monkeypatch.setattr(matmul, "by_dequantized", lambda *args: seen.append(args[-1].dtype))
    with FakeTensorMode():
        multiply(layout, activations, torch.empty(2, 16, device="cuda"))
    assert seen and set(seen) == {torch.bfloat16}


def test_what_is_loaded_stays_loaded_when_its_kernel_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph may launch it as long as that lives, and unloading ends a capture that goes on meanwhile."""

    class Module:
        def load(self, cubin: bytes) -> None:
            self.cubin = cubin

        def get_function(self, entry: str) -> SimpleNamespace:
            return SimpleNamespace(module=self)  # as CuPy's, which unloads with the last function

    library = SimpleNamespace(Module=Module, runtime=SimpleNamespace(setDevice=lambda device: None))
    monkeypatch.setattr(launcher, "cupy", lambda: library)
    monkeypatch.setattr(launcher, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(launcher, "_unwatched", nullcontext)
    monkeypatch.setattr(launcher, "_LOADED", [])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(Kernel, "compile", lambda self, arch: b"")
    kernel = Kernel("any.cu", "any")
    module = weakref.ref(kernel.load(0).module)
    assert kernel.load(0).module is module()
    del kernel
    gc.collect()
    assert module() is not None


def test_a_kernel_gets_at_most_128_arguments_each_of_64_bits(driver: Driver) -> None:
    call, driver.arguments = Call(Kernel("any.cu", "any"), 0, (1,), (32,)), 128
    call(*range(128))
    assert driver.seen[0]["arguments"] == list(range(128))
    with pytest.raises(ValueError, match=r"129 arguments of a kernel are too many; it has at most 128"):
        call(*range(129))
    with pytest.raises(OverflowError):
        call(2**63)
    with pytest.raises(TypeError):
        call(1.5)  # type: ignore[arg-type]  # a float is what has to be refused
    assert len(driver.seen) == 1
