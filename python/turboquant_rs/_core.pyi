"""The compiled kernels. Only `turboquant_rs.ops.cpu` calls them.

Arrays have one dimension and are contiguous. bfloat16 and float16 come as uint16, named by the dtype argument
beside them: "f32", "f64", "bf16" or "f16". Scales are uint16 (bf16, f16) or float32; zero points are uint8,
float32 (`preserve_variance`), or an empty uint8 array where the scheme has a constant one. `seed` is a u64 in
two's complement, `stream` a CRC-32. Outputs are memory of the caller. The interpreter is released while a kernel
runs; results do not depend on `threads`.

Errors: TypeError for wrong element types, ValueError for everything else, each naming the numbers and a way out.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_Bytes: TypeAlias = NDArray[np.uint8]
_Elements: TypeAlias = NDArray[np.float32] | NDArray[np.float64] | NDArray[np.uint16]
_Scales: TypeAlias = NDArray[np.float32] | NDArray[np.uint16]
_ZeroPoints: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]
_Words: TypeAlias = tuple[int, int, int, int]

def pack(
    x: _Elements,
    dtype: str,
    rows: int,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    nested: bool,
    table: Sequence[int],
    scale: str,
    scale_dtype: str,
    rounding: str,
    seed: int,
    step: int,
    stream: int,
    draw_bits: int,
    variance: float,
    preserve_variance: bool,
    offset: int,
    planes: Sequence[int],
    nan_zero: bool,
    packed: _Bytes,
    scales: _Scales,
    zero_points: _ZeroPoints,
    threads: int,
) -> None:
    """Quantize x (rows · k) and pack its codes into packed, scales and zero_points."""

def unpack(
    packed: _Bytes,
    scales: _Scales,
    zero_points: _ZeroPoints,
    rows: int,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    nested: bool,
    table: Sequence[int],
    scale: str,
    scale_dtype: str,
    rounding: str,
    seed: int,
    step: int,
    stream: int,
    draw_bits: int,
    variance: float,
    preserve_variance: bool,
    offset: int,
    planes: Sequence[int],
    read_bits: int,
    out: _Elements,
    dtype: str,
    threads: int,
) -> None:
    """Unpack and dequantize the top read_bits bits into out (rows · k)."""

def pack_codes(
    codes: _Bytes, rows: int, k: int, planes: Sequence[int], packed: _Bytes, threads: int
) -> None:
    """Stack codes (rows · k) into bit planes."""

def unpack_codes(
    packed: _Bytes, rows: int, k: int, planes: Sequence[int], read_bits: int, codes: _Bytes, threads: int
) -> None:
    """Read the top read_bits bits of every code into codes (rows · k)."""

def matmul(
    x: _Elements,
    dtype: str,
    m: int,
    packed: _Bytes,
    scales: _Scales,
    zero_points: _ZeroPoints,
    bias: NDArray[np.float32] | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    nested: bool,
    table: Sequence[int],
    scale: str,
    scale_dtype: str,
    rounding: str,
    seed: int,
    step: int,
    stream: int,
    draw_bits: int,
    variance: float,
    preserve_variance: bool,
    offset: int,
    planes: Sequence[int],
    read_bits: int,
    activations: str,
    out: _Elements,
    out_dtype: str,
    threads: int,
) -> None:
    """out (m · n) = x (m · k) times the transposed packed matrix (n · k), plus bias (n).

    activations is "int8" (x quantized by row and group) or "float" (weights dequantized).
    """

def active_isa() -> str:
    """Name of the instruction set in use."""

def available_isas() -> list[str]:
    """Names of the instruction sets that this CPU can run, best first."""

def compiled_isas() -> list[str]:
    """Names of the instruction sets that this build has, best first."""

def force_isa(name: str | None) -> None:
    """Use the instruction set name from now on; None chooses the best again."""

def version() -> str:
    """Version of the package."""

def philox(counter: _Words, key: tuple[int, int]) -> _Words:
    """Philox4x32-10: four words of counter and two of key to four random words."""

def read_bandwidth(buffer: _Bytes, threads: int) -> int:
    """Read buffer once; return a checksum. Timing is the caller's."""

def copy_bandwidth(source: _Bytes, target: _Bytes, threads: int) -> None:
    """Copy source to target once. Timing is the caller's."""

def after_fork() -> None:
    """Forget the threads that a child process did not inherit."""
