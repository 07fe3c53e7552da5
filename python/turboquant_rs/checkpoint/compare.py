"""What is in a checkpoint, and how far apart two of them are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from turboquant_rs.checkpoint.blocks import row_blocks
from turboquant_rs.formats.records import Record
from turboquant_rs.formats.store import Store
from turboquant_rs.packed import PackedTensor
from turboquant_rs.progress import Progress
from turboquant_rs.quality import Distance
from turboquant_rs.scheme import Scheme

__all__ = ["Comparison", "Contents", "StoredTensor", "compare_checkpoints", "inspect_checkpoint"]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint. `dtype` is that of its values; `nbytes` counts every part in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: Scheme | None
    bits: int | None
    nbytes: int

    @property
    def bits_per_element(self) -> float:
        """Everything counted; 0 for an empty tensor."""
        elements = math.prod(self.shape)
        return 8 * self.nbytes / elements if elements else 0.0

    def to_dict(self) -> dict[str, object]:
        """All fields as JSON knows them."""
        scheme = self.scheme.to_dict() if self.scheme else None
        shape = list(self.shape)
        return asdict(self) | {"shape": shape, "scheme": scheme, "bits_per_element": self.bits_per_element}


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint, in name order, and names that stand for another one's tensor."""

    tensors: tuple[StoredTensor, ...]
    aliases: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bits_per_element(self) -> float:
        """Over all tensors; 0 if there is no element."""
        return 8 * self.nbytes / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON knows it."""
        return {
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "aliases": dict(self.aliases),
            "nbytes": self.nbytes,
            "elements": self.elements,
            "bits_per_element": self.bits_per_element,
        }


def inspect_checkpoint(path: Path) -> Contents:
    """Reads the headers of a safetensors file or of a directory of shards, no data.

    Raises: QuantizationFormatError for a file that is not as the format says; FileNotFoundError.
    """
    with Store(path) as store:
        names = sorted(name for name in store.names if name not in store.aliases)
        return Contents(tuple(_stored(store, name) for name in names), dict(store.aliases))


def _stored(store: Store, name: str) -> StoredTensor:
    record: Record | None = store.records.get(name)
    if record is None:
        entry = store.entry(name)
        return StoredTensor(name, entry.shape, _dtype_name(entry.dtype), None, None, entry.end - entry.begin)
    shape = store.shape(name)
    parts = [store.entry(key) for key in record.layout(name, shape)]
    nbytes = sum(part.end - part.begin for part in parts)
    return StoredTensor(name, shape, _dtype_name(record.dtype), record.scheme, record.bits, nbytes)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Comparison:
    """The distance of every tensor both checkpoints have, and the names that only one of them has."""

    tensors: dict[str, Distance] = field(default_factory=dict)
    only_original: tuple[str, ...] = ()
    only_other: tuple[str, ...] = ()

    @property
    def total(self) -> Distance:
        """The distance of all compared tensors together, as if they were one."""
        total = Distance()
        for distance in self.tensors.values():
            total.merge(distance)
        return total

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON knows it."""
        return {
            "tensors": {name: distance.to_dict() for name, distance in self.tensors.items()},
            "total": self.total.to_dict(),
            "only_original": list(self.only_original),
            "only_other": list(self.only_other),
        }


def compare_checkpoints(original: Path, other: Path) -> Comparison:
    """Measures `other` against `original`, tensor by tensor, block by block; packed ones are decoded to f32.

    Raises: ValueError if a tensor has two shapes, or no name is in both; QuantizationFormatError for a
    damaged file; FileNotFoundError.
    """
    with Store(original) as first, Store(other) as second:
        theirs, ours = set(first.names), set(second.names)
        common = sorted(theirs & ours)
        if not common:
            raise ValueError(
                f"{original} and {other} have no tensor in common ({min(theirs, default='none')} … and "
                f"{min(ours, default='none')} …); compare two versions of the same model"
            )
        tensors = {}
        with Progress("compare", len(common)) as progress:
            for name in common:
                progress.update(progress.done, name)
                tensors[name] = _distance(first, second, name)
                progress.advance()
        return Comparison(tensors, tuple(sorted(theirs - ours)), tuple(sorted(ours - theirs)))


def _distance(first: Store, second: Store, name: str) -> Distance:
    (shape, original), (other_shape, other) = _rows_of(first, name), _rows_of(second, name)
    if shape != other_shape:
        raise ValueError(
            f"{name} is {shape} in {first.path} and {other_shape} in {second.path}; "
            "compare two versions of the same model"
        )
    distance = Distance()
    rows = shape[0] if len(shape) > 1 else 1
    for start, stop in row_blocks(rows, shape[1:] if len(shape) > 1 else shape):
        distance.update(original(start, stop), other(start, stop))
    return distance


Rows = Callable[[int, int], Tensor]


def _rows_of(store: Store, name: str) -> tuple[tuple[int, ...], Rows]:
    """Shape of a tensor, and a function that reads rows of its first dimension (it has one row if 1-d)."""
    name = store.aliases.get(name, name)
    if name in store.records:
        packed = store.read(name)
        assert isinstance(packed, PackedTensor)
        whole = packed if packed.ndim < 2 else None

        def decode(start: int, stop: int) -> Tensor:
            return (whole or packed[start:stop]).dequantize(dtype=torch.float32)

        return tuple(packed.shape), decode
    shape = store.shape(name)
    width = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)

    def read(start: int, stop: int) -> Tensor:
        values = store.read_elements(name, start * width, (stop - start) * width)
        return torch.view_as_real(values) if values.is_complex() else values

    return shape, read
