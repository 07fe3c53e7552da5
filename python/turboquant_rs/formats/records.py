"""What a file says of its packed tensors: the parts that hold each one, and the JSON that describes them all.

<name>_packed      u8   the planes, one after the other: a prefix of bits is a prefix of these bytes
<name>_scale            one a group
<name>_zero_point       one a group (u8 asymmetric, f32 mean+var), else not there
<name>_shape       i64  shape of the tensor it stands for

turboquant_rs           {"version": 1, "tensors": {name: record}, "aliases": {name: name}, "crc32": sums}
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turboquant_rs.formats.container import DTYPE_NAMES, DTYPES
from turboquant_rs.packed import PackedTensor
from turboquant_rs.scheme import Rounding, Scheme

__all__ = ["KEY", "Record", "description", "description_text", "layout", "parse_description", "parts"]

KEY = "turboquant_rs"
"""The metadata key, and the quant_method of a config.json."""
VERSION = 1
PACKED, SCALE, ZERO_POINT, SHAPE = "_packed", "_scale", "_zero_point", "_shape"

_FLOATS = ("F64", "F32", "F16", "BF16")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensors of a file: key → dtype and shape."""


@dataclass(frozen=True)
class Record:
    """What a file says of a packed tensor besides its parts: how to decode it, and into which dtype."""

    scheme: Scheme
    rounding: Rounding
    dtype: torch.dtype
    bits: int
    offset: int = 0

    @classmethod
    def of(cls, p: PackedTensor) -> Record:
        """The record of a packed tensor."""
        return cls(p.scheme, p.rounding, p.dtype, p.bits, p.offset)

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it; what is the default is left out, but the scheme is always whole."""
        fields: dict[str, Any] = {"scheme": self.scheme.to_dict(), "dtype": DTYPE_NAMES[self.dtype]}
        if self.rounding.is_stochastic:
            fields["rounding"] = self.rounding.to_dict()
        if self.bits != self.scheme.bits:
            fields["bits"] = self.bits
        if self.offset:
            fields["offset"] = self.offset
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Record:
        """From JSON. Raises: TypeError, ValueError or KeyError for what is no record."""
        unknown = set(fields) - {"scheme", "dtype", "rounding", "bits", "offset"}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        scheme = Scheme.from_dict(fields["scheme"])
        if fields["dtype"] not in _FLOATS:
            raise ValueError(f"dtype {fields['dtype']!r} is none of {', '.join(_FLOATS)}")
        rounding = Rounding.from_dict(fields.get("rounding", {}))
        rounding.check(scheme)
        offset = fields.get("offset", 0)
        if type(offset) is not int or not 0 <= offset < 2**63:
            raise ValueError(f"offset {offset!r} is no index")
        return cls(scheme, rounding, DTYPES[fields["dtype"]], scheme.check_bits(fields.get("bits")), offset)

    @property
    def zero_point_dtype(self) -> torch.dtype | None:
        """The dtype of stored zero points, None where there are none."""
        return self.rounding.zero_point_dtype(self.scheme)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What is appended to the name for each part."""
        return (PACKED, SCALE, SHAPE) if self.zero_point_dtype is None else (PACKED, SCALE, ZERO_POINT, SHAPE)

    def layout(self, name: str, shape: tuple[int, ...]) -> Layout:
        """The tensors of the file that hold a packed tensor of `shape`."""
        *lead, k = shape or (1,)
        groups = (*shape[:-1], self.scheme.groups(k))
        entries: Layout = {
            name + PACKED: (torch.uint8, (self.scheme.packed_nbytes(math.prod(lead), k, self.bits),)),
            name + SCALE: (self.scheme.scale_torch_dtype, groups),
        }
        if self.zero_point_dtype is not None:
            entries[name + ZERO_POINT] = (self.zero_point_dtype, groups)
        entries[name + SHAPE] = (torch.int64, (len(shape),))
        return entries

    def plane_nbytes(self, shape: tuple[int, ...]) -> list[int]:
        """Bytes of each stored plane: the pieces of the blob that are read, and so checked, by themselves."""
        *lead, k = shape or (1,)
        prefixes = [bits for bits in self.scheme.prefixes if bits <= self.bits]
        ends = [self.scheme.packed_nbytes(math.prod(lead), k, bits) for bits in prefixes]
        return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def layout(records: Mapping[str, tuple[Record, tuple[int, ...]]], plain: Layout) -> Layout:
    """All tensors of a file. Raises: ValueError where a plain tensor has the name of a part."""
    entries = dict(plain)
    for name, (record, shape) in records.items():
        for key, entry in record.layout(name, shape).items():
            if key in entries:
                raise ValueError(
                    f"{key} is a part of packed tensor {name} and a tensor of its own; rename it"
                )
            entries[key] = entry
    return entries


def parts(name: str, p: PackedTensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file that hold `p`, by key."""
    yield name + PACKED, p.packed
    yield name + SCALE, p.scales
    if p.zero_points is not None:
        yield name + ZERO_POINT, p.zero_points
    yield name + SHAPE, torch.tensor(list(p.shape), dtype=torch.int64)


def description(records: Mapping[str, Record], aliases: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object of the metadata (as text) and of config.json (as `quantization_config`)."""
    fields: dict[str, Any] = {
        "version": VERSION,
        "tensors": {name: record.to_dict() for name, record in records.items()},
    }
    if aliases:
        fields["aliases"] = dict(aliases)
    return fields


def description_text(described: Mapping[str, Any], sums: Mapping[str, Any]) -> str:
    """The metadata's text: a description with the checksums of the file's tensors, and with its own."""
    return json.dumps({**described, "crc32": {"": _own_sum(described), **sums}}, separators=(",", ":"))


def _own_sum(described: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(described, sort_keys=True).encode()):08x}"


def parse_description(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description and the checksums in the metadata's text (none: files of other writers have none).

    Raises: ValueError or TypeError for what is none, or does not bear its own checksum.
    """
    fields = json.loads(text)
    sums = fields.pop("crc32", None) if isinstance(fields, dict) else None
    described = check_description(fields)
    if unknown := set(described) - {"version", "tensors", "aliases"}:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    if sums is None:
        return described, {}
    if not isinstance(sums, dict) or sums.pop("", None) != _own_sum(described):
        raise ValueError("the description does not have the checksum that it states; it was damaged")
    return described, sums


def check_description(fields: Any) -> dict[str, Any]:
    """`fields` if they describe packed tensors. Raises: ValueError."""
    if not isinstance(fields, dict) or fields.get("version") != VERSION:
        version = fields.get("version") if isinstance(fields, dict) else fields
        raise ValueError(f"version {version!r} of the description is not {VERSION}; upgrade turboquant-rs")
    tensors, aliases = fields.get("tensors"), fields.get("aliases", {})
    if not isinstance(tensors, dict) or not all(isinstance(t, dict) for t in tensors.values()):
        raise ValueError("tensors must map names to records")
    if not isinstance(aliases, dict) or not all(isinstance(a, str) for a in aliases.values()):
        raise ValueError("aliases must map names to names")
    return fields
