# The compiled kernels; what each does is in its docstring. Only `turboquant_rs.ops.cpu` calls them, and
# `turboquant_rs.ops.cuda.launcher` the one that launches kernels of a GPU.
#
# Arrays are contiguous, row by row; bytes and biases have one dimension. bfloat16 and float16 come as
# uint16, named by the dtype argument beside them: "f32", "f64", "bf16" or "f16". Scales are uint16 (bf16,
# f16) or float32; zero points are uint8, float32 (`preserve_variance`), or empty uint8 where the scheme has
# a constant one. `seed` is a u64 in two's complement, `stream` a CRC-32. Outputs are memory of the caller.
# The interpreter is released while a kernel runs, and results do not depend on `threads`.
#
# Errors: TypeError for wrong element types, else ValueError; each names the numbers and a way out.

from collections.abc import Sequence
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

__all__ = [
    "Launch",
    "Product",
    "active_isa",
    "after_fork",
    "allocate",
    "available_isas",
    "compiled_isas",
    "copy_bandwidth",
    "encode",
    "fake_quantize",
    "fake_quantize_backward",
    "force_isa",
    "from_panels",
    "inject_noise",
    "ladder",
    "multiply_peak",
    "pack",
    "pack_codes",
    "philox",
    "read_bandwidth",
    "share_threads",
    "to_panels",
    "unpack",
    "unpack_codes",
    "version",
]

_Bytes: TypeAlias = NDArray[np.uint8]
_Costs: TypeAlias = NDArray[np.uint64]
_Elements: TypeAlias = NDArray[np.float32] | NDArray[np.float64] | NDArray[np.uint16]
_Scales: TypeAlias = NDArray[np.float32] | NDArray[np.uint16]
_ZeroPoints: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]
# bits, group_size (0 is the whole row), symmetric, nested, table, scale, scale_dtype
_Scheme: TypeAlias = tuple[int, int, bool, bool, Sequence[int], str, str]
# mode, seed, step, stream, draw_bits, variance, preserve_variance, offset
_Rounding: TypeAlias = tuple[str, int, int, int, int, float, bool, int]
_Words: TypeAlias = tuple[int, int, int, int]

def pack(
    x: _Elements,
    dtype: str,
    rows: int,
    k: int,
    scheme: _Scheme,
    rounding: _Rounding,
    planes: Sequence[int],
    nan_zero: bool,
    packed: _Bytes,
    scales: _Scales,
    zero_points: _ZeroPoints,
    threads: int,
) -> None: ...
def encode(
    x: _Elements,
    dtype: str,
    scales: _Scales,
    zero_points: _ZeroPoints,
    rows: int,
    k: int,
    scheme: _Scheme,
    planes: Sequence[int],
    packed: _Bytes,
    threads: int,
) -> None: ...
def fake_quantize(
    x: _Elements,
    dtype: str,
    rows: int,
    k: int,
    scheme: _Scheme,
    rounding: _Rounding,
    given: bool,
    read_bits: int,
    scales: _Scales,
    zero_points: _ZeroPoints,
    out: _Elements,
    threads: int,
) -> None: ...
def fake_quantize_backward(
    grad: _Elements,
    x: _Elements,
    dtype: str,
    scales: _Scales,
    zero_points: _ZeroPoints,
    rows: int,
    k: int,
    scheme: _Scheme,
    read_bits: int,
    grad_x: _Elements,
    grad_scales: NDArray[np.float32],
    threads: int,
) -> None: ...
def inject_noise(
    x: _Elements,
    dtype: str,
    widths: NDArray[np.float32],
    rows: int,
    k: int,
    group_size: int,
    preserve_variance: bool,
    rounding: _Rounding,
    out: _Elements,
    threads: int,
) -> None: ...
def unpack(
    packed: _Bytes,
    scales: _Scales,
    zero_points: _ZeroPoints,
    rows: int,
    k: int,
    scheme: _Scheme,
    rounding: _Rounding,
    planes: Sequence[int],
    read_bits: int,
    out: _Elements,
    dtype: str,
    threads: int,
) -> None: ...
def pack_codes(
    codes: _Bytes, rows: int, k: int, planes: Sequence[int], packed: _Bytes, threads: int
) -> None: ...
def unpack_codes(
    packed: _Bytes, rows: int, k: int, planes: Sequence[int], read_bits: int, codes: _Bytes, threads: int
) -> None: ...

@final
class Product:
    def __new__(
        cls,
        n: int,
        k: int,
        scheme: _Scheme,
        rounding: _Rounding,
        planes: Sequence[int],
        read_bits: int,
        layout: str,
        activations: str,
    ) -> Self: ...
    def fill(
        self,
        x: _Elements,
        dtype: str,
        m: int,
        packed: _Bytes,
        scales: _Scales,
        zero_points: _ZeroPoints,
        bias: NDArray[np.float32] | None,
        out: _Elements,
        out_dtype: str,
        threads: int,
        /,
    ) -> None: ...
    def fill_refined(
        self,
        x: _Elements,
        dtype: str,
        m: int,
        packed: _Bytes,
        scales: _Scales,
        zero_points: _ZeroPoints,
        bias: NDArray[np.float32] | None,
        out: _Elements,
        out_dtype: str,
        refined_bits: int,
        threshold: float,
        refined: NDArray[np.bool_],
        threads: int,
        /,
    ) -> int: ...

# A kernel of a GPU: the addresses of the driver's `cuLaunchKernelEx` and of the kernel's function; its grid,
# block and bytes of shared memory; whether it may start before the one in front has ended.
@final
class Launch:
    def __new__(cls, driver: int, function: int, sizes: Sequence[int], early: bool) -> Self: ...
    # Arguments are of 4 or 8 bytes, as the kernel has it; returned is the driver's error code.
    def queue(self, stream: int, arguments: tuple[int, ...], /) -> int: ...

def to_panels(
    packed: _Bytes,
    scales: _Scales,
    zero_points: _ZeroPoints,
    rows: int,
    k: int,
    scheme: _Scheme,
    planes: Sequence[int],
    panels: _Bytes,
    panel_scales: _Scales,
    panel_zero_points: _ZeroPoints,
    threads: int,
) -> None: ...
def from_panels(
    panels: _Bytes,
    panel_scales: _Scales,
    panel_zero_points: _ZeroPoints,
    rows: int,
    k: int,
    scheme: _Scheme,
    planes: Sequence[int],
    packed: _Bytes,
    scales: _Scales,
    zero_points: _ZeroPoints,
    threads: int,
) -> None: ...
def active_isa() -> str: ...
def available_isas() -> list[str]: ...
def compiled_isas() -> list[str]: ...
def force_isa(name: str | None) -> None: ...
def version() -> str: ...
def philox(counter: _Words, key: tuple[int, int]) -> _Words: ...
def read_bandwidth(buffer: _Bytes, threads: int) -> int: ...
def copy_bandwidth(source: _Bytes, target: _Bytes, threads: int) -> None: ...
def multiply_peak(activations: str, rounds: int, threads: int) -> int: ...
def after_fork() -> None: ...
def share_threads(path: str) -> bool: ...

# costs, scores: items × choices, row by row; one choice (its number) for each item.
def allocate(costs: _Costs, scores: NDArray[np.float64], choices: int, budget: int) -> list[int]: ...

# One such solution for each budget, one behind the other.
def ladder(costs: _Costs, scores: NDArray[np.float64], choices: int, budgets: _Costs) -> list[int]: ...
