"""Each kind of kernel once, small, for compute-sanitizer: `make gpu` runs it under memcheck and racecheck."""

from __future__ import annotations

import torch

import turboquant_rs as tq
from turboquant_rs import Rounding, Scheme

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


def main() -> None:
    for scheme, rounding in WAYS:
        for shape in ((6, 256), (3, 77), (2, 5000)):
            p = tq.pack(torch.randn(shape, device="cuda"), scheme=scheme, rounding=rounding)
            p.dequantize()
            p.codes()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
