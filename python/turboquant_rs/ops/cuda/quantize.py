"""Tensors to scales and packed codes, and back."""

from turboquant_rs.ops.reference import pack_out, unpack_out

__all__ = ["pack_out", "unpack_out"]
