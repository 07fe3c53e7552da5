"""Packed tensors in safetensors files, alone or as the weights of a model.

    <name>_packed      u8   the planes, one after the other: a prefix of bits is a prefix of these bytes
    <name>_scale            one a group
    <name>_zero_point       one a group (u8 asymmetric, f32 mean+var), else not there
    <name>_shape       i64  shape of the tensor it stands for

The scheme of every packed tensor is JSON under the metadata key `turboquant_rs`; a model directory repeats it
in config.json as `quantization_config`, because metadata belong to one shard and tools drop them. All other
tensors are stored as they are.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from turboquant_rs.errors import QuantizationFormatError
from turboquant_rs.formats.container import DTYPE_NAMES, DTYPES, Entry, Reader, Writer
from turboquant_rs.packed import PackedTensor
from turboquant_rs.scheme import Rounding, Scheme

__all__ = ["KEY", "Record", "Store", "description", "layout", "load", "parts", "save"]

KEY = "turboquant_rs"
"""The metadata key, and the quant_method of a config.json."""
VERSION = 1
INDEX = "model.safetensors.index.json"
PACKED, SCALE, ZERO_POINT, SHAPE = "_packed", "_scale", "_zero_point", "_shape"
SUFFIXES = (PACKED, SCALE, ZERO_POINT, SHAPE)

_SCALE_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_ELEMENTS = 2**56


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
        if self.rounding.preserve == "mean+var":
            return torch.float32
        return None if self.scheme.symmetric else torch.uint8

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors of the file that hold a packed tensor: key → dtype and shape."""
        rows, k = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
        groups = (*shape[:-1], self.scheme.groups(k))
        entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name + PACKED: (torch.uint8, (self.scheme.packed_nbytes(rows, k, self.bits),)),
            name + SCALE: (_SCALE_DTYPES[self.scheme.scale_dtype], groups),
        }
        if self.zero_point_dtype is not None:
            entries[name + ZERO_POINT] = (self.zero_point_dtype, groups)
        entries[name + SHAPE] = (torch.int64, (len(shape),))
        return entries


def layout(
    records: Mapping[str, tuple[Record, tuple[int, ...]]],
    plain: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """All entries of a file. Raises: ValueError where a plain tensor has the name of a part."""
    entries = dict(plain)
    for name, (record, shape) in records.items():
        for key, entry in record.layout(name, shape).items():
            if key in entries:
                raise ValueError(
                    f"{key} is a part of packed tensor {name} and a tensor of its own; rename it"
                )
            entries[key] = entry
    return entries


def description(records: Mapping[str, Record], aliases: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object of the metadata (as text) and of config.json (as `quantization_config`)."""
    fields: dict[str, Any] = {
        "version": VERSION,
        "tensors": {name: record.to_dict() for name, record in records.items()},
    }
    if aliases:
        fields["aliases"] = dict(aliases)
    return fields


def parts(name: str, p: PackedTensor) -> dict[str, Tensor]:
    """The tensors of the file that hold `p`."""
    found = {name + PACKED: p.packed, name + SCALE: p.scales}
    if p.zero_points is not None:
        found[name + ZERO_POINT] = p.zero_points
    found[name + SHAPE] = torch.tensor(list(p.shape), dtype=torch.int64)
    return found


# Writing --------------------------------------------------------------------------------------------------


def save(source: nn.Module | Mapping[str, Tensor | PackedTensor], path: str | os.PathLike[str]) -> None:
    """Writes a model, or tensors by name, to one safetensors file.

    A model's quantized layers are written packed, everything else of its state_dict as it is; names that
    share memory (tied weights) are written once. The file appears under `path` when it is complete and on the disk.

    Raises: TypeError for what is no tensor; ValueError for names that collide; OSError where writing fails,
    and then `path` is as it was.
    """
    tensors = _model_tensors(source) if isinstance(source, nn.Module) else dict(source)
    packed = {name: p for name, p in tensors.items() if isinstance(p, PackedTensor)}
    plain = {name: t for name, t in tensors.items() if not isinstance(t, PackedTensor)}
    for name, tensor in plain.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            raise TypeError(f"{name} is {_kind(tensor)}; a file holds dense tensors and packed tensors")
    aliases = _aliases(tensors)
    records = {name: Record.of(p) for name, p in packed.items() if name not in aliases}
    entries = layout(
        {name: (record, tuple(packed[name].shape)) for name, record in records.items()},
        {name: (t.dtype, tuple(t.shape)) for name, t in plain.items() if name not in aliases},
    )
    metadata = {KEY: json.dumps(description(records, aliases))}
    with Writer(path, entries, metadata) as writer:
        for name in records:
            for key, part in parts(name, packed[name]).items():
                writer.write(key, part)
        for name, tensor in plain.items():
            if name not in aliases:
                writer.write(name, tensor)


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return "on the meta device" if value.is_meta else f"{value.layout}"


def _model_tensors(model: nn.Module) -> dict[str, Tensor | PackedTensor]:
    """The state of a model, with packed tensors in the place of the buffers that hold their parts."""
    tensors: dict[str, Any] = dict(model.state_dict())
    for prefix, module in _packed_modules(model):
        for own in module.packed_state_keys():
            tensors.pop(prefix + own, None)
        for name, p in module.packed_parameters().items():
            tensors[prefix + name] = p
    return tensors


def _packed_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that hold packed tensors, by the prefix of their state, under all their names."""
    return [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules(remove_duplicate=False)
        if hasattr(module, "packed_parameters")
    ]


def _aliases(tensors: Mapping[str, Tensor | PackedTensor]) -> dict[str, str]:
    """Names that stand for the same memory as an earlier name, of the same kind."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, PackedTensor):
            memory = tensor.packed
            key: tuple[object, ...] = (Record.of(tensor), tuple(tensor.shape), memory.data_ptr())
        else:
            memory = tensor
            key = (tensor.dtype, tuple(tensor.shape), tensor.stride(), memory.data_ptr())
        if memory.numel() == 0:
            continue
        if (earlier := first.setdefault((memory.device, *key), name)) != name:
            aliases[name] = earlier
    return aliases


# Reading --------------------------------------------------------------------------------------------------


class Store:
    """The tensors of a file, or of a directory of shards, read when asked for.

    Attributes:
        records: Packed tensors by name.
        plain: Names of the other tensors.
        aliases: Names that stand for another name's tensor.

    Use it as a context manager. Raises: QuantizationFormatError for a file that is not as the format says;
    FileNotFoundError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files = ExitStack()
        self._owner: dict[str, Reader] = {}
        self.records: dict[str, Record] = {}
        self.aliases: dict[str, str] = {}
        try:
            fallback = self._config_records()
            for file in self._shards():
                self._open(file, fallback)
            self.plain = self._check_names()
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    @property
    def names(self) -> list[str]:
        """The names of all tensors, packed and plain, aliases included."""
        return [*self.records, *self.plain, *self.aliases]

    def entry(self, key: str) -> Entry:
        """Dtype, shape and place of a tensor of the file."""
        return self._owner[key].entries[key]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that a packed tensor stands for."""
        reader = self._owner[name + PACKED]
        values = self._owner[name + SHAPE].read(name + SHAPE).tolist()
        if any(value < 0 for value in values) or math.prod(values) > _MAX_ELEMENTS:
            raise QuantizationFormatError(f"{reader.path}: {name} is said to have shape {values}")
        return tuple(values)

    def read(self, name: str, bits: int | None = None) -> Tensor | PackedTensor:
        """One tensor; of a packed one only the planes of its top `bits` bits, the rest is never read."""
        name = self.aliases.get(name, name)
        if name not in self.records:
            if name not in self._owner:
                near = difflib.get_close_matches(name, self.names, n=3)
                raise KeyError(f"{self.path} has no tensor {name!r}; near it are {near or self.names[:8]}")
            return self._owner[name].read(name)
        record, shape = self.records[name], self.shape(name)
        self._check_parts(name, record, shape)
        wanted = record.bits if bits is None else record.scheme.check_bits(bits)
        if wanted > record.bits:
            raise ValueError(f"{self.path} holds the top {record.bits} bits of {name}, not {wanted}")
        rows, k = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
        count = record.scheme.packed_nbytes(rows, k, wanted)
        packed = self._owner[name + PACKED].read(name + PACKED, 0, count)
        scales = self._owner[name + SCALE].read(name + SCALE)
        zero_points = None
        if record.zero_point_dtype is not None:
            zero_points = self._owner[name + ZERO_POINT].read(name + ZERO_POINT)
        self._check_values(name, record, scales, zero_points)
        try:
            return PackedTensor(
                packed,
                scales,
                zero_points,
                torch.Size(shape),
                record.dtype,
                record.scheme,
                record.rounding,
                wanted,
                record.offset,
            )
        except ValueError as error:
            raise self._bad(name, str(error)) from error

    def _bad(self, name: str, why: str) -> QuantizationFormatError:
        return QuantizationFormatError(f"{self.path}: packed tensor {name}: {why}")

    def _check_parts(self, name: str, record: Record, shape: tuple[int, ...]) -> None:
        for key, (dtype, size) in record.layout(name, shape).items():
            entry = self.entry(key)
            if entry.dtype != dtype or entry.shape != size:
                raise self._bad(
                    name, f"{key} is {entry.dtype} {entry.shape}, expected {dtype} {size} for shape {shape}"
                )

    def _check_values(self, name: str, record: Record, scales: Tensor, zero_points: Tensor | None) -> None:
        if not bool(scales.isfinite().all()):
            raise self._bad(name, "a scale is NaN or infinite; the file is damaged")
        if zero_points is None:
            return
        if zero_points.dtype == torch.uint8:
            top = 2**record.scheme.bits - 1
            if zero_points.numel() and int(zero_points.max()) > top:
                raise self._bad(name, f"a zero point is {int(zero_points.max())}, above {top}; it is damaged")
        elif not bool(zero_points.isfinite().all()):
            raise self._bad(name, "a zero point is NaN or infinite; the file is damaged")

    def _shards(self) -> list[Path]:
        if not self.path.is_dir():
            if not self.path.exists():
                raise FileNotFoundError(f"{self.path} does not exist")
            return [self.path]
        index = self.path / INDEX
        if index.exists():
            weight_map = _json_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(_is_file_name(f) for f in weight_map.values()):
                raise QuantizationFormatError(f"{index}: weight_map must map tensors to files beside it")
            files = [self.path / name for name in sorted(set(weight_map.values()))]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{self.path} holds no *.safetensors file")
        return files

    def _config_records(self) -> dict[str, Any]:
        """The records that config.json has, for files whose metadata were lost."""
        config = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        if not config.exists():
            return {}
        quantization = _json_object(config).get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != KEY:
            return {}
        records: dict[str, Any] = self._check_description(quantization, config)["tensors"]
        return records

    def _open(self, path: Path, fallback: Mapping[str, Any]) -> None:
        reader = self._files.enter_context(Reader(path))
        for key in reader.entries:
            if key in self._owner:
                raise QuantizationFormatError(f"{path}: tensor {key} is in {self._owner[key].path} as well")
            self._owner[key] = reader
        try:
            stated = json.loads(reader.metadata.get(KEY, '{"version": 1, "tensors": {}}'))
        except (ValueError, RecursionError) as error:
            raise QuantizationFormatError(f"{path}: the metadata {KEY} are no JSON ({error})") from error
        described = self._check_description(stated, path)
        records = dict(described["tensors"])
        for key in reader.entries:
            name = key.removesuffix(PACKED)
            if name != key and name not in records and name in fallback:
                records[name] = fallback[name]
        for name, fields in records.items():
            try:
                self.records[name] = Record.from_dict(fields)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise QuantizationFormatError(f"{path}: the record of {name} is no good: {error}") from error
        self.aliases.update(described.get("aliases", {}))

    def _check_description(self, fields: Any, path: Path) -> dict[str, Any]:
        if not isinstance(fields, dict) or fields.get("version") != VERSION:
            version = fields.get("version") if isinstance(fields, dict) else fields
            raise QuantizationFormatError(
                f"{path}: version {version!r} of the description is not {VERSION}; upgrade turboquant-rs"
            )
        tensors, aliases = fields.get("tensors"), fields.get("aliases", {})
        if not isinstance(tensors, dict) or not all(isinstance(t, dict) for t in tensors.values()):
            raise QuantizationFormatError(f"{path}: tensors must map names to records")
        if not isinstance(aliases, dict) or not all(isinstance(a, str) for a in aliases.values()):
            raise QuantizationFormatError(f"{path}: aliases must map names to names")
        return fields

    def _check_names(self) -> list[str]:
        """Every packed tensor has its parts, no part is left over; the names of the other tensors."""
        used: set[str] = set()
        for name, record in self.records.items():
            needed = {name + PACKED, name + SCALE, name + SHAPE}
            if record.zero_point_dtype is not None:
                needed.add(name + ZERO_POINT)
            if missing := sorted(needed - set(self._owner)):
                raise self._bad(name, f"{', '.join(missing)} is missing")
            if self.entry(name + SHAPE).dtype != torch.int64 or len(self.entry(name + SHAPE).shape) != 1:
                raise self._bad(name, f"{name}{SHAPE} must be a list of int64")
            used |= needed
        plain = [key for key in self._owner if key not in used]
        for key in plain:
            if key.endswith(PACKED) and key.removesuffix(PACKED) + SCALE in self._owner:
                raise QuantizationFormatError(
                    f"{self.path}: {key} looks like a packed tensor and has no record in the metadata or in "
                    "config.json; it cannot be decoded"
                )
        for alias, name in self.aliases.items():
            if name not in self.records and name not in self._owner:
                raise QuantizationFormatError(f"{self.path}: {alias} stands for {name}, which is missing")
        return plain


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise QuantizationFormatError(f"{path} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise QuantizationFormatError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def load(
    path: str | os.PathLike[str], model: nn.Module | None = None, bits: int | None = None
) -> dict[str, Tensor | PackedTensor] | nn.Module:
    """Reads what `save` (or `turboquant-rs quantize`) wrote: a file, or a directory of shards.

    Args:
        path: The file or directory.
        model: Fill this model and return it. Layers that the file holds packed are made quantized layers;
            the names must match exactly.
        bits: Read only the planes of the top `bits` bits of every tensor; the others are never read. Every
            packed tensor must have that prefix.

    Returns: tensors by name, or `model`.

    Raises: QuantizationFormatError for a damaged file; ValueError for bits that a tensor has not, and for
    names or shapes that do not fit the model (nothing of it is changed before all names are checked).
    """
    with Store(path) as store:
        if bits is not None:
            _check_prefix(store, bits)
        if model is not None:
            return _fill(model, store, bits)
        tensors: dict[str, Tensor | PackedTensor] = {}
        for name in store.names:
            same = store.aliases.get(name)
            tensors[name] = store.read(name, bits) if same not in tensors else tensors[same]
        return tensors


def _check_prefix(store: Store, bits: int) -> None:
    for name, record in store.records.items():
        try:
            record.scheme.check_bits(bits)
        except ValueError as error:
            raise ValueError(f"{store.path}: {name}: {error}") from error


def _fill(model: nn.Module, store: Store, bits: int | None) -> nn.Module:
    from turboquant_rs.nn.convert import prepare_

    packed = [*store.records, *(alias for alias, name in store.aliases.items() if name in store.records)]
    owned = {*packed, *store.plain, *store.aliases}
    expected = {name for name in _model_tensors(model) if not name.endswith("_extra_state")}
    _check_fit(expected, owned, store.path)
    swapped = {}
    holders = dict(_packed_modules(model))
    for name in packed:
        prefix, _, parameter = name.rpartition(".")
        if parameter != "weight" or not prefix:
            raise ValueError(f"{store.path}: {name} is packed and no `weight` of a layer; load a dict")
        holder = holders.get(f"{prefix}.")
        scheme = store.records[store.aliases.get(name, name)].scheme
        if holder is None or holder.scheme != scheme:
            swapped[prefix] = scheme
    if swapped:
        prepare_(model, swapped)
    read: dict[str, PackedTensor] = {}
    for name in packed:
        source = store.aliases.get(name, name)
        if source not in read:
            tensor = store.read(source, bits)
            assert isinstance(tensor, PackedTensor)
            read[source] = tensor
        module: Any = model.get_submodule(name.rpartition(".")[0])
        device = module.weight_packed.device
        module.load_packed("weight", read[source].to("cpu" if device.type == "meta" else device))
    plain = {name: store.read(name) for name in owned - set(packed)}
    _load_plain(model, plain, store.path)
    return model


def _load_plain(model: nn.Module, tensors: Mapping[str, Any], path: Path) -> None:
    """The tensors that are stored as they are; shapes are checked before anything is copied."""
    state = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if name in state and state[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)}, the model wants {tuple(state[name].shape)}"
            )
    meta = any(value.is_meta for name, value in state.items() if name in tensors)
    model.load_state_dict(dict(tensors), strict=False, assign=meta)


def _check_fit(expected: Iterable[str], owned: Iterable[str], path: Path) -> None:
    missing, extra = sorted(set(expected) - set(owned)), sorted(set(owned) - set(expected))
    if not missing and not extra:
        return
    said = []
    for what, names, others in (("missing", missing, extra), ("unexpected", extra, missing)):
        if names:
            near = difflib.get_close_matches(names[0], others, n=1)
            hint = f" (near it: {near[0]})" if near else ""
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            said.append(f"{len(names)} {what}: {', '.join(names[:6])}{more}{hint}")
    raise ValueError(f"{path} does not fit the model: {'; '.join(said)}; load it as a dict to look inside")
