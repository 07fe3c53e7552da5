"""Each kind of kernel once, small, for compute-sanitizer: `make gpu` runs it under memcheck and racecheck."""

from __future__ import annotations

import torch

import turboquant_rs as tq
from turboquant_rs import Rounding, Scheme, ops
from turboquant_rs.ops.tiles import tiles_nbytes
from turboquant_rs.packed import matmul_refined

WAYS = (
    (Scheme(group_size=128), Rounding.nearest()),
    (Scheme(bits=3, group_size=12, symmetric=False), Rounding.stochastic(0, mode="systematic")),
    (Scheme(bits=4, group_size=128), Rounding.stochastic(0)),
    (Scheme(bits=4, group_size=None), Rounding.stochastic(0, mode="antithetic", draw_bits=32)),
    (Scheme(bits=8, group_size=None), Rounding.stochastic(0, mode="stratified", preserve="mean+var")),
    (Scheme(bits=4, levels="lloyd"), Rounding.nearest()),
    (Scheme(bits=2, scale="mse"), Rounding.nearest()),
    (Scheme(bits=1), Rounding.nearest()),
    (Scheme.nested(planes=(2, 1, 1, 1, 1, 2)), Rounding.nearest()),
    (Scheme(bits=7), Rounding.stochastic(0, mode="subtractive")),
)


INT8 = (Scheme(bits=8, group_size=None), Scheme(bits=4), Scheme(bits=3, group_size=12, symmetric=False))


def packing() -> None:
    """Packed and decoded."""
    for scheme, rounding in WAYS:
        for shape in ((6, 256), (3, 77), (2, 5000)):
            p = tq.pack(torch.randn(shape, device="cuda"), scheme=scheme, rounding=rounding)
            p.dequantize()
            p.codes()


def training() -> None:
    """Codes on scales that are given, values as they are trained, their gradients, noise."""
    for scheme, rounding in WAYS:
        if rounding.mode == "subtractive" or rounding.preserve == "mean+var":
            continue  # what is trained is codes and scales alone
        args = (*scheme.op_args(), *rounding.op_args(), scheme.bits)
        for shape in ((6, 256), (3, 77)):
            x = torch.randn(shape, device="cuda")
            y, scales, zero_points = ops.fake_quantize(x, None, None, *args)
            if rounding.mode == "nearest":
                ops.fake_quantize_backward(y, x, scales, zero_points, *scheme.op_args(), scheme.bits)
                ops.encode(x, scales, zero_points, *scheme.op_args(), scheme.widths)
    for preserve in (False, True):
        widths = torch.ones(3, 2, device="cuda")
        x = torch.randn(3, 77, device="cuda")
        ops.inject_noise(x, widths, 64, preserve, *Rounding.stochastic(1).op_args())


def products() -> None:
    """Of floats and of integers, for few rows and many, with weights of every layout."""
    for scheme in INT8:
        p = tq.pack(torch.randn(40, 160, device="cuda"), scheme=scheme)
        for m in (1, 20, 80, 300):
            tq.matmul(torch.randn(m, 160, device="cuda"), p)
    # On Hopper tiles for many rows: of rows, and of groups.
    for scheme in (Scheme(bits=8, group_size=None), Scheme(bits=8, group_size=128)):
        p = tq.pack(torch.randn(4096, 256, device="cuda"), scheme=scheme)
        tq.matmul(torch.randn(600, 256, device="cuda").bfloat16(), p)
    # So large a weight that x is brought to its order; any bits are one.
    n, k, scheme = 24000, 1024, Scheme(bits=8)
    codes = torch.randint(0, 256, (tiles_nbytes(n, k, 8),), dtype=torch.uint8, device="cuda")
    scales = torch.ones(n, scheme.groups(k), dtype=torch.bfloat16, device="cuda")
    args = (*scheme.op_args(), *Rounding.nearest().op_args(), scheme.widths, 8, "float", "tiles", n)
    ops.matmul(torch.randn(20, k, device="cuda").bfloat16(), codes, scales, codes[:0], None, *args)
    for dtype, scheme in (
        (torch.bfloat16, Scheme.nested()),
        (torch.float16, Scheme(bits=3, symmetric=False)),
    ):
        layer = tq.nn.QuantLinear(192, 72, scheme=scheme, dtype=dtype, device="cuda", activations="float")
        with torch.no_grad():
            for m in (1, 12, 30, 60, 120, 200, 300):
                layer(torch.randn(m, 192, device="cuda").to(dtype))


def choices() -> None:
    """Launches that are chosen when they run: in a graph, and by rows."""
    ones = torch.ones(8, 8, device="cuda")
    torch.mm(ones, ones)  # torch makes its handle, which must not be in a capture
    for activations, dtype in (("float", torch.bfloat16), ("float", torch.float32), ("int8", torch.float16)):
        layer = tq.nn.QuantLinear(
            192, 72, scheme=Scheme.nested(), dtype=dtype, device="cuda", activations=activations
        )
        for m in (1, 200):
            x, graph = torch.randn(m, 192, device="cuda").to(dtype), torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(graph):
                layer(x)
            for bits in (4, 8):
                layer.read_bits = bits
                graph.replay()
    p = tq.pack(torch.randn(40, 160, device="cuda"), scheme=Scheme.nested())
    for threshold in (-1.0, 0.03, 1e9):
        matmul_refined(
            torch.randn(9, 160, device="cuda"), p, None, bits=4, refined_bits=8, threshold=threshold
        )


def main() -> None:
    for part in (packing, training, products, choices):
        part()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
