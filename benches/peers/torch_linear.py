"""PyTorch's own: F.linear, oneDNN's prepacked products, int8 dynamic and static, int4 on bf16 activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from peers import torch_eager
from peers.layer import Call, Contender, Layer, signed


def plain(dtype: torch.dtype, weight: Tensor, threads: int) -> Iterator[Layer]:
    """F.linear, as users write it."""

    def bind(x: Tensor, own: Tensor) -> Call:
        return partial(F.linear, x.to(dtype), own)

    while True:
        own = weight.to(dtype, copy=True)
        yield Layer(partial(bind, own=own), own.nbytes)


def prepacked(dtype: torch.dtype, weight: Tensor, threads: int) -> Iterator[Layer]:
    """oneDNN on a weight in the layout it asks for at this m: what torch.compile's freezing does."""

    def bind(x: Tensor, own: Tensor) -> Call:
        packed = torch.ops.mkldnn._reorder_linear_weight(own, x.shape[0])
        return partial(torch.ops.mkldnn._linear_pointwise, x.to(dtype), packed, None, "none", [], "")

    while True:
        own = weight.to(dtype, copy=True)
        yield Layer(partial(bind, own=own), own.nbytes)


def rows_of_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, k) int8 and f32 scales (n,)."""
    codes, scales = torch_eager.quantize(weight, 8, weight.shape[1])
    return signed(codes), scales.float().flatten()


def dynamic(engine: str, weight: Tensor, threads: int) -> Iterator[Layer]:
    """`quantized.linear_dynamic`: what quantize_dynamic runs; u8 activations, one scale a call."""
    codes, scales = rows_of_int8(weight)
    zeros = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated
        quantized = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)

    def bind(x: Tensor, packed: object) -> Call:
        return partial(torch.ops.quantized.linear_dynamic, x, packed)

    while True:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine  # chosen when the weight is packed
        try:
            packed = torch.ops.quantized.linear_prepack(quantized, None)
        finally:
            torch.backends.quantized.engine = before
        yield Layer(partial(bind, packed=packed), codes.nbytes + scales.nbytes)


def static(weight: Tensor, threads: int) -> Iterator[Layer]:
    """oneDNN on activations that are u8 codes already (int8 ones would run in its reference kernel)."""
    codes, scales = rows_of_int8(weight)
    zeros = torch.zeros(len(scales), dtype=torch.int32)

    def bind(x: Tensor, packed: Tensor) -> Call:
        low, high = x.aminmax()
        step = float(high - low) / 255
        zero = round(-float(low) / step)
        given = (x / step).round_().add_(zero).clamp_(0, 255).to(torch.uint8)
        inputs = (given, step, zero, packed, scales, zeros, None)
        return partial(torch.ops.onednn.qlinear_pointwise, *inputs, 1.0, 0, torch.float32, "none", [], "")

    while True:
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        yield Layer(partial(bind, packed=packed), codes.nbytes + scales.nbytes)


def int4(group_size: int, weight: Tensor, threads: int) -> Iterator[Layer]:
    """aten's int4 product; activations in bf16, which is 50 times faster there than f32."""
    codes, scales = torch_eager.quantize(weight, 4, group_size)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    pairs = torch.stack((scales.t(), torch.zeros_like(scales.t())), dim=2).contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu

    def bind(x: Tensor, packed: Tensor, pairs: Tensor) -> Call:
        return partial(product, x.bfloat16(), packed, group_size, pairs)

    while True:
        own = {"packed": packed.clone(), "pairs": pairs.clone()}
        yield Layer(partial(bind, **own), packed.nbytes + pairs.nbytes)


def named(name: str, kind: str, layers: Callable[..., Iterator[Layer]], *args: object) -> Contender:
    return Contender(name, kind, partial(layers, *args))


CONTENDERS = [
    named("torch f32 F.linear", "float", plain, torch.float32),
    named("torch bf16 F.linear", "float", plain, torch.bfloat16),
    named("torch f32 oneDNN prepacked", "float", prepacked, torch.float32),
    named("torch bf16 oneDNN prepacked", "float", prepacked, torch.bfloat16),
    *(
        named(f"torch int8 dynamic {engine}", "W8A8", dynamic, engine)
        for engine in ("fbgemm", "x86", "onednn")
    ),
    named("torch int8 static u8 onednn", "W8A8 static", static),
    *(named(f"torch int4pack bf16 g{group}", f"W4A16 g{group}", int4, group) for group in (128, 32)),
]
