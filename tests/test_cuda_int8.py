"""Products of int8 activations on a GPU: every kernel gives the bits of the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from backends import NEAREST, Packed, assert_identical
from turboquant_rs import Scheme, ops
from turboquant_rs.nn import QuantLinear
from turboquant_rs.ops import reference
from turboquant_rs.ops.cuda import int8
from turboquant_rs.ops.cuda.int8 import Block, Columns, Groups, Wide
from turboquant_rs.ops.cuda.limits import limits_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

BY_ROWS = (
    Scheme(bits=8, group_size=None),
    Scheme(bits=8, group_size=None, symmetric=False, scale_dtype="f32"),
    Scheme(bits=4, group_size=None, scale_dtype="f16"),
    Scheme(bits=4, group_size=None, symmetric=False),
    Scheme(bits=1, group_size=None),
    Scheme(bits=5, group_size=None, symmetric=False),
    Scheme(bits=4, levels="nf4", group_size=None),
)
BY_GROUPS = (
    Scheme(bits=8, group_size=128),
    Scheme(bits=4, group_size=64),
    Scheme(bits=4, group_size=32, symmetric=False),
    Scheme(bits=8, group_size=256, symmetric=False, scale_dtype="f16"),
    Scheme(bits=3, group_size=64),
    Scheme(bits=4, levels="nf4", group_size=128, scale_dtype="f32"),
    Scheme(bits=4, group_size=128),
    Scheme(bits=4, group_size=128, symmetric=False, scale_dtype="f32"),
    Scheme(bits=4, group_size=256),
    Scheme(bits=8, group_size=32),
)
SCATTERED = (
    Scheme(bits=8, group_size=9),
    Scheme(bits=4, group_size=100, symmetric=False),
    Scheme(bits=4, group_size=96),
    Scheme(bits=4, group_size=192),  # a short last group ends in the stage in which another one does
    Scheme(bits=8, group_size=160, symmetric=False),
)
BLOCKS = (
    Block(16, 32, 1, 4, 1, 8),
    Block(16, 64, 1, 4, 1, 6),
    Block(32, 64, 1, 4, 1, 6),
    Block(64, 32, 2, 2, 1, 6),
    Block(128, 128, 2, 4, 1, 4),
)
SPLIT = (
    Block(16, 32, 1, 1, 4, 4),
    Block(32, 64, 1, 2, 2, 4),
    Block(64, 64, 2, 2, 2, 3),
    Block(128, 256, 2, 4, 1, 4),
)
MEETING = (
    Block(16, 32, 1, 1, 8, 3),
    Block(16, 64, 1, 2, 4, 4),
    Block(32, 32, 1, 1, 4, 4),
    Block(64, 32, 1, 1, 4, 4),
    Block(64, 32, 2, 1, 4, 3),
)
"""Of groups: their warps share the columns, too."""

WIDES = (Wide(256, 4, 2), Wide(256, 4, 1), Wide(128, 6, 2))
GROUPS = (Groups(128, 2), Groups(128, 1), Groups(64, 2), Groups(32, 1))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pack(w: Tensor, scheme: Scheme) -> Packed:
    stored: Packed = ops.pack(w, *scheme.op_args(), *NEAREST.op_args(), scheme.widths, False)
    return stored


def product(
    x: Tensor, stored: Packed, scheme: Scheme, bias: Tensor | None = None, bits: int | None = None
) -> Tensor:
    """x · Wᵀ (+ bias) where x is."""
    tail = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths, bits or scheme.bits)
    stored = tuple(part.to(x.device) for part in stored)
    bias = bias if bias is None else bias.to(x.device)
    y: Tensor = ops.matmul(x, *stored, bias, *tail, "int8", "canonical", len(stored[1]))
    return y


def assert_same(
    x: Tensor, stored: Packed, scheme: Scheme, bias: Tensor | None = None, bits: int | None = None
) -> None:
    """A product on the GPU is that on the CPU."""
    got = product(x.cuda(), stored, scheme, bias, bits)
    assert_identical(got, product(x, stored, scheme, bias, bits), (scheme, x.shape, len(stored[1]), bits))


@pytest.fixture
def only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Block | Groups | Wide]:
    """Every product by one kernel."""
    shape: Block | Groups | Wide = request.param
    if not isinstance(shape, Block) and not HOPPER:
        pytest.skip("wgmma is Hopper's")

    def shape_for(_m: int, _n: int, columns: Columns, *_: object) -> Block | Groups | Wide:
        """That kernel, or another where it takes no such groups."""
        steps = columns.bracket_steps
        if isinstance(shape, Groups):
            return shape if shape.fits(columns) else BLOCKS[0]
        if isinstance(shape, Block) and shape.warps_k > 1 and columns.grouped:
            room = shape._replace(stages=2).shared(False, steps, True) <= limits_of(0).shared
            return shape if room and 4 % steps == 0 else BLOCKS[0]
        return shape

    monkeypatch.setattr(int8, "shape_for", shape_for)
    int8.plan_of.cache_clear()
    yield shape
    int8.plan_of.cache_clear()


# Every kernel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", BY_ROWS, ids=str)
@pytest.mark.parametrize("only", (*BLOCKS, *SPLIT, *WIDES), indirect=True, ids=str)
def test_products_with_a_scale_a_row(only: Block | Groups | Wide, scheme: Scheme) -> None:
    """Rows and columns at and beside the tiles, k that ends within a stage and within a step."""
    for m, n, k in ((1, 1, 1), (3, 40, 96), (16, 256, 512), (70, 130, 1040), (129, 263, 33), (300, 520, 640)):
        x, bias = normal(m, k, seed=m).bfloat16(), normal(n, seed=k) if m % 2 else None
        assert_same(x, pack(normal(n, k, seed=n), scheme), scheme, bias)


@pytest.mark.parametrize("scheme", BY_GROUPS, ids=str)
@pytest.mark.parametrize("only", (*BLOCKS, *MEETING, *GROUPS), indirect=True, ids=str)
def test_products_with_a_scale_a_group(only: Block | Groups | Wide, scheme: Scheme) -> None:
    """The last group short, in the middle of a step, of a stage, or alone."""
    for m, n, k in (
        (1, 1, 1),
        (3, 40, 160),
        (16, 256, 512),
        (70, 130, 1056),
        (129, 263, 130),
        (150, 300, 1024),
    ):
        x, bias = normal(m, k, seed=m).half(), normal(n, seed=k) if m % 2 else None
        assert_same(x, pack(normal(n, k, seed=n), scheme), scheme, bias)


@pytest.mark.parametrize("scheme", SCATTERED, ids=str)
def test_groups_between_the_steps(scheme: Scheme) -> None:
    for m, n, k in ((1, 1, 1), (5, 33, 257), (3, 40, 192), (9, 40, 4096), (40, 70, 600), (300, 20, 288)):
        assert_same(normal(m, k, seed=m), pack(normal(n, k, seed=n), scheme), scheme)


@pytest.mark.parametrize("planes", [(4, 4), (4, 1, 1, 2), (2, 1, 1, 1, 1, 2)])
@pytest.mark.parametrize("group_size", [64, None])
def test_prefixes(planes: tuple[int, ...], group_size: int | None) -> None:
    scheme = Scheme.nested(group_size=group_size, planes=planes)
    stored = pack(normal(70, 320, seed=1), scheme)
    for count in range(1, len(planes) + 1):
        for m in (3, 40, 200):
            assert_same(normal(m, 320, seed=m).bfloat16(), stored, scheme, bits=sum(planes[:count]))


@pytest.mark.parametrize("m", [2, 20, 200])
def test_long_rows_are_cut_into_segments(m: int) -> None:
    """Sums of more than 32768 columns, at the largest codes and activations there are."""
    k = 2 * 32768 + 100
    for scheme in (Scheme(bits=8, group_size=None), Scheme(bits=8, group_size=None, symmetric=False)):
        w = torch.stack((torch.ones(k), normal(k), torch.linspace(0, 1, k)))
        x = torch.cat((torch.ones(1, k), -torch.ones(1, k), normal(m, k, seed=1)))
        assert_same(x, pack(w, scheme), scheme)


@pytest.mark.parametrize("scheme", [Scheme(bits=8, group_size=None), Scheme(bits=8, group_size=128)], ids=str)
def test_more_tiles_than_blocks_that_fit_at_once(scheme: Scheme) -> None:
    n, k = 20008, 384
    stored = pack(normal(n, k), scheme)
    for m in (9, 260, 700):
        assert_same(normal(m, k, seed=m).bfloat16(), stored, scheme, normal(n))


# Activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [None, 9, 32, 64, 128, 1000])
@pytest.mark.parametrize("nibbles", [False, True])
def test_codes_of_activations(dtype: torch.dtype, group_size: int | None, nibbles: bool) -> None:
    """Codes, scales and sums are those of the specification, where the kernels look for them."""
    for m, k in ((1, 1), (3, 64), (5, 520), (2, 4096), (2, 14336), (1, 70000)):
        columns = Columns.of(k, group_size or 0)
        x = (normal(m, k, seed=k) * torch.logspace(-4, 3, m).view(-1, 1)).to(dtype)
        codes = torch.empty(m, columns.stride, dtype=torch.int8, device="cuda")
        scales = torch.full((m, columns.groups), torch.nan, device="cuda")
        sums = torch.full((m, columns.segments), -1, dtype=torch.int32, device="cuda")
        int8.quantize(x.cuda(), codes, scales.data_ptr(), sums.data_ptr(), columns, nibbles, 0)
        codes = codes.cpu()
        if nibbles:
            codes = codes.view(m, -1, 2, 4, 4).permute(0, 1, 3, 4, 2).reshape(m, -1)
        for group in range(columns.groups):
            part = x.float()[:, group * columns.size : (group + 1) * columns.size]
            scale = reference._int8_scale(part)
            expected = (part * torch.where(scale == 0, 0.0, 1.0 / scale)).round()
            got = codes[:, group * columns.padded : (group + 1) * columns.padded].float()
            assert_identical(scales[:, group], scale[:, 0], (m, k, group))
            assert torch.equal(got[:, : part.shape[1]], expected), (m, k, group)
            assert not got[:, part.shape[1] :].any()
        if columns.segments == columns.groups:
            padded = torch.nn.functional.pad(codes, (0, columns.groups * columns.padded - columns.stride))
            assert torch.equal(sums.cpu(), padded.view(m, columns.groups, -1).sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("only", [BLOCKS[0], SPLIT[1], BLOCKS[4], WIDES[0]], indirect=True, ids=str)
def test_activations_and_bias_of_any_dtype(only: Block | Groups | Wide, dtype: torch.dtype) -> None:
    scheme, n = Scheme(bits=8, group_size=None), 264
    stored = pack(normal(n, 160, seed=1), scheme)
    for bias in (None, normal(n), normal(n).to(dtype), normal(n).half()):
        assert_same(normal(2, 30, 160).to(dtype), stored, scheme, bias)


@pytest.mark.parametrize("size", [1e38, 1e30, 1e-30, 1e-37, 1e-44, 0.0])
def test_huge_and_tiny_activations(size: float) -> None:
    for scheme in (Scheme(bits=4), Scheme(bits=8, group_size=None)):
        stored = pack(normal(6, 192, seed=2), scheme)
        for m in (5, 40, 300):
            assert_same(normal(m, 192).clamp(-3, 3) * size, stored, scheme, normal(6) * size)


@pytest.mark.parametrize("only", [*BLOCKS, GROUPS[0]], indirect=True, ids=str)
@pytest.mark.parametrize("group_size", [None, 64])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_row_does(
    only: Block | Groups | Wide, group_size: int | None
) -> None:
    scheme, x = Scheme(bits=8, group_size=group_size), normal(140, 130)
    stored = pack(normal(24, 130, seed=1), scheme)
    x[1, 129], x[3, 0], x[64, 70], x[139, 1] = torch.nan, torch.inf, -torch.inf, torch.nan
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = product(x.to(dtype).cuda(), stored, scheme, torch.zeros(24))
        assert got[[1, 3, 64, 139]].isnan().all()
        assert_same(x.to(dtype), stored, scheme, torch.zeros(24))


def test_activations_and_weights_off_the_grid_of_the_widest_access() -> None:
    scheme, n, k = Scheme(bits=8, group_size=None), 100, 512
    packed, scales, zero_points = pack(normal(n, k), scheme)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8, device="cuda")[1:].copy_(packed)
    for m in (4, 300):
        x = normal(m * k + 1).half()[1:].view(m, k)
        expected = product(x, (packed, scales, zero_points), scheme)
        there = torch.empty(m * k + 1, dtype=torch.half, device="cuda")[1:].view(m, k).copy_(x)
        assert_identical(product(there, (shifted, scales, zero_points), scheme), expected)
        wide = torch.stack((x, x), -1).flatten(1).cuda()
        assert_identical(product(wide[:, ::2], (packed, scales, zero_points), scheme), expected)


# Shapes, graphs, layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "n", "k"),
    [((0, 64), 3, 64), ((2, 0), 3, 0), ((2, 64), 0, 64), ((64,), 3, 64), ((2, 1, 3, 9), 4, 9)],
)
def test_empty_and_many_dimensional_activations(shape: tuple[int, ...], n: int, k: int) -> None:
    scheme = Scheme(bits=8, group_size=None)
    assert_same(normal(*shape, seed=2), pack(normal(n, k), scheme), scheme, normal(n, seed=1))


@pytest.mark.parametrize("scheme", [Scheme(bits=8, group_size=None), Scheme(bits=4, group_size=128)], ids=str)
def test_products_in_a_graph_and_on_another_stream(scheme: Scheme) -> None:
    n, k = 4096, 1024
    stored = tuple(part.cuda() for part in pack(normal(n, k), scheme))
    for m in (1, 64, 600):
        x, other = normal(m, k).bfloat16().cuda(), normal(m, k, seed=1).bfloat16().cuda()
        expected, graph = product(other, stored, scheme), torch.cuda.CUDAGraph()
        product(x, stored, scheme)
        with torch.cuda.graph(graph):
            got = product(x, stored, scheme)
        x.copy_(other)
        graph.replay()
        assert_identical(got, expected)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            there = product(x, stored, scheme)
        stream.synchronize()
        assert_identical(there, expected)


@pytest.mark.parametrize("group_size", [None, 64])
def test_a_layer_gives_the_bits_of_the_cpu(group_size: int | None) -> None:
    torch.manual_seed(0)
    layer = QuantLinear.from_float(torch.nn.Linear(512, 100), Scheme(bits=8, group_size=group_size))
    x = torch.randn(3, 50, 512)
    expected = layer(x)
    layer.cuda()
    got = layer(x.cuda().requires_grad_())
    assert_identical(got, expected)
    got.sum().backward()


def test_weights_without_an_integer_form_name_the_way_out() -> None:
    scheme = Scheme(bits=4, group_size=None)
    stored = tuple(part.cuda() for part in pack(normal(5, 96), scheme))
    arguments = [*scheme.op_args(), *NEAREST.op_args(), scheme.widths, 2, "int8", "canonical", 5]
    with pytest.raises(ValueError, match="cannot read 2 bits"):
        ops.matmul(normal(2, 96).cuda(), *stored, None, *arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "scheme",
    [Scheme(bits=4), Scheme(bits=8, group_size=None), Scheme(bits=4, symmetric=False), Scheme.nested()],
    ids=str,
)
def test_a_call_past_the_dispatcher_gives_what_the_operator_gives(scheme: Scheme, dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(256, 96, dtype=dtype, device="cuda")
    layer = QuantLinear.from_float(linear, scheme, activations="int8")
    bits = [scheme.bits, 4] if scheme.is_nested else [scheme.bits]
    with torch.no_grad():
        for layer.read_bits in bits:
            for layer.bias in (linear.bias, None, torch.nn.Parameter(normal(96).cuda())):
                for shape in ((1,), (3,), (2, 8), (130,), (0,), ()):
                    x = normal(*shape, 256).to(dtype).cuda()
                    with torch.enable_grad():
                        asked = layer(x.clone().requires_grad_())
                    assert_identical(layer(x), asked.detach(), (shape, layer.bias is None))
            strided = normal(256, 8).to(dtype).cuda().t()
            assert_identical(layer(strided), layer(strided.contiguous()))
    copied = copy.deepcopy(layer)
    assert_identical(copied(x), layer(x))


# Past the dispatcher --------------------------------------------------------------------------------------


def test_a_weight_and_a_bias_are_looked_at_again_once_they_are_others() -> None:
    """What a product knows of them it knows of these tensors, on this memory."""
    scheme, n, k = Scheme(bits=4, group_size=64), 32, 256
    arguments = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths, 4)
    x, bias = normal(3, k).cuda(), normal(n, seed=1).cuda()
    weights = [tuple(part.cuda() for part in pack(normal(n, k, seed=i), scheme)) for i in range(3)]
    call = int8.Product(n, k, *arguments)

    def same(packed: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
        got = call(x, packed, scales, None, bias)
        assert got is not None
        stored = (packed, scales, packed.new_empty(0))
        return torch.equal(got, ops.matmul(x, *stored, bias, *arguments, "int8", "canonical", n))

    with torch.no_grad():
        for packed, scales, _ in weights:
            assert same(packed, scales, bias) and same(packed, scales, None) and same(packed, scales, bias)
        packed, scales, _ = weights[0]
        packed.data = weights[1][0].clone()
        assert same(packed, scales, bias)
        bias.data = bias.clone() + 1
        assert same(packed, scales, bias)
        for wrong in (
            (packed[: n * k // 4], scales, bias),
            (packed, scales.float(), bias),
            (packed, scales, bias[1:]),
        ):
            assert call(x, *wrong[:2], None, wrong[2]) is None
        assert call(x.cpu(), packed, scales, None, bias) is None
        assert call(x.to_sparse(), packed, scales, None, bias) is None
    bias.requires_grad_()
    assert call(x, packed, scales, None, bias) is None
    with torch.no_grad():
        assert same(packed, scales, bias)
