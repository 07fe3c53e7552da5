"""Report: what quantizing a model did, layer by layer, and what it left alone and why."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from turboquant_rs.scheme import Scheme
from turboquant_rs.table import human_bytes, printable, table

__all__ = ["QuantizedLayer", "Report", "SkippedLayer"]


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """One layer done (or, in a dry run, to be done).

    shape: of the logical weight. bytes_before, bytes_after: of the weight, everything counted.
    sqnr: signal to quantization noise of the weight in dB, 10·log10(Σw² / Σ(w - ŵ)²); infinite if nothing is
        lost, None in a dry run. aliases: further names of the same module or of the weight it shares.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    scheme: Scheme
    bytes_before: int
    bytes_after: int
    sqnr: float | None
    aliases: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite `sqnr` becomes the string "inf"."""
        record = dataclasses.asdict(self) | {"scheme": self.scheme.to_dict()}
        if self.sqnr is not None and math.isinf(self.sqnr):
            record["sqnr"] = "inf"
        return record | {"shape": list(self.shape), "aliases": list(self.aliases)}


@dataclasses.dataclass(frozen=True)
class SkippedLayer:
    """One layer left as it was, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `tq.quantize_`; prints as a table."""

    layers: tuple[QuantizedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    dry_run: bool = False

    @property
    def bytes_before(self) -> int:
        """Bytes of the weights of the layers done, before."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the weights of the layers done, after: planes, scales, zero points, tables."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bits_per_element(self) -> float:
        """Effective bits an element of the layers done, everything counted (0 if there is none)."""
        elements = sum(math.prod(layer.shape) for layer in self.layers)
        return 8 * self.bytes_after / elements if elements else 0.0

    @property
    def ratio(self) -> float:
        """bytes_before / bytes_after (1 if nothing was done)."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain JSON values."""
        return {
            "dry_run": self.dry_run,
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": [dataclasses.asdict(layer) for layer in self.skipped],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": self.ratio,
            "bits_per_element": self.bits_per_element,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        verb = "would be quantized" if self.dry_run else "quantized"
        parts = [
            f"{len(self.layers)} layers {verb}: {human_bytes(self.bytes_before)} -> "
            f"{human_bytes(self.bytes_after)} ({self.ratio:.2f}x smaller, "
            f"{self.bits_per_element:.2f} bits an element)"
        ]
        if self.layers:
            header = ("layer", "shape", "scheme", "before", "after", "SQNR")
            parts.append(table(header, [_row(layer) for layer in self.layers]))
        if self.skipped:
            parts.append(f"left as they were: {len(self.skipped)}")
            lines = [(printable(layer.name), printable(layer.reason)) for layer in self.skipped]
            width = max(len(name) for name, _ in lines)
            parts.append("\n".join(f"  {name.ljust(width)}  {reason}" for name, reason in lines))
        return "\n".join(parts)


def describe_scheme(scheme: Scheme) -> str:
    """A scheme in a few words for a table: `4 bits g64`, `8 bits g32 asym`, `4+4 bits g64`."""
    bits = "+".join(map(str, scheme.widths)) if scheme.is_nested else str(scheme.bits)
    group = "row" if scheme.group_size is None else f"g{scheme.group_size}"
    parts = [f"{bits} bits", group]
    if not scheme.symmetric:
        parts.append("asym")
    if scheme.levels != "uniform":
        parts.append(scheme.levels if isinstance(scheme.levels, str) else "table")
    if scheme.scale != "extreme":
        parts.append(scheme.scale)
    if scheme.scale_dtype != "bf16":
        parts.append(f"{scheme.scale_dtype} scales")
    return " ".join(parts)


def _row(layer: QuantizedLayer) -> tuple[str, ...]:
    return (
        " = ".join((layer.name, *layer.aliases)),
        f"{layer.shape[0]} x {layer.shape[1]}",
        describe_scheme(layer.scheme),
        human_bytes(layer.bytes_before),
        human_bytes(layer.bytes_after),
        "-" if layer.sqnr is None else f"{layer.sqnr:.1f} dB",
    )
