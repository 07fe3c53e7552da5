"""Packed tensors in safetensors files, alone or as the weights of a model: `save` and `load`.

    tensors by name ── records ──► container ──► file ──► container ──► Store ──► tensors by name, or a model

Packed tensors are stored by their parts (`records`), all others as they are. The description of the packed
ones is metadata of the file; a model directory repeats it in config.json as `quantization_config`, because
metadata belong to one shard and tools drop them.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn

from turboquant_rs.errors import QuantizationFormatError
from turboquant_rs.formats.container import Entry, Reader, Writer, extent
from turboquant_rs.formats.model import fill, require_finished, tensors_of
from turboquant_rs.formats.records import (
    KEY,
    PACKED,
    SCALE,
    SHAPE,
    ZERO_POINT,
    Layout,
    Record,
    check_description,
    description,
    description_text,
    layout,
    parse_description,
    parts,
)
from turboquant_rs.packed import PackedTensor, as_tensor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "KEY",
    "Reader",
    "Record",
    "Store",
    "Writer",
    "description",
    "load",
    "open_writer",
    "parts",
    "save",
]

INDEX = "model.safetensors.index.json"
MAX_ELEMENTS = 2**56
Model = TypeVar("Model", bound=nn.Module)


# Writing --------------------------------------------------------------------------------------------------


def save(
    source: nn.Module | Mapping[str, Tensor | np.ndarray[Any, Any] | PackedTensor],
    path: str | os.PathLike[str],
) -> None:
    """Writes a model, or tensors by name, to one safetensors file.

    A model's quantized layers are written packed, everything else of its state_dict as it is; names that
    share memory (tied weights) are written once. The file appears under `path` when it is complete and on the
    disk.

    Raises: TypeError for what is no tensor; ValueError for names that collide, and for a model that is
    prepared for training (its state_dict may be saved, as floats); OSError where writing fails. `path` is as
    it was then.
    """
    if isinstance(source, nn.Module):
        names = [name for name, _ in source.named_modules()]
        require_finished(source, names, "or save model.state_dict(), the floats of the training so far")
    given = tensors_of(source) if isinstance(source, nn.Module) else source
    if not isinstance(given, Mapping):
        raise TypeError(f"save takes a model or a dict of tensors by name, got {type(source).__name__}")
    tensors = {name: _storable(name, value) for name, value in given.items()}
    aliases = _aliases(tensors)
    stored = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    packed = {name: tensor for name, tensor in stored.items() if isinstance(tensor, PackedTensor)}
    plain = {name: tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}
    with open_writer(
        path,
        {name: (Record.of(p), tuple(p.shape)) for name, p in packed.items()},
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in plain.items()},
        aliases=aliases,
    ) as writer:
        for key, tensor in (*chain.from_iterable(starmap(parts, packed.items())), *plain.items()):
            writer.write(key, tensor)


def open_writer(
    path: str | os.PathLike[str],
    records: Mapping[str, tuple[Record, tuple[int, ...]]],
    plain: Layout,
    *,
    aliases: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Writer:
    """A writer of one file, to be given the `parts` of packed tensors and the plain ones, in any order.

    records: name → record and shape of the packed tensors; plain: name → dtype and shape of the others;
    metadata: more of them, besides the description of the packed tensors.
    """
    described = description({name: record for name, (record, _) in records.items()}, aliases)
    return Writer(
        path,
        layout(records, plain),
        lambda sums: {**(metadata or {}), KEY: description_text(described, sums)},
        {name + PACKED: record.plane_nbytes(shape) for name, (record, shape) in records.items()},
    )


def _storable(name: object, value: Any) -> Tensor | PackedTensor:
    """What a file can hold under that name."""
    if not isinstance(name, str):
        raise TypeError(f"names are str, got {name!r}")
    if not name:
        raise ValueError("a tensor's name is empty; give it one")
    if not isinstance(value, Tensor | PackedTensor | np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}; a file holds dense tensors and packed tensors")
    stored = value if isinstance(value, PackedTensor) else as_tensor(value, name).detach()
    memory = stored.packed if isinstance(stored, PackedTensor) else stored
    if memory.layout is not torch.strided or memory.is_meta:
        kind = "on the meta device" if memory.is_meta else f"sparse ({memory.layout})"
        raise TypeError(f"{name} is {kind}; a file holds dense tensors and packed tensors")
    return stored


def _aliases(tensors: Mapping[str, Tensor | PackedTensor]) -> dict[str, str]:
    """Names that stand for the same memory as an earlier name, of the same kind."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        memory: Tensor = tensor.packed if isinstance(tensor, PackedTensor) else tensor
        kind = Record.of(tensor) if isinstance(tensor, PackedTensor) else (tensor.dtype, tensor.stride())
        key = (kind, tuple(tensor.shape), memory.device, memory.data_ptr())
        if memory.numel() and (earlier := first.setdefault(key, name)) != name:
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
            self._check_index()
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
        """The shape of a tensor; of a packed one that which it stands for, checked against its parts."""
        name = self.aliases.get(name, name)
        if name not in self.records:
            return self.entry(name).shape
        values = self._owner[name + SHAPE].read(name + SHAPE).tolist()
        if any(value < 0 for value in values) or extent(values) > MAX_ELEMENTS:
            raise self._bad(name, f"its shape is said to be {values}")
        shape = tuple(values)
        self._check_parts(name, self.records[name], shape)
        return shape

    def read(self, name: str, bits: int | None = None) -> Tensor | PackedTensor:
        """One tensor; of a packed one only the planes of its top `bits` bits, the rest is never read."""
        name = self.aliases.get(name, name)
        if name not in self.records:
            if name not in self._owner:
                near = difflib.get_close_matches(name, self.names, n=3)
                raise KeyError(f"{self.path} has no tensor {name!r}; near it are {near or self.names[:8]}")
            return self._owner[name].read(name)
        record, shape = self.records[name], self.shape(name)
        wanted = record.bits if bits is None else record.scheme.check_bits(bits)
        if wanted > record.bits:
            raise ValueError(f"{self.path} holds the top {record.bits} bits of {name}, not {wanted}")
        *lead, k = shape or (1,)
        count = record.scheme.packed_nbytes(math.prod(lead), k, wanted)
        packed = self._owner[name + PACKED].read(name + PACKED, 0, count)
        scales = self._owner[name + SCALE].read(name + SCALE)
        zero_points = None
        if record.zero_point_dtype is not None:
            zero_points = self._owner[name + ZERO_POINT].read(name + ZERO_POINT)
        about = (torch.Size(shape), record.dtype, record.scheme, record.rounding, wanted, record.offset)
        try:
            return PackedTensor(packed, scales, zero_points, *about)
        except ValueError as error:
            raise self._bad(name, str(error)) from error

    def read_elements(self, name: str, begin: int, count: int) -> Tensor:
        """`count` elements of a plain tensor from element `begin` on, flat: large ones come in parts."""
        return self._owner[name].read(name, begin, count)

    def _bad(self, name: str, why: str) -> QuantizationFormatError:
        return QuantizationFormatError(f"{self.path}: packed tensor {name}: {why}")

    def _check_parts(self, name: str, record: Record, shape: tuple[int, ...]) -> None:
        for key, (dtype, size) in record.layout(name, shape).items():
            entry = self.entry(key)
            if entry.dtype != dtype or entry.shape != size:
                raise self._bad(
                    name, f"{key} is {entry.dtype} {entry.shape}, expected {dtype} {size} for shape {shape}"
                )

    def _shards(self) -> list[Path]:
        if not self.path.is_dir():
            if not self.path.exists():
                raise FileNotFoundError(f"{self.path} does not exist")
            return [self.path]
        if (self.path / INDEX).exists():
            files = [self.path / name for name in sorted(set(self._weight_map().values()))]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{self.path} holds no .safetensors file")
        return files

    def _weight_map(self) -> dict[str, str]:
        """Key → file, as the index of the directory says."""
        index = self.path / INDEX
        weight_map: Any = _json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
            raise QuantizationFormatError(f"{index}: weight_map must map tensors to files beside it")
        return weight_map

    def _check_index(self) -> None:
        if not (self.path / INDEX).exists():
            return
        for key, name in self._weight_map().items():
            if key not in self._owner or self._owner[key].path.name != name:
                raise QuantizationFormatError(
                    f"{self.path / INDEX}: {key} is said to be in {name} and is not"
                )

    def _config_records(self) -> dict[str, Any]:
        """The records that config.json has, for files whose metadata were lost."""
        config = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        if not config.exists():
            return {}
        quantization = _json_object(config).get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != KEY:
            return {}
        try:
            records: dict[str, Any] = check_description(quantization)["tensors"]
        except ValueError as error:
            raise QuantizationFormatError(f"{config}: {error}") from error
        return records

    def _open(self, path: Path, fallback: Mapping[str, Any]) -> None:
        reader = self._files.enter_context(Reader(path))
        for key in reader.entries:
            if key in self._owner:
                raise QuantizationFormatError(f"{path}: tensor {key} is in {self._owner[key].path} as well")
            self._owner[key] = reader
        try:
            described, sums = parse_description(reader.metadata.get(KEY, '{"version": 1, "tensors": {}}'))
        except (RecursionError, TypeError, ValueError) as error:
            raise QuantizationFormatError(
                f"{path}: the metadata {KEY} are no description: {error}"
            ) from error
        reader.expect(sums)
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

    def _check_names(self) -> list[str]:
        """Every packed tensor has its parts, no part is left over; the names of the other tensors."""
        used: set[str] = set()
        for name, record in self.records.items():
            needed = {name + suffix for suffix in record.suffixes}
            if missing := sorted(key for key in needed if key not in self._owner):
                raise self._bad(name, f"{', '.join(missing)} is missing")
            if self.entry(name + SHAPE).dtype != torch.int64 or len(self.entry(name + SHAPE).shape) != 1:
                raise self._bad(name, f"{name}{SHAPE} must be a list of int64")
            used |= needed
        plain = [key for key in self._owner if key not in used]
        for key in plain:
            if key.endswith(PACKED) and key.removesuffix(PACKED) + SCALE in self._owner:
                raise QuantizationFormatError(
                    f"{self.path}: {key} looks like a packed tensor and has no record in the metadata or in "
                    "config.json; it cannot be decoded. If it is the state_dict of a quantized model, as "
                    "save_pretrained writes it, quantize a model alike and use model.load_state_dict with "
                    "safetensors.torch.load_file; tq.save writes files that need neither"
                )
        for alias, name in self.aliases.items():
            if alias in self.records or alias in self._owner:
                raise QuantizationFormatError(f"{self.path}: {alias} stands for {name} and is there itself")
            if name not in self.records and name not in self._owner:
                raise QuantizationFormatError(f"{self.path}: {alias} stands for {name}, which is missing")
        return plain


def _is_file_name(name: object) -> bool:
    if not isinstance(name, str) or not name.isprintable():  # a lone surrogate, say, is no name of any file
        return False
    return name not in ("", ".", "..") and Path(name).name == name


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise QuantizationFormatError(f"{path} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise QuantizationFormatError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


@overload
def load(
    path: str | os.PathLike[str], model: None = None, bits: int | None = None
) -> dict[str, Tensor | PackedTensor]: ...
@overload
def load(path: str | os.PathLike[str], model: Model, bits: int | None = None) -> Model: ...
def load(path: str | os.PathLike[str], model: nn.Module | None = None, bits: int | None = None) -> Any:
    """Reads what `save` (or `turboquant-rs quantize`) wrote: a file, or a directory of shards.

    Args:
        path: The file or directory.
        model: Fill this model and return it. Layers that the file holds packed are made quantized layers;
            the names must match exactly, but a tied weight need be there only once.
        bits: Read only the planes of the top `bits` bits of every packed tensor; the others are never read.
            Every packed tensor must have that prefix.

    Returns: dict of tensors and packed tensors by name, or `model`.

    Raises: QuantizationFormatError for a damaged file; ValueError for bits that a tensor has not, and for
    names or shapes that do not fit the model (nothing of it is changed before all of them are checked).
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; expected an nn.Module to fill, or None for a dict"
        )
    with Store(path) as store:
        _check_prefix(store, bits)
        tied = set(store.aliases.values())
        shared: dict[str, Tensor | PackedTensor] = {}

        def read(name: str) -> Tensor | PackedTensor:
            """Aliases share memory, as they did when they were saved."""
            source = store.aliases.get(name, name)
            if source not in tied:
                return store.read(source, bits)
            if source not in shared:
                shared[source] = store.read(source, bits)
            return shared[source]

        if model is None:
            return {name: read(name) for name in store.names}
        packed, plain = {}, {}
        for name in store.names:
            source = store.aliases.get(name, name)
            if source in store.records:
                packed[name] = store.records[source], store.shape(name)
            else:
                plain[name] = store.shape(name)
        return fill(model, store.path, packed, plain, read)


def _check_prefix(store: Store, bits: int | None) -> None:
    for name, record in store.records.items():
        try:
            record.scheme.check_bits(bits)
        except ValueError as error:
            raise ValueError(f"{store.path}: {name}: {error}") from error
