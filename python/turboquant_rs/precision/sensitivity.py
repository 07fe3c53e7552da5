"""sensitivity: what each layer at each number of bits costs the model, before anything is quantized.

    batches ──► model ──► labels drawn from its own output ──► one backward pass
                  │ x of each layer                                 │ g = ∂(−log p)/∂y of each layer
                  └────────► δ = x (Ŵ − W)ᵀ at every choice ◄───────┘
                                   score += ½ (gᵀδ)²,  a token at a time

KL(p ‖ p̂) of one layer perturbed is ½ δᵀ F δ to second order, F = E g gᵀ the Fisher information of its output.
The inner product is taken for each token, not element by element: errors of the channels cancel as they do
in the model, which a diagonal (Σ g² δ², as in most tools) cannot see. Where the tokens of a sequence make one
sample (an embedding, a class), it is taken over all of them: their errors add up. Where each token has a
distribution of its own, what the error of one does to the others is left out, for much less noise. All
choices share the backward pass.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from turboquant_rs.nn import quantize_
from turboquant_rs.progress import Progress
from turboquant_rs.report import QuantizedLayer, describe_scheme
from turboquant_rs.scheme import Scheme
from turboquant_rs.table import table

from . import picture
from .losses import Categorical, Forward, Loss, call, iterate, resolve
from .phases import Phases
from .record import Record, reading, record_of
from .variants import Variants, at_bits, input_of

CHOICES = (2, 3, 4, 5, 6, 8)
SCORES = {
    "fisher": "KL to second order, in nats",
    "probe": "measured KL, in nats",
    "error": "squared error of the layer's output, relative to the output",
}
KIND, VERSION = "turboquant_rs sensitivity", 1


@dataclass(frozen=True)
class LayerScores:
    """One layer, or a block of its rows, with a score for every choice of bits.

    shape: (n, k) of the whole weight. rows: first and last + 1 of the rows scored, (0, n) for all of them.
    aliases: further names of the layer and of those that share its weight.
    """

    name: str
    shape: tuple[int, int]
    rows: tuple[int, int]
    scores: tuple[float, ...]
    aliases: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What a plan calls it: the name of the layer, with `[first:last]` for a block of rows."""
        return self.name if self.rows == (0, self.shape[0]) else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def elements(self) -> int:
        """Number of weights scored."""
        return (self.rows[1] - self.rows[0]) * self.shape[1]


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """The result of `tq.sensitivity`: layers × choices; prints as a table.

    Scores are means over the samples (tokens; for embeddings: vectors), so their sum over layers predicts the
    KL of quantizing them together, in nats, where `score` is "fisher" or "probe".
    """

    model: str
    score: str
    scheme: Scheme
    choices: tuple[int, ...]
    layers: tuple[LayerScores, ...]
    samples: int
    seconds: float

    def __getitem__(self, key: str) -> dict[int, float]:
        """{bits: score} of a layer. Raises KeyError."""
        for layer in self.layers:
            if layer.key == key:
                return dict(zip(self.choices, layer.scores, strict=True))
        raise KeyError(key)

    def spread(self, bits: int) -> float:
        """Standard deviation of the logarithm of the layers' scores a weight at `bits`: what a mixed plan
        lives on. Scores of 0 are left out; ValueError for bits that are no choice."""
        column = self._column(bits)
        logs = [math.log(x.scores[column] / x.elements) for x in self.layers if x.scores[column] > 0]
        mean = sum(logs) / max(len(logs), 1)
        return math.sqrt(sum((x - mean) ** 2 for x in logs) / max(len(logs), 1))

    def total(self, bits: int) -> float:
        """The sum over all layers at `bits`: what uniform precision is predicted to cost."""
        column = self._column(bits)
        return sum(layer.scores[column] for layer in self.layers)

    def within(self, floor: int, ceiling: int) -> list[int]:
        """The choices from `floor` to `ceiling` bits."""
        return [bits for bits in self.choices if floor <= bits <= ceiling]

    def _column(self, bits: int) -> int:
        if bits not in self.choices:
            raise ValueError(f"{bits} bits were not scored; there are {self.choices}")
        return self.choices.index(bits)

    def table(self) -> str:
        """One line a layer, one column a choice."""
        header = ("layer", "shape", *(f"{bits} bits" for bits in self.choices))
        rows = [
            (layer.key, f"{layer.shape[0]} x {layer.shape[1]}", *(f"{score:.2e}" for score in layer.scores))
            for layer in self.layers
        ]
        total = ("all of them", "", *(f"{self.total(bits):.2e}" for bits in self.choices))
        return table(header, [*rows, total])

    def __repr__(self) -> str:
        scheme = describe_scheme(self.scheme).partition(" bits ")[2]
        return (
            f"{self.model}: {self.score}, {SCORES[self.score]} ({scheme}, {self.samples} samples)\n"
            f"{self.table()}"
        )

    def plot(self, path: str | Path) -> None:
        """Writes a heat map, layer × bits, as PNG.

        Raises BackendUnavailable without matplotlib, OSError where `path` cannot be written.
        """
        picture.draw_sensitivity(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        record = asdict(self) | {"scheme": self.scheme.to_dict()}
        return {"kind": KIND, "version": VERSION} | record

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """What `to_json` wrote. Raises QuantizationFormatError for anything else."""
        return cls.from_dict(record_of(text, KIND, VERSION))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Sensitivity:
        """What `to_dict` gave. Raises QuantizationFormatError for anything else."""
        with reading("Sensitivity"):
            return cls.read(Record(dict(record)))

    @classmethod
    def read(cls, record: Record) -> Sensitivity:
        """What `to_dict` gave. Raises TypeError or ValueError that names the entry that is wrong."""
        if (score := record["score"].text()) not in SCORES:
            raise ValueError(f"{record.name} has the score {score!r}; known are {', '.join(SCORES)}")
        scheme = _scheme(record["scheme"])
        choices = tuple(_choice(choice, scheme) for choice in record["choices"].each())
        if not choices or any(low >= high for low, high in pairwise(choices)):
            raise ValueError(f"{record['choices'].name} are {choices}; numbers of bits ascend")
        layers = tuple(_layer(layer, len(choices)) for layer in record["layers"].each())
        _require_distinct(record["layers"].name, layers)
        samples, seconds = record["samples"].whole(1), record["seconds"].number()
        return cls(record["model"].text(), score, scheme, choices, layers, samples, seconds)


@dataclass(frozen=True, repr=False)
class PhasedSensitivity:
    """The result of `tq.sensitivity(…, intervals=…)`: a sensitivity an interval, all of the same layers.

    Their scores are KL a generated token, in nats: the sum over layers and intervals is what to expect.
    forwards: how many of a generation like the sequences scored fall into each interval.
    """

    phases: Phases
    parts: tuple[Sensitivity, ...]
    forwards: tuple[int, ...]

    def __repr__(self) -> str:
        named = zip(self.phases.names, self.parts, strict=True)
        return "\n".join(f"{name}: {part!r}" for name, part in named)


@overload
def sensitivity(
    model: nn.Module, batches: Iterable[Any], *, intervals: Phases, **options: Any
) -> PhasedSensitivity: ...
@overload
def sensitivity(
    model: nn.Module, batches: Iterable[Any], *, intervals: None = None, **options: Any
) -> Sensitivity: ...
def sensitivity(  # type: ignore[misc]  # the overloads leave keywords to this one
    model: nn.Module,
    batches: Iterable[Any],
    *,
    choices: Sequence[int] = CHOICES,
    scheme: Scheme | None = None,
    score: str = "fisher",
    intervals: Phases | None = None,
    granularity: str = "tensor",
    loss: Loss | Forward | None = None,
    layers: Iterable[str] = (),
    skip: Iterable[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity | PhasedSensitivity:
    """Scores each layer of `model` at each number of bits; the model is as it was afterwards.

    batches: what the model is called with, one after the other: tensors, tuples (positional) or mappings
        (keywords). They are passed over once, and nothing of them is kept.
    choices: numbers of bits, 1 to 8 each.
    scheme: how to quantize, its `bits` aside; default `tq.Scheme()`. A nested one is scored at its prefixes.
    score: "fisher": KL to second order from gradients, one backward pass for all choices. "probe": the KL
        measured with one layer quantized at a time, len(choices) forwards a layer. "error": squared error of
        the layer's output relative to that output, without gradients or a loss.
    intervals: `tq.Phases` scores each layer in each interval of a generation, in the same pass: what its
        errors at the positions of the interval do to the tokens generated. Batches are token ids (batch,
        length) of one length; with score="fisher" and the default loss.
    granularity: "tensor", or "rows:N" for blocks of N rows of each layer.
    loss: what the output means. None: next-token logits of a causal language model. `tq.Categorical(f)` or
        `tq.Gaussian(f)` with f(model, batch) the logits or the embeddings; or a function of (model, batch)
        that returns a loss summed over its samples.
    layers, skip: patterns as in `tq.quantize_`; default: the layers that it would quantize.
    seed: of the labels drawn for "fisher".

    Memory: the packed weights at all choices (less than the weights in f32), the inputs of the layers for one
    batch, and one layer's error; outputs are not kept. Parameters of other dtypes than f32 are scored in f32.

    Raises `ValueError` for choices or arguments out of range, empty batches, a loss that is NaN or infinite,
    a layer that no batch reaches, no parameter that requires a gradient ("fisher"), and where it is called
    under `torch.inference_mode`; `TypeError` for what is no model or no batches; `NoLayersMatched`.
    """
    if score not in SCORES:
        raise ValueError(f"score {score!r} is unknown; use {', '.join(map(repr, SCORES))}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, got {seed!r}")
    base = scheme if scheme is not None else Scheme()
    widths = checked_choices(choices, base)
    block = _block_rows(granularity)
    judge, source = _judge(loss, score, intervals), iterate(batches)
    found = _layers(model, at_bits(base, widths[-1]), tuple(layers), tuple(skip))
    _require_gradients(model, score)
    start = time.perf_counter()
    targets = [_Target(model, layer, base, widths, block, intervals) for layer in found]
    count = len(source) if isinstance(source, Sized) else 0
    measure = {"fisher": _fisher, "probe": _probe, "error": _error}[score]
    samples = 0
    with at_rest(model), Progress("sensitivity", count, stream=None if progress else io.StringIO()) as bar:
        for number, batch in enumerate(source):
            samples += measure(model, batch, number, targets, judge, seed)
            bar.advance()
    if not samples:
        raise ValueError("batches is empty; give at least one batch, better some thousand tokens")
    if missed := [target.layer.name for target in targets if not target.reached]:
        raise ValueError(
            f"{len(missed)} of {len(targets)} layers take no part in the "
            f"{'output' if score == 'error' else 'loss'}, {', '.join(missed[:4])} among them; leave them out "
            f"with skip=({missed[0]!r},)"
        )
    divisor = samples if score != "error" else 0
    parts = []
    for interval in range(len(intervals.names) if intervals else 1):
        scores = tuple(part for target in targets for part in target.scores(divisor, interval))
        if bad := [part.key for part in scores if not all(map(math.isfinite, part.scores))]:
            raise ValueError(
                f"the scores of {', '.join(bad[:4])} are NaN or infinite; the model's values overflow"
            )
        seconds = time.perf_counter() - start
        parts.append(Sensitivity(type(model).__name__, score, base, widths, scores, samples, seconds))
    if intervals is None:
        return parts[0]
    return PhasedSensitivity(intervals, tuple(parts), intervals.forwards(targets[0].length))


# What is scored


class _Target:
    """A layer, its weight at every choice, the sums of its scores (intervals, choices, blocks) in f64."""

    def __init__(
        self,
        model: nn.Module,
        layer: QuantizedLayer,
        scheme: Scheme,
        choices: Sequence[int],
        block: int | None,
        phases: Phases | None,
    ) -> None:
        names = (layer.name, *layer.aliases)
        modules = {id(module): module for module in map(model.get_submodule, names)}
        n, _ = layer.shape
        rows = [n] if block is None else [min(block, n - first) for first in range(0, n, block)]
        self.layer, self.choices, self.rows = layer, choices, rows
        self.variants = Variants(list(modules.values()), scheme, choices, rows)
        intervals = len(phases.names) if phases else 1
        self.sums = torch.zeros(intervals, len(choices), len(rows), dtype=torch.float64)
        self.phases, self.length = phases, 0
        self.output = 0.0
        self.reached = False

    def add(self, choice: int, values: Tensor, shape: Sequence[int] = ()) -> None:
        """Adds values (tokens, blocks), or (blocks,), to the score of a choice.

        With phases, tokens are those of an output of that `shape` (batch, length, n).
        """
        flat = values.detach().double().reshape(-1, len(self.rows)).cpu()
        if self.phases is None:
            self.sums[0, choice] += flat.sum(0)
        else:
            self.sums[:, choice].index_add_(0, self._intervals(shape), flat)
        self.reached = True

    def _intervals(self, shape: Sequence[int]) -> Tensor:
        """The interval of each token of an output."""
        assert self.phases is not None
        if len(shape) != 3 or self.length not in (0, shape[1]):
            raise ValueError(
                f"{self.layer.name} gives {tuple(shape)} where intervals need (batch, length, n) with one "
                "length for all batches; cut the batches alike, or leave the layer out with skip="
            )
        self.length = shape[1]
        return self.phases.of(shape[1]).repeat(shape[0])

    def scores(self, samples: int, interval: int) -> Iterator[LayerScores]:
        """The layer, block by block; sums are divided by `samples`, or where that is 0 by the output's."""
        means = self.sums[interval] / (samples or self.output or 1)
        first = 0
        for number, size in enumerate(self.rows):
            span = (first, first + size)
            values = tuple(means[:, number].tolist())
            yield LayerScores(self.layer.name, self.layer.shape, span, values, self.layer.aliases)
            first += size


def _judge(loss: Loss | Forward | None, score: str, phases: Phases | None) -> Loss:
    """The loss; with phases, that of the logits that a generation goes by."""
    if phases is None:
        return resolve(loss)
    if not isinstance(phases, Phases):
        raise TypeError(f"intervals must be tq.Phases(), got {phases!r}")
    if score != "fisher" or loss is not None:
        raise ValueError("intervals go with score='fisher' and the default loss, next-token logits")

    def generated(model: nn.Module, batch: Any) -> Tensor:
        output = call(model, batch)
        logits: Tensor = getattr(output, "logits", output)
        if logits.dim() != 3:
            raise TypeError(f"intervals need logits (batch, length, classes), got {tuple(logits.shape)}")
        return logits[:, phases.prompt_of(logits.shape[1]) - 1 :]

    return Categorical(generated)


def _layers(
    model: nn.Module, scheme: Scheme, layers: tuple[str, ...], skip: tuple[str, ...]
) -> tuple[QuantizedLayer, ...]:
    """What `quantize_` would quantize, checked as it checks."""
    chosen: Any = dict.fromkeys(layers, scheme) if layers else scheme
    return quantize_(model, chosen, skip=skip, dry_run=True).layers


def checked_choices(choices: Sequence[int], scheme: Scheme) -> tuple[int, ...]:
    """The choices in ascending order.

    Raises `TypeError` or `ValueError` for what are no different numbers of bits that `scheme` can have.
    """
    try:
        widths = tuple(choices)
    except TypeError as error:
        raise TypeError(f"choices must be numbers of bits, such as {CHOICES}, got {choices!r}") from error
    for bits in widths:
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise TypeError(f"choices must be numbers of bits, such as {CHOICES}, got {bits!r}")
        if not 1 <= bits <= 8:
            raise ValueError(f"choices must be 1 to 8 bits, got {bits} in {widths}")
        at_bits(scheme, bits)
    if not widths or len(set(widths)) < len(widths):
        raise ValueError(f"choices must be different numbers of bits, such as {CHOICES}, got {widths}")
    return tuple(sorted(widths))


def _block_rows(granularity: str) -> int | None:
    """The rows of a block, None for whole tensors."""
    if granularity == "tensor":
        return None
    kind, _, size = str(granularity).partition(":")
    if kind != "rows" or not size.isdecimal() or not int(size):
        raise ValueError(f"granularity is 'tensor' or 'rows:N' with N rows a block, got {granularity!r}")
    return int(size)


def _require_gradients(model: nn.Module, score: str) -> None:
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            "the model is under torch.inference_mode, where nothing can be scored; call sensitivity outside "
            "of it, with a model that was loaded outside of it"
        )
    if score == "fisher" and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"no parameter of {type(model).__name__} requires a gradient, which score='fisher' goes by; call "
            "model.requires_grad_() first, or use score='probe' or 'error'"
        )


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and its parameters at rest; both as before when the block ends."""
    training = [module for module in model.modules() if module.training]
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in moving:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


# How it is scored: each of these adds what one batch says, and returns the number of its samples.


@contextmanager
def _listening(
    targets: Sequence[_Target], hear: Callable[[_Target, nn.Module, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """`hear(target, module, input, output)` at each call of a target's modules; it may replace the output."""

    def hook(target: _Target) -> Callable[..., Tensor | None]:
        return lambda module, args, kwargs, output: hear(target, module, input_of(args, kwargs), output)

    with ExitStack() as handles:
        for target in targets:
            for module in target.variants.modules:
                handles.enter_context(module.register_forward_hook(hook(target), with_kwargs=True))
        yield


def _fisher(
    model: nn.Module, batch: Any, number: int, targets: Sequence[_Target], judge: Loss, seed: int
) -> int:
    root = torch.zeros((), requires_grad=True)  # gradients reach each layer's output, and no parameter
    samples = 0

    def hear(target: _Target, module: nn.Module, input: Tensor, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # the first pass of a checkpointed block; the second one counts
            return None
        input, version = input.detach(), input._version
        rooted = output if output.requires_grad else output + root.to(output)
        # `score` must not hold what holds it: the output.
        shape, sequences = output.shape, len(output) if output.dim() > 2 else 0

        def score(gradient: Tensor) -> None:
            if input._version != version:
                raise ValueError(
                    f"{target.layer.name}: its input was overwritten in place before the backward pass; use "
                    "score='probe', or keep the input"
                )
            for choice, error in enumerate(target.variants.outputs(module, input)):
                inner = target.variants.by_rows(error.mul_(gradient))
                if sequences == samples and target.phases is None:
                    inner = inner.view(samples, -1, inner.shape[1]).sum(1)
                target.add(choice, inner.square().mul_(0.5), shape)

        rooted.register_hook(score)  # type: ignore[no-untyped-call]  # untyped in torch
        return rooted

    with torch.enable_grad(), _listening(targets, hear):
        loss, samples = judge.sample(model, batch, seed + number)
        _require_finite(float(loss.detach()), number)
        if loss.requires_grad:  # else no layer is reached, which is said at the end
            torch.autograd.backward(loss)
    return samples


@torch.no_grad()
def _probe(
    model: nn.Module, batch: Any, number: int, targets: Sequence[_Target], judge: Loss, seed: int
) -> int:
    original = judge.outputs(model, batch)
    _require_finite(float(original.sum()), number)
    for target in targets:
        blocks = len(target.rows)
        for choice, bits in enumerate(target.choices):
            found = []
            for block in range(blocks):
                alone = [bits if other == block else None for other in range(blocks)]
                with target.variants.swapped(alone):
                    found.append(judge.divergence(original, judge.outputs(model, batch)))
            if any(found):  # else, as far as this batch tells, the layer takes no part in the loss
                target.add(choice, torch.tensor(found))
    return 1 if original.dim() == 0 else len(original)


@torch.no_grad()
def _error(
    model: nn.Module, batch: Any, number: int, targets: Sequence[_Target], judge: Loss, seed: int
) -> int:
    def hear(target: _Target, module: nn.Module, input: Tensor, output: Tensor) -> None:
        _require_finite(float(output.sum()), number)
        target.output += float(output.double().square().sum())
        for choice, error in enumerate(target.variants.outputs(module, input)):
            target.add(choice, target.variants.by_rows(error.square_()))

    with _listening(targets, hear):
        call(model, batch)
    return 1


def _require_finite(value: float, number: int) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"batch {number} gives {value}, which is not finite; look for NaN and infinities in weights and "
            "inputs, or leave the batch out"
        )


# Records


def _scheme(record: Record) -> Scheme:
    try:
        return Scheme.from_dict(record.value)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{record.name}: {error}") from error


def _choice(record: Record, scheme: Scheme) -> int:
    """A number of bits that the scheme can have."""
    bits = record.whole(1, 8)
    try:
        at_bits(scheme, bits)
    except ValueError as error:
        raise ValueError(f"{record.name}: {error}") from error
    return bits


def _layer(record: Record, choices: int) -> LayerScores:
    n, k = (size.whole(0) for size in record["shape"].each(2))
    first, last = (row.whole(0, n) for row in record["rows"].each(2))
    if first > last:
        raise ValueError(f"{record['rows'].name} end at {last}, before they begin at {first}")
    scores = tuple(score.number() for score in record["scores"].each(choices))
    aliases = tuple(alias.text() for alias in record["aliases"].each())
    return LayerScores(record["name"].text(), (n, k), (first, last), scores, aliases)


def _require_distinct(name: str, layers: Sequence[LayerScores]) -> None:
    """Refuses layers that share a name: only the rows of one layer do, and their blocks differ."""
    if not layers:
        raise ValueError(f"{name} are none")
    owners: dict[str, str] = {}
    keys: set[str] = set()
    for layer in layers:
        if layer.key in keys:
            raise ValueError(f"{name} hold {layer.key!r} twice")
        keys.add(layer.key)
        for own in (layer.name, *layer.aliases):
            if owners.setdefault(own, layer.name) != layer.name:
                raise ValueError(f"{name} hold {own!r} twice, as {owners[own]!r} and as {layer.name!r}")
