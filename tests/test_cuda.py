"""The CUDA backend where it differs from the others: streams, graphs, devices, and waiting for errors.

What it computes is tested with every other backend, by the `backend` and `compiled` fixtures.
"""

from __future__ import annotations

import copy
import hashlib
import math
import threading

import pytest
import torch
from torch import Tensor, nn

import turboquant_rs as tq
from backends import assert_identical
from test_bit_identity import CASES, raw, rounding
from turboquant_rs import Rounding, Scheme, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODES = ("iid", "antithetic", "stratified", "systematic", "subtractive")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def digest(p: tq.PackedTensor) -> str:
    """SHA-256 of everything that is stored."""
    parts = [part for part in (p.packed, p.scales, p.zero_points) if part is not None]
    return hashlib.sha256(b"".join(map(raw, parts))).hexdigest()


# The same bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cpu_and_gpu_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """Packed and decoded; rows of whole groups, of a short last one, and of no whole unit."""
    scheme, mode = CASES[name]
    for shape in ((16, 512), (5, 1000), (3, 77)):
        x = normal(*shape).to(dtype)
        there, here = (
            tq.pack(x.cuda(), scheme=scheme, rounding=mode),
            tq.pack(x, scheme=scheme, rounding=mode),
        )
        assert digest(there) == digest(here), shape
        for target in (dtype, torch.float32):
            assert_identical(there.dequantize(dtype=target), here.dequantize(dtype=target), (shape, target))


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("k", [1, 8, 9, 128, 1024, 2048, 4096, 5000, 14336, 32768, 40000, 100001])
def test_groups_of_any_length(k: int, mode: str | None) -> None:
    """From one thread to a block that reads its group again and again."""
    way = Rounding.nearest() if mode is None else rounding(mode=mode)
    x = normal(3, k, seed=k)
    for scheme in (Scheme(bits=4, group_size=None), Scheme(bits=8, group_size=None, symmetric=False)):
        there, here = tq.pack(x.cuda(), scheme=scheme, rounding=way), tq.pack(x, scheme=scheme, rounding=way)
        assert digest(there) == digest(here), scheme
        assert_identical(there.dequantize(), here.dequantize(), scheme)


@pytest.mark.parametrize("k", [64, 1000, 5000, 40000])
def test_sums_of_groups_of_any_length(k: int) -> None:
    """Whatever adds up a group: one bit, mse, rms and mean+var."""
    x = normal(2, k, seed=k)
    for scheme, way in (
        (Scheme(bits=1, group_size=None), Rounding.nearest()),
        (Scheme(bits=3, group_size=None, scale="mse"), Rounding.nearest()),
        (Scheme(bits=4, group_size=None, levels="lloyd"), Rounding.nearest()),
        (Scheme(bits=4, group_size=None), rounding(preserve="mean+var")),
    ):
        there, here = tq.pack(x.cuda(), scheme=scheme, rounding=way), tq.pack(x, scheme=scheme, rounding=way)
        assert digest(there) == digest(here), scheme


def test_strided_tensors_and_views_off_the_grid() -> None:
    x = normal(64, 257)
    for view in (lambda x: x.t(), lambda x: x[:, 1:], lambda x: x[3:, :256], lambda x: x.view(-1)[5:]):
        assert digest(tq.pack(view(x.cuda()))) == digest(tq.pack(view(x)))


# Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -(2.0**121)])
def test_values_outside_the_domain_are_the_same_errors(value: float) -> None:
    x = normal(9, 333)
    x[2, 17], x[7, 100] = value, math.nan
    with pytest.raises(ValueError) as here:
        tq.pack(x)
    with pytest.raises(ValueError) as there:
        tq.pack(x.cuda())
    assert str(there.value).partition(" = ")[0] == str(here.value).partition(" = ")[0]
    tq.pack(normal(9, 333).cuda())  # and nothing of it stays behind


def test_a_scale_that_f16_cannot_hold_is_the_same_error() -> None:
    x = normal(4, 128)
    x[2, 5] = 1e7
    for tensor in (x, x.cuda()):
        with pytest.raises(ValueError, match="the scale of group 4 exceeds the largest finite f16 value"):
            tq.pack(tensor, scale_dtype="f16")


def test_operands_on_two_devices_are_refused() -> None:
    p = tq.pack(normal(4, 64).cuda())
    with pytest.raises(ValueError, match="x is on cpu and p on cuda"):
        tq.matmul(normal(2, 64), p)
    with pytest.raises(ValueError, match=r"out is .* on cpu"):
        tq.unpack(p, out=torch.empty(4, 64))
    scheme = Scheme()
    args = (*scheme.op_args(), *Rounding.nearest().op_args(), [4], 4)
    with pytest.raises((ValueError, RuntimeError), match=r"cuda|device"):
        ops.unpack(p.packed, p.scales.cpu(), torch.empty(0, dtype=torch.uint8), *args, [4, 64], torch.float32)


def test_buffers_of_the_wrong_length_are_refused() -> None:
    scheme = Scheme(bits=4, group_size=32)
    args = (*scheme.op_args(), *Rounding.nearest().op_args())
    packed, scales, zero_points = ops.pack(torch.ones(4, 32).cuda(), *args, [4], False)
    with pytest.raises(ValueError, match="packed has 63 elements"):
        ops.unpack(packed[:-1].clone(), scales, zero_points, *args, [4], 4, [4, 32], torch.float32)
    with pytest.raises(ValueError, match="scales has 3 elements"):
        ops.unpack(packed, scales[:-1], zero_points, *args, [4], 4, [4, 32], torch.float32)
    with pytest.raises(ValueError, match=r"outputs are contiguous, got strides \(1, 4\)"):
        ops.unpack_out(packed, scales, zero_points, *args, [4], 4, torch.empty(32, 4).cuda().t())


# Streams and graphs ---------------------------------------------------------------------------------------


def packed_in_turn(x: Tensor) -> tuple[tq.PackedTensor, Tensor]:
    p = tq.pack(x, rounding=rounding(mode="systematic"))
    return p, p.dequantize()


def test_kernels_run_on_the_current_stream() -> None:
    """Work queued on a side stream, behind a long kernel there, sees the results of that kernel."""
    x = normal(256, 4096).cuda()
    expected = packed_in_turn(x * 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        y.copy_(x * 3)
        got = packed_in_turn(y)
    stream.synchronize()
    assert digest(got[0]) == digest(expected[0])
    assert_identical(got[1], expected[1])


@pytest.mark.parametrize("bits", [5, 8])
def test_a_graph_captures_what_was_never_launched_before(bits: int) -> None:
    """Packing and unpacking, replayed on other data; 5 and 8 bits are used in f16 in no other test."""
    scheme = Scheme(bits=bits, group_size=40)
    x, other = normal(24, 400).half().cuda(), normal(24, 400, seed=1).half().cuda()
    expected = tq.pack(other.float(), scheme=scheme)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        p = tq.pack(x, scheme=scheme)
        values = p.dequantize()
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert digest(p) == digest(expected)
    assert_identical(values, expected.dequantize(dtype=torch.float16))


def test_in_a_graph_a_refused_group_is_nan_and_no_other() -> None:
    """Nothing can be raised there, so nothing may pass for data."""
    x = normal(4, 128).cuda()
    tq.pack(x).dequantize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        p = tq.pack(x)
        values = p.dequantize()
    x[1, 70] = math.inf
    graph.replay()
    expected = torch.zeros(4, 2, dtype=torch.bool)
    expected[1, 1] = True
    assert torch.equal(values.view(4, 2, 64).isnan().all(-1).cpu(), expected)
    assert torch.equal(values.view(4, 2, 64).isnan().any(-1).cpu(), expected)


def test_a_graph_captures_fake_quantization_and_its_gradients() -> None:
    """Replayed on other data; a group of it that is refused is NaN, and no other."""
    scheme = Scheme(bits=3, group_size=40, symmetric=False)
    args = (*scheme.op_args(), *Rounding.nearest().op_args())
    x, other = normal(24, 400).cuda(), normal(24, 400, seed=1).cuda()
    widths = torch.ones(24, 10, device="cuda")

    def passes() -> list[Tensor]:
        y, scales, zero_points = ops.fake_quantize(x, None, None, *args, 3)
        gradients = ops.fake_quantize_backward(x, x, scales, zero_points, *scheme.op_args(), 3)
        noisy = ops.inject_noise(x, widths, 40, True, *Rounding.stochastic(1).op_args())
        return [y, scales, zero_points, *gradients, noisy]

    passes()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = passes()
    x.copy_(other)
    graph.replay()
    for a, b in zip(got, passes(), strict=True):
        assert_identical(a, b)
    x[3, 57], widths[5, 2] = math.inf, -1.0
    graph.replay()
    y, scales, _, grad_x, grad_scales, noisy = got
    refused = torch.zeros(24, 10, dtype=torch.bool)
    refused[3, 1] = True
    for part in (y.view(24, 10, 40).isnan().all(-1), grad_x.view(24, 10, 40).isnan().all(-1)):
        assert torch.equal(part.cpu(), refused)
    for part in (scales, grad_scales):
        assert torch.equal(part.isnan().cpu(), refused)
    refused[5, 2] = True
    assert torch.equal(noisy.view(24, 10, 40).isnan().all(-1).cpu(), refused)


def test_codes_on_given_scales_are_not_captured() -> None:
    x, scheme = normal(4, 64).cuda(), Scheme(bits=4, group_size=64)
    scales, none = torch.ones(4, 1, dtype=torch.bfloat16, device="cuda"), x.new_empty(0, dtype=torch.uint8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)  # an empty graph is a warning
        with pytest.raises(RuntimeError, match="no way to tell"):
            ops.encode(x, scales, none, *scheme.op_args(), [4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [Scheme(bits=4, group_size=64), Scheme.nested(planes=(4, 4))], ids=str)
def test_a_call_past_the_dispatcher_gives_what_the_operator_gives(scheme: Scheme, dtype: torch.dtype) -> None:
    linear = nn.Linear(256, 96, dtype=dtype, device="cuda")
    layer = tq.nn.QuantLinear.from_float(linear, scheme, activations="float")
    with torch.no_grad():
        for bias in (layer.bias, None, nn.Parameter(normal(96).cuda())):
            layer.bias = bias
            for shape in ((1,), (3,), (2, 8), (64,), (128,), (130,), (0,), ()):
                x = normal(*shape, 256).to(dtype).cuda()
                with torch.enable_grad():
                    asked = layer(x.clone().requires_grad_())
                assert_identical(layer(x), asked.detach(), (shape, bias is None))
            wide = normal(5, 512).to(dtype).cuda()
            for x in (wide[:, ::2], wide.view(-1)[3 : 3 + 256].view(1, 256)):
                assert_identical(layer(x), layer(x.clone()))
    with pytest.raises(ValueError, match="x is on cpu"):
        layer(normal(1, 256).to(dtype))


def test_threads_share_a_device() -> None:
    """Each on a stream of its own, some of them with values that are refused."""
    x = [normal(64, 1000, seed=i) for i in range(6)]
    expected = [digest(tq.pack(each)) for each in x]
    problems: list[object] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(20):
                each = x[i].cuda()
                if i % 2 and turn % 2:
                    each[i, turn] = math.nan
                    try:
                        tq.pack(each)
                        problems.append((i, turn))
                    except ValueError as error:
                        if f"x[{1000 * i + turn}] is NaN" not in str(error):
                            problems.append(error)
                elif digest(tq.pack(each)) != expected[i]:
                    problems.append((i, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_the_current_device_is_left_as_it_was() -> None:
    last = torch.cuda.device_count() - 1
    x = normal(8, 64)
    p = tq.pack(x.to(f"cuda:{last}"))
    assert torch.cuda.current_device() == 0 and p.device.index == last
    assert digest(p) == digest(tq.pack(x))


# Moving there and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["4 nearest", "7 subtractive", "4 mean+var", "3 asymmetric iid"])
def test_a_packed_tensor_moves_there_and_back(name: str) -> None:
    scheme, mode = CASES[name]
    here = tq.pack(normal(9, 300), scheme=scheme, rounding=mode)
    there = here.to("cuda")
    assert there.device.type == "cuda" and digest(there) == digest(here)
    assert_identical(there.dequantize(), here.dequantize())
    assert_identical(there[2:5].dequantize(), here[2:5].dequantize())
    assert digest(there.to("cpu")) == digest(here)


def test_every_prefix_reads_the_same() -> None:
    for planes in ((4, 4), (4, 1, 1, 2), (2, 1, 1, 1, 1, 2)):
        for k in (512, 333):
            here = tq.pack(normal(7, k), scheme=Scheme.nested(planes=planes))
            there = here.to("cuda")
            for bits in here.scheme.prefixes:
                assert_identical(there.at(bits).dequantize(), here.at(bits).dequantize(), (planes, bits))
                assert torch.equal(there.at(bits).codes().cpu(), here.at(bits).codes())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(50, 96), nn.Linear(96, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.linear(self.embed(tokens))
        return y


def quantize(model: nn.Module, activations: str) -> None:
    schemes = {"embed": 8, "linear": 4}
    tq.quantize_(model, schemes, activations=activations, progress=False)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_a_model_moves_there_and_back(activations: str) -> None:
    torch.manual_seed(0)
    model = Model()
    quantize(model, activations)
    tokens = torch.arange(12).view(3, 4)
    here = model(tokens)  # on the CPU, so that the linear layer holds panels
    there = copy.deepcopy(model).cuda()
    close(there(tokens.cuda()), here)
    assert_identical(there.cpu()(tokens), here)


def test_a_model_is_quantized_where_it_is() -> None:
    torch.manual_seed(0)
    here = Model()
    there = copy.deepcopy(here).cuda()
    for model in (here, there):
        quantize(model, "float")
    states = here.state_dict(), there.state_dict()
    for name, value in states[0].items():
        assert states[1][name].device.type == ("cpu" if name.endswith("_extra_state") else "cuda"), name
        assert_identical(states[1][name], value, name)
    tokens = torch.arange(6).view(2, 3)
    close(there(tokens.cuda()), here(tokens))


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_a_model_compiles_whole_and_has_gradients(activations: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 40)
    quantized = tq.nn.QuantLinear.from_float(layer, Scheme(bits=8), activations=activations).cuda()
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    x = normal(5, 96).cuda().requires_grad_(True)
    close(compiled(x), quantized(x))
    compiled(x).sum().backward()
    assert x.grad is not None
    close(x.grad, quantized.packed.dequantize().sum(0).expand(5, 96))
