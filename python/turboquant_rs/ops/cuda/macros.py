"""Schemes and roundings as the macros and arguments of kernels: `scheme.cuh` says what they mean there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turboquant_rs.ops.reference import LLOYD_MAX
from turboquant_rs.ops.schema import RoundingArgs, SchemeArgs, packed_nbytes
from turboquant_rs.scheme import NESTED_PLANES, static_planes

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
RULES = {"extreme": 0, "mse": 1, "rms": 2}
MODES = {"nearest": 0, "iid": 1, "antithetic": 2, "stratified": 3, "systematic": 4, "subtractive": 5}

FULL_VARIANCE = 65536
"""A variance of 1, in units of 2^-16."""

ALIGNMENT = 16
"""Bytes of the widest access."""


_STACKS = (*map(static_planes, range(1, 9)), *NESTED_PLANES)


def plane_macros(planes: Sequence[int]) -> dict[str, object]:
    """PLANES. Raises: ValueError for widths that begin no stack of the number format."""
    own = tuple(planes)
    if not own or all(stack[: len(own)] != own for stack in _STACKS):
        choices = " or ".join(str(list(stack)) for stack in _STACKS if sum(stack) == sum(own))
        raise ValueError(f"planes {list(own)} do not store {sum(own)} bits; use {choices or '1 to 8 bits'}")
    return {"PLANES": ",".join(map(str, planes))}


def scheme_macros(scheme: SchemeArgs, preserve_variance: bool) -> dict[str, object]:
    """BITS to ZERO_POINTS."""
    stored = 2 if preserve_variance else 0 if scheme.symmetric else 1
    return {
        "BITS": scheme.bits,
        "SYMMETRIC": scheme.symmetric,
        "NESTED": scheme.nested,
        "LEVELS": len(scheme.table),
        "RULE": RULES[scheme.scale],
        "RMS_LEVEL": _literal(LLOYD_MAX.get(scheme.bits, 0.0) / 127),
        "SCALE": DTYPES[scheme.scale_dtype],
        "ZERO_POINTS": stored,
    }


def variance_units(rounding: RoundingArgs) -> int:
    """The variance that is kept, in units of 2^-16: to nearest even, of the f32."""
    return int(torch.tensor(rounding.variance, dtype=torch.float32).mul(FULL_VARIANCE).round())


def table_words(table: Sequence[int]) -> tuple[int, int]:
    """The levels of a table, a byte each, as two words of 64 bits in two's complement."""
    padded = bytes(table) + bytes(16 - len(table))
    low, high = (int.from_bytes(part, "little", signed=True) for part in (padded[:8], padded[8:]))
    return low, high


def _literal(value: float) -> str:
    """The f32 nearest a number, as C++ writes it."""
    return float(torch.tensor(value, dtype=torch.float32)).hex() + "f"


def aligned(*tensors: Tensor) -> bool:
    """Whether all memory lies on multiples of the widest access."""
    for tensor in tensors:
        if tensor.data_ptr() % ALIGNMENT:
            return False
    return True


def as_bias(bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int, int]:
    """A bias as kernels with results of `dtype` take it, in that or in f32; its address; whether it is f32.

    The tensor has to outlive the launch.
    """
    if bias is None:
        return None, 0, 0
    if bias.dtype not in (dtype, torch.float32):
        bias = bias.detach().float()
    if not bias.is_contiguous():
        bias = bias.detach().contiguous()
    return bias, bias.data_ptr(), int(bias.dtype == torch.float32)


def device_of(*tensors: Tensor) -> int:
    """The index of the device that all tensors are on. Raises: ValueError if there is more than one."""
    device = tensors[0].get_device()
    for tensor in tensors:
        if tensor.get_device() != device:
            raise ValueError(
                f"operands are on {tensors[0].device} and {tensor.device}; move them to one device with .to()"
            )
    return device


def check_length(name: str, tensor: Tensor, need: int, rows: int, k: int) -> None:
    """Refuses memory of another length than a kernel would touch."""
    if tensor.numel() != need:
        raise ValueError(
            f"{name} has {tensor.numel()} elements where rows={rows}, k={k} need {need}; allocate {need}"
        )


def check_holds(packed: Tensor, planes: Sequence[int], rows: int, k: int) -> None:
    """Refuses a blob that ends before the planes that are read do; what lies behind them is left alone."""
    need = packed_nbytes(rows, k, planes)
    if packed.numel() < need:
        check_length("packed", packed, need, rows, k)


def check_written(*outputs: Tensor) -> None:
    """Refuses outputs that a kernel cannot fill as they lie."""
    for out in outputs:
        if not out.is_contiguous():
            raise ValueError(
                f"outputs are contiguous, got strides {out.stride()} for shape {tuple(out.shape)}"
            )


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuses memory of another kind than a kernel would take it for."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_count(count: int, what: str) -> None:
    """Kernels number what they share out by 32 bits."""
    if count >= 2**32:
        raise ValueError(f"{count} {what} are more than a CUDA kernel numbers (2^32); cut the tensor by rows")
