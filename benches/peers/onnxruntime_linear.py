"""ONNX Runtime: MatMulNBits with int8 activations inside (accuracy level 4), and DynamicQuantizeMatMul."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from peers import torch_eager
from peers.layer import Call, Contender, Layer, output, signed


@cache
def options(threads: int) -> Any:
    """One pool for all sessions: with one each, their workers spin in each other's way.

    A process has one such pool, and no session without it afterwards: one thread comes first, and a second
    number of threads above one raises onnxruntime's Fail.
    """
    import onnxruntime

    found = onnxruntime.SessionOptions()
    found.log_severity_level = 3
    if threads == 1:
        found.intra_op_num_threads = 1
    else:
        onnxruntime.set_default_logger_severity(3)
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        found.use_per_session_threads = False
    return found


def model(operator: str, n: int, k: int, parts: dict[str, NDArray[Any]], attributes: dict[str, int]) -> bytes:
    """One node: y = operator(x, *parts)."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(operator, ["x", *parts], ["y"], domain="com.microsoft", **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])
    stored = [numpy_helper.from_array(part, name) for name, part in parts.items()]
    graph = helper.make_graph([node], "linear", [x], [y], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(proto.SerializeToString())


def sessions(
    operator: str, n: int, k: int, threads: int, parts: dict[str, NDArray[Any]], **attributes: int
) -> Iterator[Layer]:
    import onnxruntime

    stored = model(operator, n, k, parts, attributes)

    def bind(x: Tensor, session: Any) -> Call:
        y = output(len(x), n)
        binding = session.io_binding()
        binding.bind_cpu_input("x", x.numpy())
        binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)

        def call() -> NDArray[np.float32]:
            session.run_with_iobinding(binding)
            return y

        return call

    while True:
        session = onnxruntime.InferenceSession(stored, options(threads), providers=["CPUExecutionProvider"])
        yield Layer(partial(bind, session=session), sum(part.nbytes for part in parts.values()))


def int4(block: int, weight: Tensor, threads: int) -> Iterator[Layer]:
    """Codes about 8, f32 scales."""
    n, k = weight.shape
    codes, scales = torch_eager.pack(weight, 4, block)
    parts = {
        "codes": codes.view(n, k // block, block // 2).numpy(),
        "scales": scales.float().flatten().numpy(),
    }
    attributes = {"K": k, "N": n, "bits": 4, "block_size": block, "accuracy_level": 4}
    return sessions("MatMulNBits", n, k, threads, parts, **attributes)


def int8(weight: Tensor, threads: int) -> Iterator[Layer]:
    """One scale a row of the weight; u8 activations, one scale a call."""
    n, k = weight.shape
    codes, scales = torch_eager.quantize(weight, 8, k)
    parts = {"codes": signed(codes).t().contiguous().numpy(), "scales": scales.float().flatten().numpy()}
    return sessions("DynamicQuantizeMatMul", n, k, threads, parts)


CONTENDERS = [
    Contender("onnxruntime int8 dynamic", "W8A8", int8),
    *(Contender(f"onnxruntime int4 b{block}", f"W4A8 g{block}", partial(int4, block)) for block in (128, 32)),
]
