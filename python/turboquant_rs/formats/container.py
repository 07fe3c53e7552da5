"""The safetensors container, written and read tensor by tensor.

    8 bytes    length of the header, little-endian
    header     JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__": str → str
    data       every tensor, without gaps

The `safetensors` package writes only what is in memory as a whole; here a tensor goes to its place as soon as
it exists. The reader trusts nothing: every length and range is checked before data are touched.
"""

from __future__ import annotations

import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from turboquant_rs.errors import QuantizationFormatError

__all__ = ["DTYPES", "DTYPE_NAMES", "Entry", "Reader", "Writer", "partial_path", "sync_directory"]

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The dtypes of tensors, by safetensors' names."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

METADATA = "__metadata__"
MAX_HEADER = 100_000_000
"""Bytes of the longest header that safetensors itself accepts."""
MAX_BYTES = 2**62
CHUNK = 1 << 24
"""Bytes written or read at once."""


class Entry(NamedTuple):
    """A tensor of a file: dtype, shape and the range of its bytes, counted from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def extent(shape: Sequence[int]) -> int:
    """Elements of a tensor, an empty dimension counted as one: what its strides reach."""
    return math.prod(max(size, 1) for size in shape)


class Checksum:
    """CRC-32 of a tensor's bytes, piece by piece: a piece that is read alone is checked alone.

    Each sum begins with the tensor's name, dtype and shape, so that tensors in each other's place show.
    """

    def __init__(self, name: str, entry: Entry, pieces: Sequence[int] | None = None) -> None:
        size = entry.end - entry.begin
        self.pieces = [n for n in (pieces if pieces is not None else [size]) if n]
        if sum(self.pieces) != size:
            raise ValueError(f"{name} has {size} bytes, its pieces are {self.pieces}")
        identity = json.dumps([name, DTYPE_NAMES[entry.dtype], list(entry.shape)])
        self._sums = [zlib.crc32(identity.encode())] * len(self.pieces)
        self._at = self._done = 0

    def update(self, data: bytes | memoryview) -> None:
        """Takes the next bytes."""
        data = memoryview(data)
        while len(data):
            part = data[: self.pieces[self._at] - self._done]
            self._sums[self._at] = zlib.crc32(part, self._sums[self._at])
            data, self._done = data[len(part) :], self._done + len(part)
            if self._done == self.pieces[self._at]:
                self._at, self._done = self._at + 1, 0

    def to_json(self) -> list[list[Any]]:
        """[bytes, sum in hexadecimal] of each piece; the text's length is the same from the start."""
        return [[size, f"{value:08x}"] for size, value in zip(self.pieces, self._sums, strict=True)]


Sums = dict[str, list[list[Any]]]
"""The checksums of a file's tensors, as JSON knows them."""


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor, contiguous and on the CPU."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


class Writer:
    """Writes a file whose tensors are declared first and delivered one by one, in any order.

    The file grows under a hidden name beside `path` and gets its own name by a rename once every tensor is
    there and on the disk. Until then, and for ever if anything fails, nothing bears the name `path` that did
    not before.

    Use it as a context manager. Raises: ValueError for a tensor that was not declared so or is missing at the
    end; OSError with the path where the disk is full or the place not writable.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | Callable[[Sums], Mapping[str, str]] | None = None,
        pieces: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """
        entries: key → dtype and shape of every tensor.
        metadata: str → str, or a function that makes it of the tensors' checksums.
        pieces: key → bytes of the pieces that get a checksum of their own; default: one piece.
        """
        self.path = Path(os.path.realpath(path))  # a symbolic link keeps pointing at what is written
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a directory; name a file inside it")
        if self.path.exists() and not self.path.is_file():
            raise FileExistsError(f"{self.path} is a device, pipe or socket; name a regular file")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path.parent} is no directory; create it before writing {path}")
        self._entries = _lay_out(entries)
        self._written = dict.fromkeys(self._entries, 0)
        self._partial = partial_path(self.path)
        self._sums = {
            key: Checksum(key, entry, (pieces or {}).get(key)) for key, entry in self._entries.items()
        }
        self._metadata = metadata or {}
        header = self._header()
        self._start = len(header)
        with self._naming_the_path():
            self._file = open(self._partial, "wb")
        try:
            with self._naming_the_path():
                self._file.write(header)
        except OSError:
            self._discard()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a whole tensor."""
        entry = self._entry(name)
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"{name} was declared {entry.dtype} {entry.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        self.append(name, _bytes(tensor))

    def append(self, name: str, data: bytes | memoryview) -> None:
        """Writes the next bytes of a tensor."""
        entry, done = self._entry(name), self._written[name]
        if done + len(data) > entry.end - entry.begin:
            raise ValueError(f"{name} has {entry.end - entry.begin} bytes, got {done + len(data)}")
        with self._naming_the_path():
            self._file.seek(self._start + entry.begin + done)
            for at in range(0, len(data), CHUNK):
                self._file.write(data[at : at + CHUNK])
        self._sums[name].update(data)
        self._written[name] = done + len(data)

    def _header(self) -> bytes:
        """The header with the checksums so far; its length does not depend on them."""
        metadata = self._metadata
        if callable(metadata):
            metadata = metadata({name: checksum.to_json() for name, checksum in self._sums.items()})
        return _header(self._entries, metadata)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise ValueError(f"{name} was not declared; declared are {sorted(self._entries)[:8]} …")
        return self._entries[name]

    def _naming_the_path(self) -> _NamePath:
        return _NamePath(self.path)

    def _finish(self) -> None:
        missing = [n for n, e in self._entries.items() if self._written[n] != e.end - e.begin]
        if missing:
            raise ValueError(f"{len(missing)} tensors were declared and not written whole: {missing[:8]}")
        header = self._header()
        assert len(header) == self._start
        with self._naming_the_path():
            self._file.seek(0)
            self._file.write(header)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
            sync_directory(self.path.parent)

    def _discard(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # the buffer could not be flushed: the error that brought us here says why
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._finish()
        except BaseException:
            self._discard()
            raise


class _NamePath:
    """Says in an OSError which file could not be written, and what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"{self.path} could not be written ({error.strerror}); nothing was left under that name, "
                "choose another place or make room",
            ) from error


def partial_path(path: Path) -> Path:
    """The hidden name beside `path` under which this thread lets it grow."""
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident():x}.partial")


def sync_directory(folder: Path) -> None:
    """Makes a rename inside `folder` last, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # a system that does not open directories
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lay_out(entries: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> dict[str, Entry]:
    """A place for every tensor: the widest dtypes first, so that every one is aligned to its own size."""
    place: dict[str, Entry] = {}
    at = 0
    for name, (dtype, shape) in sorted(entries.items(), key=lambda entry: -entry[1][0].itemsize):
        if dtype not in DTYPE_NAMES:
            raise TypeError(f"{name} has dtype {dtype}, which safetensors does not know; convert it first")
        if name == METADATA:
            raise ValueError(f"no tensor may be called {METADATA}; rename it")
        end = at + nbytes(dtype, shape)
        place[name] = Entry(dtype, tuple(shape), at, end)
        at = end
    return place


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {METADATA: {"format": "pt", **metadata}}
    for name, entry in entries.items():
        fields[name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Reader:
    """Reads a file tensor by tensor, or parts of tensors; nothing but the header is read before.

    Attributes:
        path: The file.
        entries: Name → dtype, shape and place of every tensor, in the order of the file.
        metadata: The file's metadata.

    Use it as a context manager. Raises: QuantizationFormatError naming the file for anything that is not as
    the format says; OSError if it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._sums: Sums = {}
        if self.path.is_fifo():  # which nobody may ever write to
            raise self._bad("it is a pipe; name a regular file")
        self._file = open(self.path, "rb", buffering=0)
        try:
            self._start, header = self._read_header()
            self.metadata = self._check_metadata(header.pop(METADATA, {}))
            self.entries = self._check_entries(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def expect(self, sums: Mapping[str, Any]) -> None:
        """Checks from now on what is read against `sums`, as a `Writer` gave them.

        Raises: QuantizationFormatError if they do not fit the tensors of the file.
        """
        for name, stated in sums.items():
            if name not in self.entries:
                raise self._bad(f"tensor {name} has a checksum and is missing")
            try:
                pieces = [size for size, _ in stated]
                fits = Checksum(name, self.entries[name], pieces).pieces == pieces
            except (TypeError, ValueError):
                fits = False
            if not fits or not all(isinstance(value, str) for _, value in stated):
                raise self._bad(f"tensor {name} has the checksum {stated!r}, which does not fit it")
        self._sums = dict(sums)

    def _check(self, name: str, data: memoryview) -> None:
        """Compares the pieces at the beginning of a tensor that `data` holds whole with their checksums."""
        if name not in self._sums:
            return
        checksum = Checksum(name, self.entries[name], [size for size, _ in self._sums[name]])
        checksum.update(data)
        done = 0
        for stated, (size, value) in zip(self._sums[name], checksum.to_json(), strict=True):
            done += size
            if done <= len(data) and stated != [size, value]:
                raise self._bad(f"tensor {name} has not the checksum that the file states; it was damaged")

    def read(self, name: str, begin: int = 0, count: int | None = None) -> Tensor:
        """A tensor; or, with `count`, that many of its elements from element `begin` on, flat.

        What is read from the beginning is checked against the checksums, where the file has them.
        """
        entry = self.entries[name]
        size = entry.dtype.itemsize
        total = (entry.end - entry.begin) // size
        length = total - begin if count is None else count
        if begin < 0 or length < 0 or begin + length > total:
            raise ValueError(f"{name} has {total} elements, asked for {begin} to {begin + length}")
        out = torch.empty(length, dtype=entry.dtype)
        if length:
            view = memoryview(out.view(torch.uint8).numpy().data)
            self._read_into(name, view, self._start + entry.begin + begin * size)
            if begin == 0:
                self._check(name, view)
        return out.view(entry.shape) if count is None and begin == 0 else out

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, some megabytes at a time."""
        entry = self.entries[name]
        for at in range(entry.begin, entry.end, CHUNK):
            chunk = bytearray(min(CHUNK, entry.end - at))
            self._read_into(name, memoryview(chunk), self._start + at)
            yield bytes(chunk)

    def _read_into(self, name: str, view: memoryview, at: int) -> None:
        self._file.seek(at)
        while len(view):
            done = self._file.readinto(view[:CHUNK])
            if not done:
                raise self._bad(f"tensor {name} ends after {at} bytes of the file; the file was cut short")
            view, at = view[done:], at + done

    def _bad(self, why: str) -> QuantizationFormatError:
        return QuantizationFormatError(f"{self.path}: {why}")

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
            raise self._bad(
                f"the header is said to have {length} bytes and the file has {size}; it is truncated, or no "
                "safetensors file"
            )
        text = b""
        while len(text) < length and (part := self._file.read(length - len(text))):
            text += part
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"the header is no JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._bad(f"the header is a JSON {type(header).__name__}, not an object")
        self._data_size = size - 8 - length
        return 8 + length, header

    def _check_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._bad("the metadata must map strings to strings")
        return metadata

    def _check_entries(self, header: Mapping[str, Any]) -> dict[str, Entry]:
        entries = {name: self._check_entry(name, fields) for name, fields in header.items()}
        at = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != at:
                raise self._bad(f"tensor {name} begins at byte {entry.begin} of the data, expected {at}")
            at = entry.end
        if at != self._data_size:
            raise self._bad(
                f"the tensors take {at} bytes and the file has {self._data_size}; it is truncated or damaged"
            )
        return entries

    def _check_entry(self, name: str, fields: Any) -> Entry:
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"tensor {name} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._bad(f"tensor {name} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise self._bad(f"tensor {name} has shape {shape!r} and data_offsets {offsets!r}")
        begin, end = offsets
        need = nbytes(DTYPES[dtype], shape)
        if extent(shape) > MAX_BYTES // 8 or end - begin != need or end > self._data_size:
            raise self._bad(
                f"tensor {name}, {dtype} {shape}, needs {need} bytes and is given {begin} to {end} of "
                f"{self._data_size}; the file is truncated or damaged"
            )
        return Entry(DTYPES[dtype], tuple(shape), begin, end)


def _naturals(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value <= MAX_BYTES for value in values)
    )


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `json.loads`. Raises: ValueError for a key that would hide another."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} is given twice")
        found[name] = value
    return found
