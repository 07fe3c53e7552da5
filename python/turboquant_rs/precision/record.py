"""Record: JSON that we wrote, read back entry by entry; what is wrong is refused with the entry's name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from turboquant_rs.errors import QuantizationFormatError
from turboquant_rs.formats.container import without_duplicates


@dataclass(frozen=True)
class Record:
    """A value and where it was found, `sensitivity.layers[3].shape`.

    Whatever is no value of the kind that is asked for raises TypeError or ValueError, named.
    """

    value: Any
    name: str = "the record"

    def __getitem__(self, key: str) -> Record:
        """The entry `key` of an object."""
        if not isinstance(self.value, dict):
            raise TypeError(f"{self.name} is {_shown(self.value)} and no object")
        if key not in self.value:
            raise ValueError(f"{self.name} has no {key!r}")
        return Record(self.value[key], key if self.name == "the record" else f"{self.name}.{key}")

    def each(self, count: int | None = None) -> Iterator[Record]:
        """The entries of a list, of `count` ones."""
        if not isinstance(self.value, list | tuple):
            raise TypeError(f"{self.name} is {_shown(self.value)} and no list")
        if count is not None and len(self.value) != count:
            raise ValueError(f"{self.name} has {len(self.value)} entries, not {count}")
        return (Record(value, f"{self.name}[{at}]") for at, value in enumerate(self.value))

    def whole(self, low: int, high: int | None = None) -> int:
        """A whole number from `low` to `high`."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{self.name} is {_shown(value)} and no whole number")
        if value < low or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"{self.name} is {_shown(value)}; it must be {bound}")
        return value

    def number(self) -> float:
        """A finite number."""
        value = self.value
        try:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise TypeError(f"{self.name} is {_shown(value)} and no finite number")
            return float(value)
        except OverflowError:
            raise ValueError(f"{self.name} is {_shown(value)}, more than a float holds") from None

    def text(self) -> str:
        """Text."""
        if not isinstance(self.value, str):
            raise TypeError(f"{self.name} is {_shown(self.value)} and no text")
        return self.value


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # no JSON, too many digits, nested too deeply
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:40]}…"


def record_of(text: str, kind: str, version: int) -> dict[str, Any]:
    """A JSON object written by us as `kind`. Raises QuantizationFormatError for anything else."""
    try:
        record = json.loads(text, object_pairs_hook=without_duplicates)
    except (TypeError, ValueError, RecursionError) as error:
        raise QuantizationFormatError(
            f"this is no JSON ({error}); give the text that to_json() wrote"
        ) from error
    if not isinstance(record, dict) or record.get("kind") != kind:
        raise QuantizationFormatError(f"this is no {kind}; give the text that to_json() wrote")
    found = record.get("version")
    if isinstance(found, bool) or found != version:
        raise QuantizationFormatError(
            f"a {kind} of version {_shown(found)} cannot be read, only {version}; update turboquant-rs"
        )
    return record


@contextmanager
def reading(kind: str) -> Iterator[None]:
    """Whatever is wrong with the entries that are read in the block is a QuantizationFormatError."""
    try:
        yield
    except QuantizationFormatError:
        raise
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise QuantizationFormatError(
            f"this is no record of a {kind} ({type(error).__name__}: {error}); "
            "give the text that to_json() wrote"
        ) from error
