"""Products of float activations with weights in tiles, on a GPU: sums in f32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends import assert_identical
from turboquant_rs import Rounding, Scheme, ops
from turboquant_rs.nn import QuantLinear
from turboquant_rs.ops.cuda.tiles import Product

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

NEAREST = Rounding.nearest()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def schemes() -> list[tuple[Scheme, int]]:
    """Kinds of weights that kernels are compiled for, with the bits read of them."""
    return [
        *((Scheme(bits=bits, group_size=64), bits) for bits in range(1, 9)),
        *((Scheme(bits=bits, group_size=32, symmetric=False, scale_dtype="f16"), bits) for bits in (2, 4, 8)),
        *((Scheme(bits=4, group_size=size, scale_dtype="f32"), 4) for size in (96, 128, 256, None)),
        (Scheme(bits=6, group_size=64, symmetric=False), 4),
        (Scheme(bits=3, group_size=64), 2),
        *((Scheme.nested(group_size=128, planes=(4, 1, 1, 2)), bits) for bits in (4, 5, 6, 8)),
        *((Scheme.nested(group_size=64, planes=(2, 1, 1, 1, 1, 2)), bits) for bits in (2, 3, 4, 8)),
    ]


def product(
    x: Tensor, tiles: tuple[Tensor, ...], scheme: Scheme, bits: int, bias: Tensor | None, n: int = 0
) -> Tensor:
    args = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths, bits, "float", "tiles", n or N)
    y: Tensor = ops.matmul(x, *tiles, bias, *args)
    return y


N = 200
"""Rows of W: no multiple of a tile, let alone of a block."""


def assert_close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the worst error of summing k products in f32 in any order, 2·k·ε·Σ|x·w|, and of one rounding; of
    weights that are rounded to the dtype of x where its rows are many."""
    if is_rounded(x.shape[0]):
        weight = weight.to(x.dtype)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact = exact + bias.double()
    epsilon = 2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-11
    bound = 2 * x.shape[-1] * 2.0**-24 * size + epsilon * exact.abs() + 1e-6
    assert ((got.double() - exact).abs() <= bound).all()


def is_rounded(m: int) -> bool:
    """Whether m rows of x meet weights as `unpack` rounds them, on this GPU."""
    return m > (16 if torch.cuda.get_device_capability() == (9, 0) else 128)


HALVES = (torch.bfloat16, torch.float16)
CASES = [(scheme, bits, HALVES[at % 2]) for at, (scheme, bits) in enumerate(schemes())]
CASES += [(Scheme(bits=bits, group_size=64), bits, HALVES[1 - (bits - 1) % 2]) for bits in (3, 4, 6, 8)]


@pytest.mark.parametrize(("scheme", "bits", "dtype"), CASES)
def test_the_product_is_that_with_the_dequantized_weight(
    scheme: Scheme, bits: int, dtype: torch.dtype
) -> None:
    """Rows of x for every kernel, at and beside what a block takes; columns that end within a unit, and so
    many that blocks share them."""
    for k in (8, 520, 4096) if scheme.bits == 4 else (8, 520):
        stored = tuple(
            part.cuda()
            for part in ops.pack(normal(N, k), *scheme.op_args(), *NEAREST.op_args(), scheme.widths, False)
        )
        weight = ops.unpack(
            *stored, *scheme.op_args(), *NEAREST.op_args(), scheme.widths, bits, (N, k), torch.float32
        )
        tiles = ops.to_tiles(*stored, scheme.widths, k)
        for m in (1, 2, 8, 9, 17, 33, 64, 67, 128, 129):
            x = normal(m, k, seed=m).to(dtype).cuda()
            bias = (None, normal(N).to(dtype).cuda(), normal(N).cuda())[m % 3]
            got = product(x, tiles, scheme, bits, bias)
            assert_close(got, x, weight, bias)
            assert_identical(product(x, tiles, scheme, bits, bias), got, "again")


@pytest.mark.parametrize("m", [17, 32, 33, 65, 129, 193, 257, 385, 513, 2048, 2049])
def test_many_rows_of_x_meet_weights_that_are_rounded(m: int) -> None:
    """As `unpack` rounds them, in registers or in memory; at and beside the rows of x that a block takes."""
    few, many, most = Scheme(bits=4, group_size=64), Scheme(bits=3, group_size=96), Scheme(bits=8)
    for n, scheme in ((N, few), (9000, many), (24000, most)):  # for the last x is brought to its order
        arguments, k = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths), 1096
        stored = ops.pack(normal(n, k).cuda(), *arguments, False)
        weight = ops.unpack(*stored, *arguments, scheme.bits, (n, k), torch.bfloat16)
        x = normal(m, k, seed=m).to(torch.bfloat16).cuda()
        tiles = ops.to_tiles(*stored, scheme.widths, k)
        got = ops.matmul(x, *tiles, None, *arguments, scheme.bits, "float", "tiles", n)
        assert_close(got, x, weight, None)


@pytest.mark.parametrize(("scheme", "bits", "dtype"), CASES)
def test_rounded_weights_are_those_of_unpack(scheme: Scheme, bits: int, dtype: torch.dtype) -> None:
    """A row of x with a single one picks a column; in registers, and in memory."""
    arguments, k = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths), 600
    stored = ops.pack(normal(N, k, seed=1).cuda(), *arguments, False)
    weight = ops.unpack(*stored, *arguments, bits, (N, k), dtype)
    tiles = ops.to_tiles(*stored, scheme.widths, k)
    for m in filter(is_rounded, (17, 40, 200, k)):
        x = torch.eye(m, k, dtype=dtype, device="cuda")
        assert (product(x, tiles, scheme, bits, None) == weight.T[:m]).all()


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-60, 1.0, 2.0**4, 2.0**60, 2.0**116])
def test_scales_of_every_size_give_the_weights_of_unpack(size: float) -> None:
    """Small and large ones come to operands by different ways; in a row they lie side by side."""
    for scheme in (Scheme(bits=4, group_size=32), Scheme(bits=8), Scheme(bits=2, group_size=64)):
        arguments, k = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths), 512
        values = normal(N, k, seed=1) * size
        values[::3, : k // 2] *= 0.125
        stored = ops.pack(values.cuda(), *arguments, False)
        weight = ops.unpack(*stored, *arguments, scheme.bits, (N, k), torch.bfloat16)
        tiles = ops.to_tiles(*stored, scheme.widths, k)
        for m in (1, 9, *filter(is_rounded, (17, 40, 200, k))):
            x = torch.eye(m, k, dtype=torch.bfloat16, device="cuda")
            assert (product(x, tiles, scheme, scheme.bits, None) == weight.T[:m]).all()


def test_blocks_go_on_from_tile_to_tile() -> None:
    """More tiles than blocks that fit at once, and no whole number of them."""
    scheme, n, k = Scheme(bits=4, group_size=64), 20005, 264
    arguments = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths)
    stored = ops.pack(normal(n, k).cuda(), *arguments, False)
    weight = ops.unpack(*stored, *arguments, 4, (n, k), torch.float32)
    tiles = ops.to_tiles(*stored, scheme.widths, k)
    for m in (1, 11, 30, 60, 120):
        x = normal(m, k, seed=m).half().cuda()
        assert_close(ops.matmul(x, *tiles, None, *arguments, 4, "float", "tiles", n), x, weight, None)


@pytest.mark.parametrize("bits", [3, 4])
def test_many_rows_of_x_with_more_tiles_than_blocks(bits: int) -> None:
    """Numbers of them whose last ones are halved or not; rows that end anywhere."""
    scheme, k = Scheme(bits=bits, group_size=64), 392
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    arguments = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths)
    for m, n in (
        (400, 30 * processors),
        (400, 64 * processors + 130),
        (900, 48 * processors + 5),
        (1500, 64 * processors - 4),
    ):
        stored = ops.pack(normal(n, k).cuda(), *arguments, False)
        weight = ops.unpack(*stored, *arguments, bits, (n, k), torch.bfloat16)
        tiles, x = ops.to_tiles(*stored, scheme.widths, k), normal(m, k).bfloat16().cuda()
        bias = normal(n).cuda()
        got = product(x, tiles, scheme, bits, bias, n)
        assert_close(got, x, weight, bias)
        assert_identical(product(x, tiles, scheme, bits, bias, n), got, "again")


@pytest.mark.parametrize("m", [4, 20, 40, 100, 200, 600])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_row_does(m: int) -> None:
    scheme, k = Scheme(bits=4, group_size=64), 520
    stored = ops.pack(normal(N, k).cuda(), *scheme.op_args(), *NEAREST.op_args(), scheme.widths, False)
    tiles = ops.to_tiles(*stored, scheme.widths, k)
    x = normal(m, k).to(torch.bfloat16).cuda()
    clean = product(x, tiles, scheme, 4, None)
    x[1, k - 1], x[3, 0] = torch.nan, torch.inf
    got = product(x, tiles, scheme, 4, None)
    finite = torch.ones(m, dtype=torch.bool)
    finite[[1, 3]] = False
    assert got[~finite].isnan().all()
    assert_identical(got[finite], clean[finite])


def test_a_layer_keeps_its_weight_in_tiles() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 100, dtype=torch.bfloat16, device="cuda")
    layer = QuantLinear.from_float(linear, Scheme.nested(group_size=64), activations="float")
    x, packed = torch.randn(3, 5, 512, dtype=torch.bfloat16, device="cuda"), layer.weight_packed.clone()
    for bits in (8, 4):
        layer.read_bits = bits
        weight = layer.packed.dequantize(dtype=torch.float32)
        got = layer(x)
        assert layer._panels is not None
        assert_close(got.detach().view(15, 100), x.view(15, 512), weight, layer.bias.detach())
        y = layer(x.requires_grad_())
        y.sum().backward()
        torch.testing.assert_close(x.grad.float(), weight.sum(0).expand(3, 5, 512), rtol=0.02, atol=0.02)
        x = x.detach()
    assert_identical(layer.weight_packed, packed)


def test_activations_off_the_grid_of_the_widest_access() -> None:
    scheme, k = Scheme(bits=4, group_size=64), 512
    arguments = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths)
    tiles = ops.to_tiles(*ops.pack(normal(N, k).cuda(), *arguments, False), scheme.widths, k)
    x = normal(5 * k + 1).half().cuda()[1:].view(5, k)
    for bias in (None, normal(N).cuda()[::2].repeat(2)[:N], normal(2 * N).cuda()[::2]):
        expected = product(x.clone(), tiles, scheme, 4, None if bias is None else bias.contiguous())
        assert_identical(product(x, tiles, scheme, 4, bias), expected)


def test_products_in_a_graph_and_on_another_stream() -> None:
    scheme, k = Scheme(bits=4, group_size=128), 1024
    stored = ops.pack(normal(N, k).cuda(), *scheme.op_args(), *NEAREST.op_args(), scheme.widths, False)
    tiles = ops.to_tiles(*stored, scheme.widths, k)
    for m in (1, 16, 64):
        x = normal(m, k).half().cuda()
        expected, graph = product(x, tiles, scheme, 4, None), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = product(x, tiles, scheme, 4, None)
        graph.replay()
        assert_identical(got, expected)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            there = product(x, tiles, scheme, 4, None)
        stream.synchronize()
        assert_identical(there, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_few_rows_of_x_with_as_many_of_the_weight_as_fill_a_gpu(bits: int) -> None:
    """Tiles that a warp takes together, and more of them than blocks there is room for at once."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    scheme = Scheme(bits=bits, group_size=128)
    arguments = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths)
    for n, k in ((24 * processors + 8, 520), (40 * processors + 8, 520), (300 * processors + 8, 72)):
        stored = ops.pack(normal(n, k).cuda(), *arguments, False)
        weight = ops.unpack(*stored, *arguments, bits, (n, k), torch.float32)
        tiles, bias = ops.to_tiles(*stored, scheme.widths, k), normal(n).cuda()
        for m in (1, 7, 16):
            x = normal(m, k, seed=m).bfloat16().cuda()
            assert_close(product(x, tiles, scheme, bits, bias, n), x, weight, bias)


def test_weights_off_the_grid_of_the_widest_access() -> None:
    scheme, k = Scheme(bits=4, group_size=64, symmetric=False), 512
    arguments = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths)
    tiles = ops.to_tiles(*ops.pack(normal(N, k).cuda(), *arguments, False), scheme.widths, k)
    moved = tuple(torch.cat((part.view(-1)[:1], part.view(-1)))[1:].view(part.shape) for part in tiles)
    for m in (1, 20):
        x = normal(m, k).half().cuda()
        assert_identical(product(x, moved, scheme, 4, None), product(x, tiles, scheme, 4, None))


@pytest.mark.parametrize("rows", [1, 16, 40])
def test_a_product_reads_what_was_written_in_front_of_it(rows: int) -> None:
    """Though it is brought up while that is: results of the last product, and a weight that has changed."""
    scheme = Scheme(bits=4, group_size=64)
    arguments = (*scheme.op_args(), *NEAREST.op_args(), scheme.widths)
    weights = [
        ops.to_tiles(*ops.pack(0.07 * normal(N, N, seed=seed).cuda(), *arguments, False), scheme.widths, N)
        for seed in range(12)
    ]
    x, own = normal(rows, N).bfloat16().cuda(), tuple(part.clone() for part in weights[0])
    changing, *others = (Product(*tiles, N, *arguments, 4, "float", "tiles", N) for tiles in (own, *weights))

    def chain(waits: bool) -> Tensor:
        y = x
        for weight, other in zip(weights, others, strict=True):
            for part, new in zip(own, weight, strict=True):
                part.copy_(new)
            for multiply in (changing, other, changing):
                result = multiply(y, None)
                assert result is not None
                y, _ = result
                if waits:
                    torch.cuda.synchronize()
        return y

    expected, graph = chain(True), torch.cuda.CUDAGraph()
    for _ in range(20):
        assert_identical(chain(False), expected)
    with torch.cuda.graph(graph):
        got = chain(False)
    for _ in range(20):
        got.zero_()
        graph.replay()
        assert_identical(got, expected)
