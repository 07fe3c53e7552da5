"""Codes to bit planes, and back."""

from turboquant_rs.ops.reference import pack_codes_out, unpack_codes_out

__all__ = ["pack_codes_out", "unpack_codes_out"]
