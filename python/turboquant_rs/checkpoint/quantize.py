"""Quantize a checkpoint on disk, block of rows by block of rows.

    IN (file, or directory of shards) → select → for each tensor: read rows → pack → measure → write → OUT

Memory holds one block of rows and the packed form of one tensor, never a tensor in full precision. OUT
appears by a rename at the end: whatever happens before, nothing half-written bears its name.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turboquant_rs import ops
from turboquant_rs.checkpoint.blocks import row_blocks
from turboquant_rs.checkpoint.select import select
from turboquant_rs.errors import QuantizationFormatError
from turboquant_rs.formats.container import Entry, Reader, partial_path, sync_directory
from turboquant_rs.formats.records import KEY, Record, description, parts
from turboquant_rs.formats.store import INDEX, Store, open_writer
from turboquant_rs.packed import PackedTensor
from turboquant_rs.precision import Plan
from turboquant_rs.progress import Progress
from turboquant_rs.quality import Distance
from turboquant_rs.report import QuantizedLayer, Report, SkippedLayer
from turboquant_rs.scheme import Rounding, Scheme

__all__ = ["Quantized", "quantize_checkpoint"]

CONFIG = "config.json"
OTHER_WEIGHTS = (
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
)
"""Files of a model directory that hold weights once more; they are not copied."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What `quantize_checkpoint` did: the report on the tensors, and files of the directory it left out."""

    report: Report
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it."""
        return self.report.to_dict() | {"left_out": list(self.left_out)}

    def __str__(self) -> str:
        if not self.left_out:
            return str(self.report)
        return f"{self.report}\nnot copied, as they hold the weights once more: {', '.join(self.left_out)}"


def quantize_checkpoint(
    source: Path,
    target: Path,
    scheme: Scheme | Plan,
    rounding: Rounding,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dry_run: bool = False,
    replace: bool = False,
    nan_zero: bool = False,
) -> Quantized:
    """Writes `source` with the selected tensors packed (see `select`) to `target`, everything else unchanged.

    A file becomes a file, a directory a directory: shards keep their names, the index is written anew, other
    files are copied, and config.json gets a `quantization_config` with the scheme of every tensor. Stochastic
    rounding draws from a stream named after the tensor, so the result is that of `tq.pack` with that stream.
    With `nan_zero` a NaN counts as 0. In place of a scheme a plan says which tensors are packed, and how.

    Raises: FileExistsError if `target` exists (a file: unless `replace`); NoLayersMatched if nothing is
    selected; ValueError for values outside the format's domain, for a source that is quantized already and
    for a plan of another model; OSError where reading or writing fails. Nothing is left behind then.
    """
    shards = _shards(source)
    tensors = {name: entry[:2] for entries in shards.values() for name, entry in entries.items()}
    if isinstance(scheme, Plan):
        planned = scheme.tensors({name: shape for name, (_, shape) in tensors.items()})
        reasons = select(tensors, list(map(glob.escape, planned)), exclude)
        reasons |= dict.fromkeys(tensors.keys() - planned, "not in the plan")
    else:
        reasons = select(tensors, include, exclude)
        planned = dict.fromkeys(reasons, scheme)
    schemes = {name: planned[name] for name, reason in reasons.items() if not reason}
    for own in schemes.values():
        rounding.check(own)
    job = _Job(schemes, rounding, nan_zero)
    skipped = tuple(SkippedLayer(name, reason) for name, reason in reasons.items() if reason)
    copied, left_out = _other_files(source, shards) if source.is_dir() else ([], ())
    if dry_run:
        return Quantized(Report(tuple(job.forecast(shards)), skipped, dry_run=True), left_out)
    _refuse_target(source, target, replace)
    total = sum(entry.end - entry.begin for entries in shards.values() for entry in entries.values())
    with _partial(target) as folder, Progress("quantize", total, unit="MB") as progress:
        if not source.is_dir():
            return Quantized(Report(tuple(job.shard(source, target, progress)), skipped))
        folder.mkdir()
        for path in copied:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, folder / path)
        layers = [layer for path in shards for layer in job.shard(path, folder / path.name, progress)]
        _write_index(source, folder, [path.name for path in shards])
        _write_config(folder, description(job.records(shards)))
        _publish(folder, target)
    return Quantized(Report(tuple(layers), skipped), left_out)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is the same for every shard: which tensors are quantized, and how."""

    schemes: Mapping[str, Scheme]
    rounding: Rounding
    nan_zero: bool = False

    def record(self, name: str, dtype: torch.dtype) -> Record:
        """How tensor `name` is packed: every tensor has random draws of its own."""
        rounding = self.rounding
        if rounding.is_stochastic:
            rounding = dataclasses.replace(rounding, stream=name)
        scheme = self.schemes[name]
        return Record(scheme, rounding, dtype, scheme.bits)

    def records(self, shards: Mapping[Path, Mapping[str, Entry]]) -> dict[str, Record]:
        """The records of all selected tensors."""
        entries = {name: entry for shard in shards.values() for name, entry in shard.items()}
        return {name: self.record(name, entries[name].dtype) for name in entries if name in self.schemes}

    def forecast(self, shards: Mapping[Path, Mapping[str, Entry]]) -> Iterator[QuantizedLayer]:
        """What would be reported, without reading any data."""
        for entries in shards.values():
            for name, entry in entries.items():
                if name in self.schemes:
                    with torch.device("meta"):
                        yield _layer(name, entry, _empty(self.record(name, entry.dtype), entry.shape), None)

    def shard(self, source: Path, target: Path, progress: Progress) -> list[QuantizedLayer]:
        """Writes one file, tensor by tensor."""
        layers: list[QuantizedLayer] = []
        with Reader(source) as reader:
            packed = {
                n: (self.record(n, e.dtype), e.shape) for n, e in reader.entries.items() if n in self.schemes
            }
            plain = {n: (e.dtype, e.shape) for n, e in reader.entries.items() if n not in packed}
            with open_writer(target, packed, plain, metadata=reader.metadata) as writer:
                for name, entry in reader.entries.items():
                    if name in packed:
                        p, distance = _pack(reader, name, packed[name][0], self.nan_zero, progress)
                        for key, part in parts(name, p):
                            writer.write(key, part)
                        layers.append(_layer(name, entry, p, distance.sqnr_db))
                        continue
                    for chunk in reader.chunks(name):
                        writer.append(name, chunk)
                        progress.advance(len(chunk), name)
        return layers


def _pack(
    reader: Reader, name: str, record: Record, nan_zero: bool, progress: Progress
) -> tuple[PackedTensor, Distance]:
    """The packed form of a tensor, made from blocks of its rows, and its distance from the original."""
    whole = _empty(record, reader.entries[name].shape)
    rows, k = math.prod(whole.shape[:-1]), whole.shape[-1]
    targets = _by_rows(whole, rows)
    distance = Distance()
    for start, stop in row_blocks(rows, (k,)):
        block = reader.read(name, start * k, (stop - start) * k).view(stop - start, k)
        if nan_zero:
            block = block.masked_fill_(block.isnan(), 0)
        try:
            piece = _pack_block(block, record, start * k)
        except ValueError as error:
            raise ValueError(f"{name}, rows {start} to {stop - 1}: {error}") from error
        for target, part in zip(targets, _by_rows(piece, stop - start), strict=True):
            target[start:stop] = part
        distance.update(block, piece.dequantize(dtype=torch.float32))
        progress.advance(block.nbytes, name)
    return whole, distance


def _pack_block(block: Tensor, record: Record, offset: int) -> PackedTensor:
    """Packs rows of a tensor whose first element has the logical index `offset`: `tq.pack` of a part."""
    scheme, rounding = record.scheme, record.rounding
    packed, scales, zero_points = ops.pack(
        block, *scheme.op_args(), *rounding.op_args(offset), scheme.widths, False
    )
    stored = zero_points if record.zero_point_dtype is not None else None
    return PackedTensor(
        packed, scales, stored, block.shape, block.dtype, scheme, rounding, scheme.bits, offset, trusted=True
    )


def _empty(record: Record, shape: Sequence[int]) -> PackedTensor:
    """Memory for a packed tensor."""
    memory = [torch.empty(size, dtype=dtype) for dtype, size in record.layout("", tuple(shape)).values()]
    packed, scales, *zero_points = memory[:-1]  # the last part is the shape
    return PackedTensor(
        packed, scales, zero_points[0] if zero_points else None, torch.Size(shape), record.dtype,
        record.scheme, record.rounding, record.bits, trusted=True,
    )  # fmt: skip


def _by_rows(p: PackedTensor, rows: int) -> list[Tensor]:
    """Planes, scales and zero points of a packed tensor as views with one line a row."""
    zero_points = [] if p.zero_points is None else [p.zero_points]
    return [part.view(rows, -1) for part in (*p._planes(), p.scales, *zero_points)]


def _layer(name: str, entry: Entry, p: PackedTensor, sqnr: float | None) -> QuantizedLayer:
    return QuantizedLayer(
        name=name,
        kind=str(entry.dtype).removeprefix("torch."),
        shape=(math.prod(entry.shape[:-1]), entry.shape[-1]),
        scheme=p.scheme,
        bytes_before=entry.end - entry.begin,
        bytes_after=p.nbytes,
        sqnr=sqnr,
    )


# The files around the tensors


def _shards(source: Path) -> dict[Path, dict[str, Entry]]:
    """The files of a checkpoint and their tensors, checked, in order.

    Raises: QuantizationFormatError for damaged files; ValueError if something is quantized already.
    """
    with Store(source) as store:
        if store.records:
            first, count = next(iter(store.records)), len(store.records)
            raise ValueError(
                f"{source} is quantized already ({first} and {count - 1} more); quantize the original"
            )
    foreign = _json(source / CONFIG).get("quantization_config") if source.is_dir() else None
    if foreign:
        method = foreign.get("quant_method", "unknown") if isinstance(foreign, dict) else foreign
        raise ValueError(f"{source} is quantized already (quant_method {method!r}); quantize the original")
    if not source.is_dir():
        paths = [source]
    elif index := _json(source / INDEX):
        paths = [source / name for name in sorted(set(index["weight_map"].values()))]
    else:
        paths = sorted(source.glob("*.safetensors"))
    shards = {}
    for path in paths:
        with Reader(path) as reader:
            shards[path] = dict(reader.entries)
    return shards


def _other_files(source: Path, shards: Mapping[Path, object]) -> tuple[list[Path], tuple[str, ...]]:
    """What lies in a directory besides its shards, relative to it: to copy, and to leave out."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and path not in shards]
    inner = [path.relative_to(source) for path in files if path != source / INDEX]
    visible = [path for path in inner if not any(part.startswith(".") for part in path.parts)]
    copied = [path for path in visible if path.suffix not in OTHER_WEIGHTS]
    return copied, tuple(str(path) for path in visible if path.suffix in OTHER_WEIGHTS)


def _refuse_target(source: Path, target: Path, replace: bool) -> None:
    if target.resolve() == source.resolve():
        raise FileExistsError(f"{target} is the input itself; choose another name for the output")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise FileExistsError(f"{target} lies inside the input; choose a place outside of it")
    if not os.path.lexists(target):
        return
    if target.is_dir() or source.is_dir():
        raise FileExistsError(f"{target} exists; choose another name or remove it first")
    if not target.is_file():
        raise FileExistsError(f"{target} is a device, pipe or socket; name a regular file")
    if not replace:
        raise FileExistsError(f"{target} exists; choose another name, or replace it with --force")


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """The hidden name beside `target` under which it grows (`Writer` uses the same); gone if anything fails.

    `Writer` cleans up after itself; this catches a signal that comes before its block has begun.
    """
    partial = partial_path(target)
    try:
        yield partial
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def _publish(folder: Path, target: Path) -> None:
    """Gives a complete directory its name, once all of it is on the disk."""
    for path in folder.rglob("*"):
        _sync(path)
    sync_directory(folder)
    folder.rename(target)
    sync_directory(target.parent)


def _sync(path: Path) -> None:
    if path.is_dir():
        return sync_directory(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_index(source: Path, folder: Path, names: Sequence[str]) -> None:
    """The index of the new shards, where the original has one."""
    if not (source / INDEX).exists():
        return
    weight_map: dict[str, str] = {}
    total = 0
    for name in names:
        with Reader(folder / name) as reader:
            weight_map |= dict.fromkeys(reader.entries, name)
            total += sum(entry.end - entry.begin for entry in reader.entries.values())
    index = _json(source / INDEX)
    metadata = index.get("metadata")
    index["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total}
    _write_json(folder / INDEX, index | {"weight_map": weight_map})


def _write_config(folder: Path, described: Mapping[str, Any]) -> None:
    """Says in config.json, where there is one, how every tensor is packed: metadata get lost."""
    if (folder / CONFIG).exists():
        quantization = {"quant_method": KEY, **described}
        _write_json(folder / CONFIG, _json(folder / CONFIG) | {"quantization_config": quantization})


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file. Raises: QuantizationFormatError for anything else."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise QuantizationFormatError(f"{path} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise QuantizationFormatError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
