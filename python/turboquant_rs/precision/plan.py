"""Plan: how many bits each layer gets; what `tq.allocate` returns and `tq.quantize_` obeys."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from turboquant_rs.errors import QuantizationFormatError
from turboquant_rs.report import describe_scheme
from turboquant_rs.scheme import NESTED_PLANES, Scheme
from turboquant_rs.table import human_bytes, table

from . import picture
from .choices import Choices, nbytes
from .record import Record, reading, record_of
from .sensitivity import LayerScores, Sensitivity
from .variants import at_bits

KIND, VERSION = "turboquant_rs plan", 1
SHOWN = 8  # differences listed in an error
MOST_LEVELS = 1 << 16  # of a ladder: memory for each is taken beforehand


@dataclass(frozen=True, repr=False)
class Plan:
    """Bits for every layer that was scored; prints as a table.

    widths: the bits, in the order of `sensitivity.layers`. ties: layers that share their bits, by position.
    floor, ceiling: bounds of the bits, for `ladder` as well.
    """

    sensitivity: Sensitivity
    widths: tuple[int, ...]
    ties: tuple[tuple[int, ...], ...]
    floor: int
    ceiling: int

    @property
    def scheme(self) -> Scheme:
        """How layers are quantized, the number of bits aside."""
        return self.sensitivity.scheme

    @cached_property
    def bits(self) -> dict[str, int]:
        """{layer: bits}; a block of rows is named `layer[first:last]`."""
        return {layer.key: bits for layer, bits in zip(self.sensitivity.layers, self.widths, strict=True)}

    @cached_property
    def by_name(self) -> dict[str, int]:
        """{layer: bits}, each layer under every name it has in the model."""
        layers = zip(self.sensitivity.layers, self.widths, strict=True)
        return {name: bits for layer, bits in layers for name in (layer.name, *layer.aliases)}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the planned weights: planes, scales, zero points, tables."""
        return sum(size for _, _, size, _ in self._layers())

    @property
    def effective_bits(self) -> float:
        """Bits an element of the planned weights, everything counted."""
        return 8 * self.nbytes / sum(layer.elements for layer in self.sensitivity.layers)

    @cached_property
    def predicted_kl(self) -> float:
        """Sum of the layers' scores: the KL to expect, in nats. With score="error" it is a sum of relative
        squared errors of the layers' outputs instead."""
        return sum(score for _, _, _, score in self._layers())

    def _layers(self) -> Iterator[tuple[LayerScores, int, int, float]]:
        """Each layer with its bits, bytes and score."""
        found = self.sensitivity
        size = nbytes(found)
        for layer, bits in zip(found.layers, self.widths, strict=True):
            yield layer, bits, size(layer, bits), layer.scores[found.choices.index(bits)]

    # Precision by the step

    def ladder(self, levels: int = 16) -> tuple[Plan, ...]:
        """Nested plans from the ceiling (level 0) to the floor, in equal steps of bytes.

        Each is the Lagrangian optimum for its bytes, and from one level to the next no layer rises. Levels
        between which no layer changes are one, so that there may be fewer.

        Raises `ValueError` for fewer than two levels, or more than any model has.
        """
        if isinstance(levels, bool) or not isinstance(levels, int):
            raise TypeError(f"levels must be a whole number, got {levels!r}")
        if not 2 <= levels <= MOST_LEVELS:
            raise ValueError(f"a ladder has 2 to {MOST_LEVELS} levels, got {levels}; use 16, say")
        found = self.sensitivity
        choices = Choices.of(found, found.within(self.floor, self.ceiling), self.ties, nbytes(found))
        low, high = choices.least, choices.most
        budgets = [high - (high - low) * level // (levels - 1) for level in range(levels)]
        widths = dict.fromkeys(choices.spread(chosen) for chosen in choices.ladder(budgets))
        return tuple(dataclasses.replace(self, widths=own) for own in widths)

    # For people

    def table(self) -> str:
        """One line a layer: bits, bytes, predicted KL."""
        rows = [
            (layer.key, f"{layer.shape[0]} x {layer.shape[1]}", str(bits), human_bytes(size), f"{score:.2e}")
            for layer, bits, size, score in self._layers()
        ]
        total = ("all of them", "", f"{self.effective_bits:.2f}", human_bytes(self.nbytes))
        header = ("layer", "shape", "bits", "size", _predicted(self.sensitivity))
        return table(header, [*rows, (*total, f"{self.predicted_kl:.2e}")])

    def __repr__(self) -> str:
        scheme = describe_scheme(self.scheme).partition(" bits ")[2]
        used = {bits: self.widths.count(bits) for bits in sorted(set(self.widths))}
        return (
            f"{self.sensitivity.model}: {self.effective_bits:.3f} bits an element with scales ({scheme}), "
            f"{human_bytes(self.nbytes)}, {_predicted(self.sensitivity)} {self.predicted_kl:.3g}; layers by "
            f"bits: {', '.join(f'{count} of {bits}' for bits, count in used.items())}\n{self.table()}"
        )

    def plot(self, path: str | Path) -> None:
        """Writes a picture of the bits, layer by layer, as PNG.

        Raises BackendUnavailable without matplotlib, OSError where `path` cannot be written.
        """
        picture.draw_plan(self, path)

    # Files

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; `bits`, `nbytes` and the like are there to be read."""
        return {
            "kind": KIND,
            "version": VERSION,
            "bits": self.bits,
            "effective_bits": self.effective_bits,
            "nbytes": self.nbytes,
            "predicted_kl": self.predicted_kl,
            "ties": [list(group) for group in self.ties],
            "floor": self.floor,
            "ceiling": self.ceiling,
            "sensitivity": self.sensitivity.to_dict(),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """What `to_json` wrote. Raises QuantizationFormatError for anything else."""
        record = record_of(text, KIND, VERSION)
        with reading("Plan"):
            return cls.read(Record(record))

    @classmethod
    def read(cls, record: Record) -> Plan:
        """What `to_dict` gave. Raises TypeError or ValueError that names the entry that is wrong."""
        found = Sensitivity.read(record["sensitivity"])
        floor = record["floor"].whole(1, 8)
        ceiling = record["ceiling"].whole(floor, 8)
        bits = record["bits"]
        choices = found.within(floor, ceiling)
        widths = tuple(bits[layer.key].whole(floor, ceiling) for layer in found.layers)
        for layer, width in zip(found.layers, widths, strict=True):
            if width not in choices:
                raise ValueError(f"bits of {layer.key!r} are {width}; scored, in bounds, were {choices}")
        if unknown := sorted(set(bits.value) - {layer.key for layer in found.layers}):
            raise ValueError(f"{bits.name} names {unknown[0]!r}, which was not scored")
        ties = tuple(tuple(i.whole(0) for i in group.each()) for group in record["ties"].each())
        if sorted(i for group in ties for i in group) != list(range(len(widths))):
            raise ValueError(f"{record['ties'].name} do not hold every layer once")
        for group in ties:
            if len({widths[i] for i in group}) != 1:
                raise ValueError(f"{record['ties'].name} hold {list(group)}, whose bits are not the same")
        return cls(found, widths, ties, floor, ceiling)

    # In a model

    def prescribe(self, model: nn.Module, nested: bool) -> tuple[dict[str, Scheme], dict[str, int]]:
        """For `tq.quantize_`: {pattern: scheme}, and {layer: bits to read of it} where those are a prefix.

        Raises `ValueError` where the model is not the one it was made for (names and shapes that differ are
        listed), for blocks of rows, and where no nested scheme can be read at its choices.
        """
        self.require(model)
        whole = self._nested_scheme() if nested else None
        schemes, read = {}, {}
        for layer, bits in zip(self.sensitivity.layers, self.widths, strict=True):
            names = (layer.name, *layer.aliases)
            scheme = whole or at_bits(self.scheme, bits)
            schemes[f"re:{'|'.join(map(re.escape, names))}"] = scheme
            if scheme.is_nested:
                read.update(dict.fromkeys(names, bits))
        return schemes, read

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Scheme]:
        """{tensor: scheme} for a checkpoint with tensors of these shapes: `<layer>.weight` for every layer.

        Raises `ValueError` as `prescribe` does.
        """
        matrices = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
        self._require(matrices, every=False)
        if self.scheme.is_nested:
            raise ValueError("a file has no bits to read a layer at; plan with a scheme that is not nested")
        return {
            f"{name}.weight": at_bits(self.scheme, bits)
            for layer, bits in zip(self.sensitivity.layers, self.widths, strict=True)
            for name in (layer.name, *layer.aliases)
            if name in matrices
        }

    def require(self, model: nn.Module) -> None:
        """Raises `ValueError` where the plan was made for another model; what differs is listed."""
        modules = model.named_modules(remove_duplicate=False)
        self._require({name: shape for name, module in modules if (shape := _shape(module))}, every=True)

    def _require(self, shapes: Mapping[str, tuple[int, ...]], every: bool) -> None:
        """Refuses a model that differs in the planned layers, under `every` name or one of each layer's."""
        if any(layer.key != layer.name for layer in self.sensitivity.layers):
            raise ValueError(
                "the plan gives blocks of rows bits of their own, and a layer holds one scheme; score with "
                "granularity='tensor' to quantize"
            )
        differences = []
        for layer in self.sensitivity.layers:
            names = (layer.name, *layer.aliases)
            here = [name for name in names if name in shapes]
            differences += [
                f"{name} is missing" for name in names if name not in here and (every or not here)
            ]
            differences += [
                f"{name} is {_times(shapes[name])} here, {_times(layer.shape)} in the plan"
                for name in here
                if tuple(shapes[name]) not in (layer.shape, layer.shape[::-1])
            ]
        if differences:
            more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
            raise ValueError(
                f"the plan was made for another model: {'; '.join(differences[:SHOWN])}{more}; score this "
                "one with tq.sensitivity"
            )

    def _nested_scheme(self) -> Scheme:
        """The nested scheme of the fewest planes that can be read at every choice of the plan."""
        if self.scheme.is_nested:
            return self.scheme
        wanted = set(self.sensitivity.within(self.floor, self.ceiling))
        fields = (self.scheme.group_size, self.scheme.scale_dtype)
        for planes in NESTED_PLANES:
            scheme = Scheme.nested(fields[0], planes, scale_dtype=fields[1])
            if wanted <= set(scheme.prefixes):
                return scheme
        raise ValueError(
            f"no nested scheme can be read at all of {sorted(wanted)} bits; "
            f"score with choices out of {Scheme.nested(planes=NESTED_PLANES[-1]).prefixes}"
        )


def _predicted(found: Sensitivity) -> str:
    return "relative error" if found.score == "error" else "predicted KL"


def _shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's matrix; empty if it has none."""
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) and weight.dim() == 2 else ()


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises OSError, and QuantizationFormatError naming the file."""
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (QuantizationFormatError, UnicodeDecodeError) as error:
        raise QuantizationFormatError(f"{path}: {error}") from error
