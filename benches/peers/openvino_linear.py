"""OpenVINO: a u4 weight decompressed in the graph, which its CPU plugin runs on int8 activations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from peers import torch_eager
from peers.layer import Call, Contender, Layer, output


@cache
def core() -> Any:
    import openvino

    return openvino.Core()


def compiled(codes: Tensor, scales: Tensor, n: int, k: int, group_size: int, threads: int) -> Any:
    """x @ Wᵀ with W = (u4 - 8) · f16 scale; activations are quantized in groups of the same size."""
    import openvino
    from openvino import opset13 as ops

    shape = openvino.Shape([n, k // group_size, group_size])
    stored = ops.constant(openvino.Tensor(codes.numpy(), shape, openvino.Type.u4))
    eight = ops.constant([[[8]]], openvino.Type.u4)
    steps = ops.subtract(ops.convert(stored, "f16"), ops.convert(eight, "f16"))
    groups = ops.multiply(steps, ops.constant(scales.view(n, -1, 1).numpy()))
    w = ops.convert(ops.reshape(groups, [n, k], False), "f32")
    x = ops.parameter([-1, k], openvino.Type.f32)
    product = openvino.Model([ops.matmul(x, w, False, True)], [x])
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group_size,
        "ENABLE_CPU_PINNING": False,
    }
    return core().compile_model(product, "CPU", settings)


def u4(group_size: int, weight: Tensor, threads: int) -> Iterator[Layer]:
    n, k = weight.shape
    codes, scales = torch_eager.pack(weight, 4, group_size)
    scales = scales.to(torch.float16)

    # `own` is memory that the plugin may go on reading.
    def bind(x: Tensor, request: Any, own: Tensor) -> Call:
        import openvino

        y = output(len(x), n)
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
        request.set_output_tensor(openvino.Tensor(y, shared_memory=True))

        def call() -> object:
            request.infer()
            return y

        return call

    while True:
        own = codes.flatten().clone()
        request = compiled(own, scales, n, k, group_size, threads).create_infer_request()
        yield Layer(partial(bind, request=request, own=own), codes.nbytes + scales.nbytes)


CONTENDERS = [
    Contender(f"openvino u4 g{group_size}", f"W4A8 g{group_size}", partial(u4, group_size))
    for group_size in (128, 32)
]
