"""Quantize a checkpoint on disk, block of rows by block of rows.

    IN (file, or directory of shards) → select → for each tensor: read rows → pack → measure → write → OUT

Memory holds one block of rows and the packed form of one tensor, never a tensor in full precision. OUT appears
by a rename at the end: whatever happens before, nothing half-written bears its name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from turboquant_rs import ops
from turboquant_rs.checkpoint.files import INDEX, Checkpoint, Shard, Stored
from turboquant_rs.checkpoint.select import select
from turboquant_rs.errors import QuantizationFormatError
from turboquant_rs.formats.store import Writer
from turboquant_rs.packed import PackedTensor
from turboquant_rs.progress import Progress
from turboquant_rs.quality import Distance
from turboquant_rs.report import QuantizedLayer, Report, SkippedLayer
from turboquant_rs.scheme import Rounding, Scheme

__all__ = ["quantize_checkpoint"]

BLOCK_ELEMENTS = 1 << 22
"""Elements read, packed and measured at a time: small against memory, large against every overhead."""

OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors", ".tflite")
"""Files of a model directory that hold weights once more; they are not copied."""


def quantize_checkpoint(
    source: Path,
    target: Path,
    scheme: Scheme,
    rounding: Rounding,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dry_run: bool = False,
    replace: bool = False,
) -> Report:
    """Writes `source` with the selected tensors packed (see `select`) to `target`, everything else unchanged.

    A file becomes a file, a directory a directory: shards keep their names, the index is written anew, other
    files are copied, and config.json gets a `quantization_config` with the scheme of every tensor. Stochastic
    rounding draws from a stream named after the tensor, so the result is that of `tq.pack` with that stream.

    Raises FileExistsError if `target` exists (a file: unless `replace`), NoLayersMatched if nothing is selected,
    ValueError for values outside the format's domain and for a source that is quantized already, OSError where
    reading or writing fails. Nothing is left behind then.
    """
    with Checkpoint(source) as checkpoint:
        plain = {name: (stored.dtype, stored.shape) for name, stored in checkpoint.tensors.items()}
        _refuse_quantized(checkpoint)
        reasons = select(plain, include, exclude)
        schemes = {name: scheme for name, reason in reasons.items() if not reason}
        rounding.check(scheme)
        skipped = tuple(SkippedLayer(name, reason) for name, reason in reasons.items() if reason)
        if dry_run:
            layers = [_entry(stored, scheme, None) for name, stored in checkpoint.tensors.items() if name in schemes]
            return Report(tuple(layers), skipped, dry_run=True)
        _refuse_target(source, target, replace)
        total = sum(stored.nbytes for stored in checkpoint.tensors.values())
        with Progress("quantize", total, unit="MB") as progress:
            job = _Job(schemes, rounding, progress)
            if checkpoint.is_directory:
                return Report(tuple(job.directory(checkpoint, target)), (*skipped, *_not_copied(source)))
            (shard,) = checkpoint.shards
            return Report(tuple(job.shard(shard, target)), skipped)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is the same for every shard."""

    schemes: Mapping[str, Scheme]
    rounding: Rounding
    progress: Progress

    def directory(self, checkpoint: Checkpoint, target: Path) -> list[QuantizedLayer]:
        """Writes all shards and the files beside them into a new directory, which gets its name at the end."""
        layers: list[QuantizedLayer] = []
        with _new_directory(target) as folder:
            _copy_other_files(checkpoint.path, folder)
            for shard in checkpoint.shards:
                layers += self.shard(shard, folder / shard.path.name)
            if checkpoint.index is not None:
                _write_json(folder / INDEX, _new_index(checkpoint, folder))
            _write_config(folder / "config.json", self._description(checkpoint))
        return layers

    def shard(self, shard: Shard, target: Path) -> list[QuantizedLayer]:
        """Writes one file, tensor by tensor."""
        layers: list[QuantizedLayer] = []
        with Writer(target, self._layout(shard), shard.metadata) as writer:
            for name, stored in shard.tensors.items():
                if name in self.schemes:
                    packed, distance = self._pack(shard, stored)
                    writer.write(name, packed)
                    layers.append(_entry(stored, packed.scheme, distance.sqnr_db))
                else:
                    self._copy(shard, stored, writer)
        return layers

    def _description(self, checkpoint: Checkpoint) -> dict[str, object]:
        """`quantization_config`: what a reader needs to decode every tensor, whatever happens to the metadata."""
        tensors = {
            name: self.schemes[name].to_dict() | {"rounding": self._rounding(name).to_dict(), "dtype": stored.dtype}
            for name, stored in checkpoint.tensors.items()
            if name in self.schemes
        }
        return {"quant_method": QUANT_METHOD, "version": 1, "tensors": tensors}

    def _rounding(self, name: str) -> Rounding:
        """Every tensor has random draws of its own."""
        nearest = self.rounding.mode == "nearest"
        return self.rounding if nearest else dataclasses.replace(self.rounding, stream=name)

    def _pack(self, shard: Shard, stored: Stored) -> tuple[PackedTensor, Distance]:
        """The packed form of one tensor, made from blocks of rows, and its distance from the original."""
        scheme, rounding = self.schemes[stored.name], self._rounding(stored.name)
        whole = _empty(stored, scheme, rounding)
        planes, scales, zero_points = _by_rows(whole)
        distance = Distance()
        for start, stop in _row_blocks(stored):
            block = shard.read_rows(stored.name, start, stop)
            try:
                piece = _pack_block(block, scheme, rounding, start)
            except ValueError as error:
                raise ValueError(f"{stored.name}, rows {start} to {stop - 1}: {error}") from error
            for mine, theirs in zip((*planes, scales, zero_points), _flat_parts(piece), strict=True):
                mine[start:stop] = theirs
            distance.update(block, piece.dequantize())
            self.progress.advance(block.nbytes, stored.name)
        return whole, distance

    def _copy(self, shard: Shard, stored: Stored, writer: Writer) -> None:
        """One tensor, byte for byte."""
        for chunk in shard.read_bytes(stored.name):
            writer.append(chunk)
            self.progress.advance(len(chunk), stored.name)


def _row_blocks(stored: Stored) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of whole rows with about BLOCK_ELEMENTS elements each."""
    *lead, k = stored.shape
    rows = math.prod(lead)
    step = max(1, BLOCK_ELEMENTS // k)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


# The files around the tensors --------------------------------------------------------------------------------


def _refuse_target(source: Path, target: Path, replace: bool) -> None:
    if target.resolve() == source.resolve():
        raise FileExistsError(f"{target} is the input itself; choose another name for the output")
    if target.resolve().is_relative_to(source.resolve()):
        raise FileExistsError(f"{target} lies inside the input; choose a place outside of it")
    if not os.path.lexists(target):
        return
    if target.is_dir() or source.is_dir():
        raise FileExistsError(f"{target} exists; choose another name or remove it first")
    if not replace:
        raise FileExistsError(f"{target} exists; choose another name, or replace it with --force")


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, beside `target` and hidden, that takes the name `target` if all goes well."""
    folder = target.with_name(f".{target.name}.{os.getpid()}.partial")
    folder.mkdir()
    try:
        yield folder
        _sync_tree(folder)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync(target.parent)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Waits until `path`, a file or the entries of a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _other_files(source: Path) -> tuple[list[Path], list[Path]]:
    """What lies in a model directory besides its shards, relative to it: (to copy, to leave out)."""
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    visible = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    copied = [path for path in visible if path.suffix not in OTHER_WEIGHTS and path.name != INDEX]
    left_out = [p for p in visible if p.suffix in OTHER_WEIGHTS and not (p.suffix == ".safetensors" and len(p.parts) == 1)]
    return copied, left_out


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
