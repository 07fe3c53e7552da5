"""What goes wrong on a GPU, and what must not: memory that runs out, operands on two devices, a device that
is not the current one, streams, graphs, the compiler. Whatever is refused leaves its objects as they were."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import turboquant_rs as tq
from backends import assert_identical
from test_bit_identity import CASES, raw
from tiny import Ends, quantized_ends
from tiny import ends_tokens as tokens
from turboquant_rs import Rounding, Scheme, ops
from turboquant_rs.nn import QuantEmbedding, QuantLinear
from turboquant_rs.ops.cuda.int8 import MOST_ROWS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"{torch.cuda.device_count()} CUDA device, this takes two"
)
NEAREST = Rounding.nearest()
MIB = 2**20


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def digest(*parts: Tensor | None) -> str:
    """SHA-256 of tensors, wherever they are."""
    return hashlib.sha256(b"".join(raw(part) for part in parts if part is not None)).hexdigest()


def state_digest(module: nn.Module) -> dict[str, str]:
    return {name: digest(part) for name, part in module.state_dict().items()}


def packed_digest(p: tq.PackedTensor) -> str:
    return digest(p.packed, p.scales, p.zero_points)


# Memory ---------------------------------------------------------------------------------------------------


@pytest.fixture
def leave() -> Iterator[Callable[[int], None]]:
    """Makes all but some bytes of the GPU's memory out of reach."""
    device = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(device).total_memory

    def limit(nbytes: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total)

    try:
        yield limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_packing_without_memory_is_torchs_error_and_works_afterwards(leave: Callable[[int], None]) -> None:
    x = torch.randn(64, MIB, device="cuda")
    expected = packed_digest(tq.pack(x))
    leave(24 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        tq.pack(x)
    part = tq.pack(x[:4])
    leave(2**31)
    assert packed_digest(tq.pack(x)) == expected
    assert packed_digest(part) == packed_digest(tq.pack(x[:4]))


def test_unpacking_without_memory_leaves_the_packed_tensor_as_it_was(leave: Callable[[int], None]) -> None:
    p = tq.pack(torch.randn(32, MIB, device="cuda"))
    before = packed_digest(p)
    leave(32 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        p.dequantize()
    assert packed_digest(p) == before
    leave(2**31)
    assert p.dequantize().shape == (32, MIB)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_layer_without_memory_for_its_product_is_as_it_was(
    activations: str, leave: Callable[[int], None]
) -> None:
    """Neither the order of its weight nor its bytes change, and the next call is right."""
    layer = QuantLinear(4096, 4096, dtype=torch.bfloat16, device="cuda", activations=activations)
    x = torch.randn(2, 4096, device="cuda").bfloat16()
    many = x.expand(20000, 2, 4096).reshape(-1, 4096)
    before = state_digest(layer)
    with torch.no_grad():
        expected = layer(x)
        leave(8 * MIB)
        with pytest.raises(torch.OutOfMemoryError):
            layer(many)
        assert_identical(layer(x), expected)
    leave(2**31)
    assert state_digest(layer) == before


def test_a_weight_that_cannot_be_rearranged_stays_canonical(leave: Callable[[int], None]) -> None:
    layer = QuantLinear(8192, 8192, dtype=torch.bfloat16, device="cuda", activations="float")
    x, before = torch.randn(2, 8192, device="cuda").bfloat16(), state_digest(layer)
    leave(8 * MIB)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        layer(x)
    assert layer._panels is None and state_digest(layer) == before
    leave(2**31)
    with torch.no_grad():
        y = layer(x)
    assert layer._panels is not None and y.isfinite().all()
    assert state_digest(layer) == before


def test_a_layer_that_does_not_fit_stays_where_it_is(leave: Callable[[int], None]) -> None:
    """Its scales would fit, its codes do not: nothing has moved, and it still computes."""
    layer = QuantLinear(4096, 8192)
    x, before = normal(2, 4096), state_digest(layer)
    expected = layer(x)
    leave(8 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        layer.cuda()
    assert {part.device.type for part in (*layer.parameters(), *layer.buffers())} == {"cpu"}
    assert state_digest(layer) == before
    assert_identical(layer(x), expected)
    leave(2**31)
    assert_identical(layer.cuda()(x.cuda()), expected)


# Two devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_here_and_there_are_refused_with_the_way_out(activations: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(64, 48, dtype=dtype)
    here = QuantLinear.from_float(linear, activations=activations)
    there = copy.deepcopy(here).cuda()
    x = normal(2, 64).to(dtype)
    for layer, given in ((here, x.cuda()), (there, x)):
        for _ in range(2):  # before and after its weight is brought to panels
            with pytest.raises(ValueError, match=r"x is on .* and p on .*; move one of them with .to\(\)"):
                layer(given)
            layer(given.to(layer.bias.device))
    with pytest.raises(ValueError, match="bias is on cpu and p on cuda"):
        tq.matmul(x.cuda(), there.packed, linear.bias)


def test_a_table_is_looked_up_on_its_own_device() -> None:
    table = QuantEmbedding(20, 64, device="cuda")
    with pytest.raises(RuntimeError, match="device"):
        table(torch.arange(3))
    assert table(torch.arange(3, device="cuda")).shape == (3, 64)


def test_given_scales_and_outputs_elsewhere_are_refused() -> None:
    x, scheme = normal(4, 64).cuda(), Scheme(bits=4, group_size=64)
    scales, none = torch.ones(4, 1, dtype=torch.bfloat16), torch.empty(0, dtype=torch.uint8)
    with pytest.raises((ValueError, RuntimeError), match=r"device|cpu"):
        ops.encode(x, scales, none, *scheme.op_args(), [4])
    with pytest.raises(ValueError, match=r"out does not fit: .* on cuda"):
        tq.pack(x, scheme=scheme, out=tq.pack(x.cpu(), scheme=scheme))


@two_gpus
def test_operands_on_two_gpus_are_refused() -> None:
    layer = QuantLinear(64, 48, device="cuda:1")
    with pytest.raises(ValueError, match="x is on cuda:0 and p on cuda:1"):
        layer(normal(2, 64).cuda(0))
    p, x = tq.pack(normal(4, 64).cuda(1)), normal(2, 64).cuda(0)
    with pytest.raises(ValueError, match="x is on cuda:0 and p on cuda:1"):
        tq.matmul(x, p)
    scheme = p.scheme
    args = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths, scheme.bits, [4, 64], torch.float32)
    with pytest.raises((ValueError, RuntimeError), match=r"cuda:0.*cuda:1|cuda:1.*cuda:0|device"):
        ops.unpack(p.packed, p.scales.to("cuda:0"), p.packed.new_empty(0), *args)


@two_gpus
def test_tensors_on_a_device_that_is_not_the_current_one() -> None:
    """Everything that launches, with device 0 current and all tensors on device 1."""
    assert torch.cuda.current_device() == 0
    scheme = Scheme.nested()
    args = (*scheme.op_args(), *NEAREST.op_args())

    def everything(device: str) -> list[Tensor]:
        x = normal(40, 512).to(device)
        p, drawn = tq.pack(x, scheme=scheme), tq.pack(x, rounding=Rounding.stochastic(3))
        fake = ops.fake_quantize(x, None, None, *args, 8)
        gradients = ops.fake_quantize_backward(x, x, *fake[1:], *scheme.op_args(), 8)
        widths = torch.ones(40, 8, device=device)
        noise = ops.inject_noise(x, widths, 64, False, *Rounding.stochastic(1).op_args())
        given = ops.encode(x, p.scales, p.packed.new_empty(0), *scheme.op_args(), scheme.widths)
        products = [tq.matmul(x[:m], p.at(bits)) for m in (1, 40) for bits in (4, 8)]
        layer = QuantEmbedding.from_float(nn.Embedding.from_pretrained(x), scheme)
        looked_up = layer(torch.arange(5, device=device))
        return [
            drawn.packed,
            drawn.scales,
            p.packed,
            p.scales,
            p.dequantize(),
            p.codes(),
            *fake,
            *gradients,
            noise,
            given,
            *products,
            looked_up,
        ]

    for first, second in zip(everything("cuda:0"), everything("cuda:1"), strict=True):
        assert second.device.index == 1
        assert_identical(second, first)
    assert torch.cuda.current_device() == 0


@two_gpus
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_layer_on_a_device_that_is_not_the_current_one(activations: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 96, dtype=torch.bfloat16)
    layers = [
        QuantLinear.from_float(copy.deepcopy(linear).cuda(at), Scheme.nested(), activations=activations)
        for at in (0, 1)
    ]
    with torch.no_grad():
        for m in (1, 20, 100, 300):
            x = normal(m, 256, seed=m).bfloat16()
            for bits in (4, 8):
                for layer in layers:
                    layer.read_bits = bits
                first, second = (layer(x.cuda(at)) for at, layer in enumerate(layers))
                assert second.device.index == 1
                assert_identical(second, first, (m, bits))
    assert torch.cuda.current_device() == 0


@two_gpus
def test_a_model_moves_from_one_gpu_to_the_other() -> None:
    layer = QuantLinear(256, 96, scheme=Scheme.nested(), activations="float", dtype=torch.bfloat16)
    x, before = normal(4, 256).bfloat16(), state_digest(layer)
    with torch.no_grad():
        first = layer.to("cuda:0")(x.to("cuda:0"))
        assert_identical(layer.to("cuda:1")(x.to("cuda:1")), first)
    assert state_digest(layer) == before


# There and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_moving_there_and_back_keeps_every_byte(name: str, dtype: torch.dtype) -> None:
    """A packed tensor, a table and layers of either kind, which on the GPU have run in between."""
    scheme, mode = CASES[name]
    weight = normal(24, 192).to(dtype)
    p = tq.pack(weight, scheme=scheme, rounding=mode)
    there = p.to("cuda")
    assert packed_digest(there) == packed_digest(p) == packed_digest(there.to("cpu"))
    assert packed_digest(tq.pack(weight.cuda(), scheme=scheme, rounding=mode)) == packed_digest(p)
    modules: list[tuple[nn.Module, Tensor]] = []
    if mode.mode != "subtractive":
        table = QuantEmbedding(24, 192, scheme=scheme, dtype=dtype)
        table.load_packed("weight", p)
        modules.append((table, torch.arange(24)))
    for activations in ("float", "int8"):
        layer = QuantLinear(192, 24, scheme=scheme, dtype=dtype, activations="float")
        if activations == "float" or mode.has_integer_form:
            layer.activations = activations
            layer.load_packed("weight", p)
            modules.append((layer, normal(3, 192).to(dtype)))
    for module, x in modules:
        before = state_digest(module)
        here = module(x)
        module.cuda()
        assert state_digest(module) == before
        got = module(x.cuda())
        if isinstance(module, QuantEmbedding) or module.activations == "int8":
            assert_identical(got, here, type(module))
        module.cpu()
        assert state_digest(module) == before
        assert_identical(module(x), here, type(module))


# Streams, graphs, the compiler, gradients -----------------------------------------------------------------


def model(activations: str, dtype: torch.dtype) -> Ends:
    return quantized_ends(Scheme(bits=4), activations, dtype)


KINDS = [
    (activations, dtype)
    for activations in ("float", "int8")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


@pytest.mark.parametrize(("activations", "dtype"), KINDS)
def test_a_model_runs_on_the_current_stream(activations: str, dtype: torch.dtype) -> None:
    """Behind a long kernel on a side stream, which writes what it reads."""
    quantized = model(activations, dtype)
    with torch.no_grad():
        for shape in ((1, 1), (2, 9), (3, 70)):
            ids = tokens(*shape)
            expected, stream = quantized(ids), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                late = torch.zeros_like(ids)
                torch.cuda._sleep(20_000_000)
                late.copy_(ids)
                got = quantized(late)
            stream.synchronize()
            assert_identical(got, expected, shape)


@pytest.mark.parametrize(("activations", "dtype"), KINDS)
def test_a_graph_captures_a_model(activations: str, dtype: torch.dtype) -> None:
    quantized = model(activations, dtype)
    with torch.no_grad():
        for shape in ((1, 1), (2, 9), (3, 70)):
            ids, other = tokens(*shape), tokens(*shape, seed=1)
            expected = quantized(other)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = quantized(ids)
            ids.copy_(other)
            graph.replay()
            assert_identical(got, expected, shape)


def test_a_graph_captures_a_layer_that_has_never_run() -> None:
    """Its weight is brought to panels within the capture, its kernels are compiled there."""
    for activations in ("float", "int8"):
        layer = QuantLinear(
            448, 72, scheme=Scheme(bits=5, group_size=32), dtype=torch.float16, activations=activations
        ).cuda()
        x = normal(3, 448).half().cuda()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            with torch.cuda.graph(graph):
                got = layer(x)
            graph.replay()
            assert_identical(got, layer(x))


@pytest.mark.parametrize(("activations", "dtype"), KINDS)
def test_the_compiler_takes_a_model_whole(activations: str, dtype: torch.dtype) -> None:
    quantized = model(activations, dtype)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = quantized(ids)
        torch._dynamo.reset()
        compiled = torch.compile(quantized, fullgraph=True)
        got = compiled(ids)
        # The compiler sums what lies between our products in an order of its own.
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
        assert compiled(tokens(1, 1)).shape == (1, 1, 100)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # one that torch itself makes
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_the_compiler_captures_a_layer_in_a_graph(activations: str) -> None:
    """mode="reduce-overhead" replays CUDA graphs; a layer alone keeps its bits."""
    torch._dynamo.reset()
    layer = QuantLinear(256, 96, dtype=torch.bfloat16, activations=activations).cuda()
    layer.arrange()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(4):
            x = normal(4, 256, seed=seed).bfloat16().cuda()
            torch.compiler.cudagraph_mark_step_begin()
            assert_identical(compiled(x).clone(), layer(x))


@pytest.mark.parametrize(("activations", "dtype"), KINDS)
def test_gradients_reach_activations_and_bias(activations: str, dtype: torch.dtype) -> None:
    """d/dx = grad · Ŵ with the weight as it is read, d/dbias = the sum over rows."""
    for bits in (4, 8):
        layer = QuantLinear(
            256, 96, scheme=Scheme.nested(), dtype=dtype, activations=activations, device="cuda"
        )
        layer.read_bits = bits
        x = normal(3, 5, 256).to(dtype).cuda().requires_grad_()
        grad = normal(3, 5, 96, seed=1).to(dtype).cuda()
        layer(x).backward(grad)
        weight = layer.packed.dequantize(dtype=dtype)
        assert_identical(x.grad, grad @ weight)
        assert_identical(layer.bias.grad, grad.reshape(-1, 96).sum(0))


@pytest.mark.parametrize(("activations", "dtype"), KINDS)
def test_tangents_pass_through_layers(activations: str, dtype: torch.dtype) -> None:
    """Before their weight is brought to tiles, and after."""
    layer = QuantLinear(256, 96, scheme=Scheme.nested(), dtype=dtype, activations=activations, device="cuda")
    x, t = (normal(3, 5, 256, seed=seed).to(dtype).cuda() for seed in range(2))
    for bits in (8, 4, 4):
        layer.read_bits = bits
        expected = t.float() @ layer.packed.dequantize(dtype=torch.float32).T
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            y = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, t)))
            torch.testing.assert_close(y.tangent.float(), expected, rtol=0.02, atol=0.02)
            assert_identical(y.primal, layer(x))


# Values, and what is longer than a grid -------------------------------------------------------------------


def test_parts_are_looked_at_unless_a_graph_is_captured() -> None:
    p = tq.pack(normal(4, 64).cuda(), symmetric=False)
    p.zero_points[2] = 16
    with pytest.raises(ValueError, match="the zero point of group 2 is 16, above 15, the last code"):
        tq.PackedTensor(**vars(p))
    with pytest.raises(ValueError, match="the zero point of group 2 is 16, above 15, the last code"):
        copy.deepcopy(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert tq.PackedTensor(**vars(p)).dequantize().shape == (4, 64)


def test_a_refusal_after_inference_mode_leaves_nothing_behind() -> None:
    """In a thread whose first launch was made there."""
    problems: list[object] = []

    def work() -> None:
        x = normal(4, 64).cuda()
        with torch.inference_mode():
            tq.pack(x)
        x[1, 1] = torch.nan
        try:
            tq.pack(x)
            problems.append("NaN was packed")
        except ValueError as error:
            if "NaN" not in str(error):
                problems.append(error)
        tq.pack(x.nan_to_num())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert problems == []


@pytest.mark.parametrize("group_size", [32, None])
def test_more_rows_of_x_than_a_grid_has_blocks_for(group_size: int | None) -> None:
    scheme, m = Scheme(bits=4, group_size=group_size), MOST_ROWS + 300
    layer = QuantLinear(32, 8, scheme=scheme, dtype=torch.bfloat16, device="cuda", bias=False)
    x = normal(1000, 32).bfloat16().cuda()
    many = x.repeat(-(-m // 1000), 1)[:m]
    with torch.no_grad():
        expected, got = layer(x), layer(many)
    assert_identical(got[:1000], expected)
    assert_identical(got[-300:], layer(many[-300:].clone()).detach())


@pytest.mark.parametrize("planes", [[1] * 8, [4, 3, 1], [2, 2]])
def test_planes_that_the_number_format_has_not_are_refused(planes: list[int]) -> None:
    bits = sum(planes)
    scheme = Scheme(bits=bits)
    with pytest.raises(ValueError, match=f"do not store {bits} bits; use"):
        ops.pack(normal(4, 64).cuda(), *scheme.op_args(), *NEAREST.op_args(), planes, False)
