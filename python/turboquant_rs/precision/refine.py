"""refine: rows of the input that need it read more bits of a nested weight than the others.

    batches ──► model at all bits ──► sizes of the rows that each layer meets ──► threshold = their quantile
    row of x with size ≤ threshold ──► y at the lower of two readable widths
    row of x with size > threshold ──► y at the higher one

A layer whose target t lies between two readable widths p < t < q refines the share (t − p)/(q − p) of its
rows: its threshold is the quantile 1 − (t − p)/(q − p) of the sizes seen (DP-LLM, arXiv 2508.06041). The size
of a row is that of the scales its int8 activations have anyway, √ Σ s_x²; `fit` says how well a straight line
in it predicts the error ‖y_q − y_p‖ that refining the row takes away.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from turboquant_rs import ops
from turboquant_rs.errors import NoLayersMatched
from turboquant_rs.nn import QuantLinear, precision
from turboquant_rs.nn.convert import require_module
from turboquant_rs.nn.patterns import Pattern, no_match
from turboquant_rs.nn.precision import require_free
from turboquant_rs.nn.rows import RowPrecision
from turboquant_rs.progress import Progress
from turboquant_rs.table import table

from .losses import call, iterate
from .sensitivity import at_rest
from .variants import input_of

EVERY_ROW = -1.0
"""A threshold below the size of any row."""


@dataclass(frozen=True)
class RefinedLayer:
    """One layer, its two widths, and what was found about the rows it met.

    elements: of the weight. expected_bits: read of a code, averaged over the rows of the batches.
    fit: R² of the straight line from the size of a row to ‖y at refined_bits − y at read_bits‖; NaN where all
        sizes, or all errors, are the same.
    """

    name: str
    elements: int
    read_bits: int
    refined_bits: int
    threshold: float
    expected_bits: float
    fit: float


@dataclass(frozen=True, repr=False)
class Refinement:
    """The result of `tq.refine`; prints as a table. `rows`: of input that thresholds come from, a layer."""

    layers: tuple[RefinedLayer, ...]
    rows: int

    @property
    def expected_bits(self) -> float:
        """Mean bits read of a code over all refined weights, on the batches."""
        total = sum(layer.elements for layer in self.layers)
        return sum(layer.elements * layer.expected_bits for layer in self.layers) / total

    def table(self) -> str:
        """One line a layer."""
        header = ("layer", "bits", "threshold", "expected bits", "R²")
        rows = [
            (
                layer.name,
                f"{layer.read_bits} or {layer.refined_bits}",
                f"{layer.threshold:.4g}",
                f"{layer.expected_bits:.3f}",
                f"{layer.fit:.2f}",
            )
            for layer in self.layers
        ]
        return table(header, rows)

    def __repr__(self) -> str:
        return (
            f"{len(self.layers)} layers, {self.expected_bits:.3f} bits of a code expected "
            f"({self.rows} rows)\n{self.table()}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; a `fit` that is NaN becomes None."""
        record = asdict(self)
        for layer in record["layers"]:
            layer["fit"] = None if math.isnan(layer["fit"]) else layer["fit"]
        return record | {"expected_bits": self.expected_bits}

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


def refine(
    model: nn.Module,
    target_bits: float | Mapping[str, float],
    batches: Iterable[Any],
    *,
    progress: bool = True,
) -> Refinement:
    """Lets each row of the input decide at how many bits the nested linear layers of `model` read it.

    target_bits: mean bits read of a code, for each nested layer, or {pattern: bits} as in `tq.set_precision`
        (a `Plan.bits` too), which leaves other layers alone. Between two readable widths, rows are divided
        among those two; on one of them, all rows read that one.
    batches: what the model is called with, to find the thresholds; it reads all bits meanwhile.
    progress: draw a bar on stderr, if that is a terminal.

    A row of the result is, bit for bit, that of the layer read at the row's bits. `layer.mean_bits` counts
    what the rows have read since. It is a setting of the running model, like `read_bits`: pickles and copies
    keep it, state dicts and files do not; `tq.set_precision` ends it.

    Raises `ValueError`, and changes nothing, for bits outside what a layer can be read at, layers with
    activations="float", layers that follow a ladder (`tq.PrecisionController`), empty batches, inputs that
    are not finite, a layer that no batch reaches; `NoLayersMatched` for a model without nested linear layers
    and a pattern that matches none.
    """
    targets = [_Target(name, layer, bits) for name, layer, bits in _wanted(model, target_bits)]
    source = iterate(batches)
    count = len(source) if isinstance(source, Sized) else 0
    seen = 0
    with (
        torch.no_grad(),
        at_rest(model),
        precision(model, None),
        ExitStack() as handles,
        Progress("refine", count, stream=None if progress else io.StringIO()) as bar,
    ):
        for target in targets:
            hook = target.layer.register_forward_hook(target.hook(), with_kwargs=True)
            handles.enter_context(hook)
        for batch in source:
            call(model, batch)
            seen += 1
            bar.advance()
    if not seen:
        raise ValueError("batches is empty; give at least one batch, better some thousand rows")
    layers = tuple(target.result() for target in targets)
    for target, found in zip(targets, layers, strict=True):
        if found.read_bits == found.refined_bits:
            target.layer.read_bits = found.read_bits
        else:
            target.layer.read_bits = found.refined_bits
            target.layer._rows = RowPrecision(found.read_bits, found.refined_bits, found.threshold)
    return Refinement(layers, max(target.rows for target in targets))


@dataclass
class _Target:
    """A layer, the mean bits wanted of it, and the sizes and errors of the rows seen so far, in f64."""

    name: str
    layer: QuantLinear
    bits: float
    sizes: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        readable = self.layer.readable_bits
        if not readable[0] <= self.bits <= readable[-1]:
            raise ValueError(
                f"target_bits {self.bits:g} is outside what {self.name} can be read at, {readable[0]} to "
                f"{readable[-1]} bits; choose within, or quantize with other planes of tq.Scheme.nested"
            )
        self.low = max(bits for bits in readable if bits <= self.bits)
        self.high = min(bits for bits in readable if bits >= self.bits)

    @property
    def rows(self) -> int:
        """Rows seen."""
        return sum(map(len, self.sizes))

    def hook(self) -> Callable[..., None]:
        """Notes the rows of a call; the layer computes at both widths for that."""

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            x = input_of(args, kwargs).detach()
            size = ops.reference.row_sizes(x, self.layer.scheme.group_size or 0).flatten()
            if not bool(size.isfinite().all()):
                raise ValueError(
                    f"the input of {self.name} is NaN or infinite; leave out the batch that makes it so"
                )
            self.sizes.append(size.cpu())
            self.errors.append((self._at(self.high, x) - self._at(self.low, x)).norm(dim=-1).flatten().cpu())

        return note

    def _at(self, bits: int, x: Tensor) -> Tensor:
        """The output in f64, at that many bits."""
        with precision(self.layer, bits):
            return self.layer.forward(x).double()

    def result(self) -> RefinedLayer:
        """The threshold that the rows seen ask for. Raises ValueError if there were none."""
        if not self.rows:
            raise ValueError(
                f"no batch reaches {self.name}; leave it out: target_bits={{pattern: bits}} for the others"
            )
        sizes, errors = torch.cat(self.sizes), torch.cat(self.errors)
        step = self.high - self.low
        refined = round((self.bits - self.low) / step * len(sizes)) if step else 0
        # As many rows as wanted lie above it, or fewer where several have its size.
        kept = len(sizes) - refined
        threshold = float(sizes.sort().values[kept - 1]) if kept else EVERY_ROW
        expected = self.low + step * float((sizes > threshold).double().mean())
        fit = float(torch.corrcoef(torch.stack((sizes, errors)))[0, 1] ** 2) if len(sizes) > 1 else math.nan
        elements = self.layer.in_features * self.layer.out_features
        return RefinedLayer(self.name, elements, self.low, self.high, threshold, expected, fit)


def _wanted(
    model: nn.Module, target_bits: float | Mapping[str, float]
) -> Iterator[tuple[str, QuantLinear, float]]:
    """The layers to refine, by name, and the mean bits wanted of each."""
    require_module(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and len(module.readable_bits) > 1
    }
    if not layers:
        raise NoLayersMatched(
            f"{type(model).__name__} has no linear layer that can be read at several widths; quantize it "
            "with tq.quantize_(model, tq.Scheme.nested())"
        )
    targets = target_bits if isinstance(target_bits, Mapping) else {"*": target_bits}
    if not targets:
        raise ValueError("target_bits is empty; give a number of bits for all layers, or {pattern: bits}")
    wanted: dict[str, float] = {}
    for text, bits in targets.items():
        if isinstance(bits, bool) or not isinstance(bits, int | float):
            raise TypeError(f"target_bits must be a number of bits, such as 4.8, got {bits!r}")
        matched = [name for name in layers if Pattern(text).matches(name)]
        if not matched:
            raise no_match(text, list(layers))
        wanted |= {name: bits for name in matched if name not in wanted}
    require_free({name: layers[name] for name in wanted})
    for name, bits in wanted.items():
        layer = layers[name]
        if layer.activations != "int8":
            raise ValueError(
                f"{name} has activations={layer.activations!r}, and rows are refined by the scales of int8 "
                "activations; set layer.activations = 'int8' or leave it out: target_bits={pattern: bits}"
            )
        if layer._stored_bits != layer.scheme.bits:
            raise ValueError(
                f"{name} holds {layer._stored_bits} of the {layer.scheme.bits} bits of its scheme; refine a "
                "model that was loaded with all of them"
            )
        yield name, layer, bits
