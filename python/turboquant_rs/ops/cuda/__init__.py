"""The CUDA backend: kernels in `cuda/`, a file a noun, compiled by CuPy (`compiler`), launched (`launcher`).

Results are those of every other backend, bit for bit, except for matmuls of float activations, whose order of
summation is the backend's own. What has no kernel here runs as the specification, which is plain torch.

Values outside the domain are errors here too, and finding them means waiting for the kernel: whatever looks
at values (packing, fake quantization, its gradients, noise) synchronises with its stream, except while a
graph is captured, where nothing can be raised. There, and there alone, a group with such a value gets the
scale NaN, or NaN for results, so that it cannot pass for data.
"""

from __future__ import annotations

from turboquant_rs.ops import reference
from turboquant_rs.ops.cuda.fake_quantize import (
    fake_quantize_backward_out,
    fake_quantize_out,
    inject_noise_out,
)
from turboquant_rs.ops.cuda.int8 import Product as CanonicalProduct
from turboquant_rs.ops.cuda.matmul import matmul_out
from turboquant_rs.ops.cuda.planes import pack_codes_out, unpack_codes_out
from turboquant_rs.ops.cuda.quantize import encode_out, pack, pack_out, unpack_out
from turboquant_rs.ops.cuda.refined import matmul_refined_out
from turboquant_rs.ops.cuda.tiles import Product
from turboquant_rs.ops.schema import register

__all__ = ["CanonicalProduct", "Product"]

register(
    {
        "pack": pack,
        "pack_out": pack_out,
        "unpack_out": unpack_out,
        "pack_codes_out": pack_codes_out,
        "unpack_codes_out": unpack_codes_out,
        "matmul_out": matmul_out,
        "encode_out": encode_out,
        "fake_quantize_out": fake_quantize_out,
        "fake_quantize_backward_out": fake_quantize_backward_out,
        "inject_noise_out": inject_noise_out,
        "matmul_refined_out": matmul_refined_out,
        # The order of the CPU's kernels: of no use here but for what comes from there.
        "to_panels_out": reference.to_panels_out,
        "from_panels_out": reference.from_panels_out,
    },
    "CUDA",
)
