"""Precision that changes after a CUDA graph was captured, and rows that choose theirs: bit for bit what a
layer gives that is read so from the start, with nothing repacked, allocated or waited for."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

import turboquant_rs as tq
from backends import assert_identical
from test_controller import controlled, ticking
from tiny import Ends, batches, quantized_ends
from tiny import ends_tokens as tokens
from turboquant_rs import Scheme, ops
from turboquant_rs.nn import QuantEmbedding, QuantLinear
from turboquant_rs.nn.precision import switchable
from turboquant_rs.ops.cuda.launcher import only_if
from turboquant_rs.packed import matmul_refined

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module", autouse=True)
def _cublas() -> None:
    """Torch makes its handle at the first product, which must not be in a capture."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(8, 8, dtype=dtype, device="cuda")
        torch.mm(x, x)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(
    activations: str, dtype: torch.dtype, planes: tuple[int, ...] = (4, 4), n: int = 200
) -> QuantLinear:
    torch.manual_seed(0)
    scheme = Scheme.nested(planes=planes)
    return QuantLinear(512, n, scheme=scheme, dtype=dtype, device="cuda", activations=activations)


def captured(module: nn.Module, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = module(x)
    return graph, y


NAMES = ("embed", "up", "down", "head")


def model(activations: str = "float", planes: tuple[int, ...] = (4, 1, 1, 2)) -> Ends:
    return quantized_ends(Scheme.nested(planes=planes), activations, torch.bfloat16)


# Launches that a number chooses ---------------------------------------------------------------------------


def test_a_launch_runs_only_if_it_is_chosen() -> None:
    p, number = tq.pack(normal(4, 64).cuda()), torch.zeros(1, dtype=torch.int32, device="cuda")
    expected, out = p.dequantize(), torch.zeros(4, 64, device="cuda")
    for value in (0, 5, 62, 63):
        number.fill_(value)
        for choices in (1 << value, ~(1 << value) & (2**64 - 1), 0, 2**64 - 1):
            out.zero_()
            with only_if(number.data_ptr(), choices):
                tq.unpack(p, out=out)
            assert_identical(out, expected if choices >> value & 1 else torch.zeros(4, 64))
    out.zero_()
    tq.unpack(p, out=out)  # and outside of the block always
    assert_identical(out, expected)


# One layer ------------------------------------------------------------------------------------------------


# Between them: every kernel, by the rows of x, and every width, whatever is compiled for it.
LAYERS = (
    ("float", torch.bfloat16, (4, 4), (1, 20, 60, 300)),
    ("float", torch.float16, (4, 1, 1, 2), (3, 300)),
    ("float", torch.float32, (4, 4), (3,)),
    ("float", torch.bfloat16, (2, 1, 1, 1, 1, 2), (12, 40)),
    ("int8", torch.bfloat16, (4, 4), (1, 100, 300)),
    ("int8", torch.float16, (2, 1, 1, 1, 1, 2), (3,)),
    ("int8", torch.float32, (4, 1, 1, 2), (20,)),
)


@pytest.mark.parametrize(("activations", "dtype", "planes", "rows"), LAYERS)
def test_a_replay_reads_the_bits_of_the_moment(
    activations: str, dtype: torch.dtype, planes: tuple[int, ...], rows: tuple[int, ...]
) -> None:
    """The graph is captured at one width and replayed at all, in any order."""
    layer = linear(activations, dtype, planes)
    widths = layer.readable_bits
    for m in rows:
        x = normal(m, 512, seed=m).to(dtype).cuda()
        layer.read_bits = widths[m % len(widths)]
        graph, y = captured(layer, x)
        expected = {}
        with torch.no_grad():
            for bits in widths:
                layer.read_bits = bits
                expected[bits] = layer(x).clone()
        for bits in (*widths, *reversed(widths), widths[0]):
            layer.read_bits = bits
            graph.replay()
            assert_identical(y, expected[bits], (m, bits))


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_many_rows_of_a_wide_layer(activations: str) -> None:
    """The kernels of a GPU that has more to do than it has processors; the widest has x in its order."""
    for n, m in ((4096, 1), (4096, 700), (60000, 40)):
        layer, x = linear(activations, torch.bfloat16, n=n), normal(m, 512, seed=m).bfloat16().cuda()
        graph, y = captured(layer, x)
        for bits in (4, 8, 4):
            layer.read_bits = bits
            graph.replay()
            with torch.no_grad():
                assert_identical(y, layer(x), (n, m, bits))


def test_a_table_reads_the_bits_of_the_moment() -> None:
    for planes in ((4, 4), (2, 1, 1, 1, 1, 2)):
        table = QuantEmbedding(
            50, 96, scheme=Scheme.nested(planes=planes), dtype=torch.float16, device="cuda"
        )
        index = tokens(3, 4) % 50
        graph, y = captured(table, index)
        for bits in (*table.readable_bits, table.readable_bits[0]):
            table.read_bits = bits
            graph.replay()
            assert_identical(y, table(index), bits)


@pytest.mark.parametrize(
    ("activations", "dtype"),
    [("float", torch.bfloat16), ("float", torch.float32), ("int8", torch.float16)],
)
def test_gradients_within_a_graph_follow_too(activations: str, dtype: torch.dtype) -> None:
    layer = linear(activations, dtype)
    x, grad = normal(5, 512).to(dtype).cuda().requires_grad_(), normal(5, 200, seed=1).to(dtype).cuda()

    def passes() -> tuple[Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, layer.bias), grad)

    passes()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = passes()
    for bits in (4, 8):
        layer.read_bits = bits
        graph.replay()
        for a, b in zip(got, passes(), strict=True):
            assert_identical(a, b, bits)


# PyTorch 2.11 warms up and captures on different streams, and says so of its own layers as well.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_graphed_callables_follow_forwards_and_backwards(activations: str) -> None:
    net = nn.Sequential(
        linear(activations, torch.bfloat16, n=512), nn.GELU(), linear(activations, torch.bfloat16)
    )
    x, grad = normal(5, 512).bfloat16().cuda().requires_grad_(), normal(5, 200, seed=1).bfloat16().cuda()
    eager = copy.deepcopy(net)
    graphed = torch.cuda.make_graphed_callables(net, (torch.zeros_like(x, requires_grad=True),))

    def passes(module: nn.Module) -> tuple[Tensor, ...]:
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), grad)

    for bits in (4, 8, 4):
        for module in (graphed, eager):
            tq.set_precision(module, bits)
        for a, b in zip(passes(graphed), passes(eager), strict=True):
            assert_identical(a, b, bits)


def test_a_layer_that_reads_all_or_nothing_is_captured_as_it_is() -> None:
    layer = QuantLinear(
        128, 40, scheme=Scheme(bits=4), dtype=torch.bfloat16, device="cuda", activations="float"
    )
    captured(layer, normal(2, 128).bfloat16().cuda())
    assert layer._number is None


def test_a_graph_keeps_the_weight_that_it_reads() -> None:
    """A state dict brings canonical bytes back; what the graph has captured stays where it was."""
    layer = linear("float", torch.bfloat16)
    x = normal(3, 512).bfloat16().cuda()
    graph, y = captured(layer, x)
    graph.replay()
    expected = y.clone()
    layer.state_dict()
    assert layer._panels is None
    rubbish = [torch.full((2**18,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(8)]
    graph.replay()
    assert_identical(y, expected)
    del rubbish


def test_a_graph_keeps_shared_bytes_once_nobody_else_does() -> None:
    layer, x = linear("float", torch.bfloat16), normal(3, 512).bfloat16().cuda()
    held = layer.weight_packed
    graph, y = captured(layer, x)
    graph.replay()
    expected = y.clone()
    del held
    layer(x)
    rubbish = [torch.full((2**18,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(8)]
    graph.replay()
    assert_identical(y, expected)
    del rubbish


def test_a_repr_moves_nothing() -> None:
    layer = linear("float", torch.bfloat16)
    with torch.no_grad():
        layer(normal(3, 512).bfloat16().cuda())
    assert "nested" in repr(layer) or "planes" in repr(layer)
    assert layer._panels is not None


def test_copies_and_pickles_have_a_number_of_their_own() -> None:
    layer = linear("float", torch.bfloat16)
    x = normal(3, 512).bfloat16().cuda()
    graph, y = captured(layer, x)
    other, read = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for twin in (other, read):
        twin.read_bits = 4
        graph.replay()
        with torch.no_grad():
            assert layer.read_bits == 8
            assert_identical(y, layer(x))
            own, z = captured(twin, x)
            own.replay()
            assert_identical(z, twin(x))


# Nothing is waited for ------------------------------------------------------------------------------------


def test_switching_waits_for_nothing_and_is_ordered_on_the_stream() -> None:
    """Behind work that takes long, replays read what was set before each; the host is ahead of them all."""
    layer = linear("float", torch.bfloat16)
    x = normal(3, 512).bfloat16().cuda()
    graph, y = captured(layer, x)
    expected = {}
    with torch.no_grad():
        for bits in (4, 8):
            layer.read_bits = bits
            expected[bits] = layer(x)
    results = [torch.empty_like(y) for _ in range(6)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    busy = torch.cuda.Event()
    torch.cuda._sleep(400_000_000)
    for at, result in enumerate(results):
        layer.read_bits = 4 if at % 2 else 8
        graph.replay()
        result.copy_(y)
    busy.record()
    assert not busy.query()
    assert torch.cuda.memory_allocated() == before
    for at, result in enumerate(results):
        assert_identical(result, expected[4 if at % 2 else 8], at)


def test_a_graph_that_sets_the_precision_itself_sets_it_at_every_replay() -> None:
    """A draft at 4 bits and its check at 8, in one graph."""
    net, ids = model(), tokens(2, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            with tq.precision(net, 4):
                draft = net(ids)
            check = net(ids)
        for _ in range(3):
            graph.replay()
            with tq.precision(net, 4):
                assert_identical(draft, net(ids))
            assert_identical(check, net(ids))


# Models and ladders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_set_precision_reaches_graphs(activations: str) -> None:
    net, ids = model(activations), tokens(2, 3)
    graph, y = captured(net, ids)
    with torch.no_grad():
        for bits in (4, {"up": 5, "*": 8}, None, {"down": 6}, 4, 8):
            tq.set_precision(net, bits)
            graph.replay()
            assert_identical(y, net(ids), bits)
        with tq.precision(net, 5):
            graph.replay()
            assert_identical(y, net(ids))
        graph.replay()
        assert_identical(y, net(ids))


LADDER = [
    dict(zip(NAMES, bits, strict=True))
    for bits in ((8, 8, 8, 8), (8, 6, 8, 8), (6, 6, 5, 8), (5, 4, 4, 6), (4, 4, 4, 4))
]


def level_by_level(net: Ends, ids: Tensor) -> list[Tensor]:
    """What the model gives that reads each level for good."""
    with torch.no_grad():
        found = []
        for level in LADDER:
            tq.set_precision(net, level)
            found.append(net(ids).clone())
    tq.set_precision(net, None)
    return found


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_ladder_moves_graphs(activations: str) -> None:
    """10 switches up and down; each level is what a model gives that reads those bits for good."""
    net, ids = model(activations), tokens(2, 3)
    expected = level_by_level(net, ids)
    switch = switchable(net, LADDER)
    graph, y = captured(net, ids)
    for level in (0, 4, 2, 1, 3, 0, 2, 4, 3, 1):
        switch.level = level
        graph.replay()
        assert_identical(y, expected[level], level)
        with torch.no_grad():
            assert_identical(net(ids), expected[level], level)
    switch.remove()


def test_a_forward_in_a_graph_reads_one_level_whatever_happens_meanwhile() -> None:
    """Another thread, on another stream, switches all the time: every replay is one of the levels, whole."""
    net, ids = model(), tokens(2, 3)
    expected = level_by_level(net, ids)
    switch = switchable(net, LADDER)
    graph, y = captured(net, ids)
    done = threading.Event()

    def turn() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            at = 0
            while not done.is_set():
                switch.level = at = (at + 1) % len(LADDER)

    thread = threading.Thread(target=turn)
    thread.start()
    seen = set()
    try:
        for _ in range(200):
            graph.replay()
            found = [at for at, each in enumerate(expected) if torch.equal(y, each)]
            assert len(found) == 1
            seen.add(found[0])
    finally:
        done.set()
        thread.join()
    assert len(seen) > 1
    switch.remove()


def test_a_controller_moves_graphs() -> None:
    """Captured once; steps that come too late bring it down, as they bring down a forward."""
    net, control = controlled(clock=ticking(0.001), dwell=2)
    net.cuda()
    x = batches(1)[0].cuda()
    graph, y = captured(net, x)
    levels = set()
    with control:
        for latency in (1, 90, 90, 90, 1, 1, 1, 1, 1, 1, 60, 1, 1, 1):
            control.observe(latency_ms=latency)
            levels.add(control.level)
            graph.replay()
            with torch.no_grad():
                assert_identical(y, net(x), control.level)
        for level in range(len(control.ladder)):
            control.level = level
            graph.replay()
            with torch.no_grad():
                assert_identical(y, net(x), level)
    assert len(levels) > 1


def test_layers_of_a_ladder_follow_it_on_their_own() -> None:
    net, ids = model(), tokens(2, 3)
    switch = switchable(net, LADDER)
    graph, y = captured(net.embed, ids)
    for level in (0, 3, 4, 2):
        switch.level = level
        graph.replay()
        assert_identical(y, net.embed(ids), level)
    switch.remove()


def test_more_levels_than_a_launch_can_be_chosen_by() -> None:
    net = model()
    switch = switchable(net, [LADDER[0]] * 64)
    ids, graph = tokens(2, 3), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids.add_(0)  # an empty graph is a warning
        with pytest.raises(ValueError, match=r"up to 63 levels, this one has 64; use plan\.ladder\(63\)"):
            net(ids)
    switch.remove()


# Rows that choose their bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [None, 64, 40])
def test_refined_rows_are_those_of_the_specification(group_size: int | None, dtype: torch.dtype) -> None:
    scheme = Scheme.nested(group_size=group_size, planes=(4, 1, 1, 2))
    p = tq.pack(normal(72, 320), scheme=scheme)
    for m in (1, 9, 150):
        x = (normal(m, 320, seed=m) * torch.logspace(-1, 1, m)[:, None]).to(dtype)
        sizes = ops.reference.row_sizes(x, scheme.group_size or 0)
        for threshold in (-1.0, float(sizes.median()), float(sizes.max()), 1e9):
            for bits in ((4, 8), (5, 6)):
                options = {"bits": bits[0], "refined_bits": bits[1], "threshold": threshold}
                y, refined = matmul_refined(x.cuda(), p.to("cuda"), normal(72).cuda(), **options)
                assert torch.equal(refined.cpu(), sizes > threshold)
                low, high = (tq.matmul(x.cuda(), p.to("cuda").at(b), normal(72).cuda()) for b in bits)
                assert_identical(y, torch.where(refined[:, None], high, low), (m, threshold, bits))
                args = (*scheme.op_args(), *tq.Rounding.nearest().op_args(), scheme.widths, *bits, threshold)
                here = ops.matmul_refined(x, *p._stored, normal(72), *args, "canonical", 72)
                assert_identical(y, here[0])


def test_rows_that_are_not_finite_are_not_refined() -> None:
    p, x = tq.pack(normal(24, 128), scheme=Scheme.nested()).to("cuda"), normal(3, 128).cuda()
    x[1, 5] = torch.inf
    y, refined = matmul_refined(x, p, None, bits=4, refined_bits=8, threshold=-1.0)
    assert refined.tolist() == [True, False, True] and y[1].isnan().all()


def test_a_refined_model_counts_on_the_gpu_and_in_graphs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 32))
    tq.quantize_(net, Scheme.nested(), progress=False)
    net.cuda()
    batches = [normal(40, 128, seed=seed).cuda() for seed in range(3)]
    tq.refine(net, 6.0, batches, progress=False)
    here = copy.deepcopy(net).cpu()
    x = batches[0]
    with torch.no_grad():
        assert_identical(net(x), here(x.cpu()))
        graph, y = captured(net, x)
        x.copy_(batches[1])
        graph.replay()
        assert_identical(y, here(batches[1].cpu()))
    assert [net[0].mean_bits, net[2].mean_bits] == [here[0].mean_bits, here[2].mean_bits]
    assert copy.deepcopy(net)[0].mean_bits == net[0].mean_bits
