"""`turboquant-rs demo`: quantize a real sentence encoder and say what that costs it.

The encoder is all-MiniLM-L6-v2 where the extra `demo` is installed, else a small one trained on the spot.
`run` measures and returns a `DemoResult`; nothing here prints.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from turboquant_rs.demo.encoder import TRAINING_STEPS, Encoder, load_minilm, train_small_encoder
from turboquant_rs.demo.picture import NO_MATPLOTLIB, can_draw, draw
from turboquant_rs.demo.sentences import SOURCE, library_sentences
from turboquant_rs.errors import BackendUnavailable
from turboquant_rs.nn import QuantLinear, quantize_
from turboquant_rs.packed import pack
from turboquant_rs.progress import Progress
from turboquant_rs.quality import EmbeddingQuality, compare_embeddings
from turboquant_rs.scheme import Scheme
from turboquant_rs.table import human_bytes, table

__all__ = ["DemoResult", "Encoder", "Measured", "library_sentences", "load_minilm", "run", "sweep"]

MIN_SENTENCES = 200
CORPUS_SENTENCES = 1024  # that the small encoder is trained on
BATCH = 32
SCHEMES: dict[str, Callable[[int], Scheme]] = {
    "extreme scale (the default)": lambda bits: Scheme(bits=bits),
    "mse-searched scale": lambda bits: Scheme(bits=bits, scale="mse"),
    "asymmetric": lambda bits: Scheme(bits=bits, symmetric=False),
}
NESTED = "one nested 8-bit pack, read at 4 and at 8"

Curves = dict[str, list[tuple[int, EmbeddingQuality]]]


@dataclass(frozen=True)
class Measured:
    """One quantized copy of the encoder. Latencies are medians in milliseconds, sizes bytes."""

    scheme: Scheme
    linear_bytes: int
    model_bytes: int
    weights_only: EmbeddingQuality
    int8_activations: EmbeddingQuality
    one_ms: float
    batch_ms: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured; `str()` is the report for people, `to_dict()` the one for programs."""

    model: str
    origin: str
    notes: tuple[str, ...]
    sentences: int
    linear_layers: int
    linear_bytes: int
    model_bytes: int
    one_ms: float
    batch_ms: float
    threads: int
    measured: tuple[Measured, ...]
    curves: Curves
    picture: str | None

    def to_dict(self) -> dict[str, object]:
        """Everything, as plain values."""
        result = asdict(self)
        result["source"] = SOURCE
        result["measured"] = [asdict(m) | {"scheme": m.scheme.to_dict()} for m in self.measured]
        result["curves"] = {
            name: [{"bits": bits} | quality.to_dict() for bits, quality in curve]
            for name, curve in self.curves.items()
        }
        return result

    def __str__(self) -> str:
        lines = [f"{self.model} ({self.origin}), {self.sentences} {SOURCE}", *self.notes]
        lines += ["", self._sizes(), "", self._quality(), "", *(self._verdict(m) for m in self.measured)]
        lines.append(self._speed())
        if self.picture:
            lines += ["", f"picture: {self.picture}"]
        return "\n".join(lines)

    def _sizes(self) -> str:
        rows = [["f32", human_bytes(self.linear_bytes), "", human_bytes(self.model_bytes)]]
        rows[0] += [f"{self.one_ms:.1f} ms", f"{self.batch_ms:.0f} ms"]
        for m in self.measured:
            ratio = f"{self.linear_bytes / m.linear_bytes:.2f}×"
            row = [f"{m.scheme.bits} bits", human_bytes(m.linear_bytes), ratio, human_bytes(m.model_bytes)]
            rows.append([*row, f"{m.one_ms:.1f} ms", f"{m.batch_ms:.0f} ms"])
        header = ["", f"{self.linear_layers} linear layers", "smaller", "whole model"]
        return table([*header, "1 sentence", f"{BATCH} sentences"], rows)

    def _quality(self) -> str:
        header = ["against f32", "mean cosine", "worst", "10 nearest kept", "same nearest"]
        rows = []
        for m in self.measured:
            pairs = (("weights only", m.weights_only), ("int8 activations", m.int8_activations))
            for what, q in pairs:
                row = [f"{m.scheme.bits} bits, {what}", f"{q.mean_cosine:.4f}", f"{q.min_cosine:.4f}"]
                rows.append([*row, f"{q.overlap:.1%}", f"{q.same_nearest:.1%}"])
        return table(header, rows)

    def _speed(self) -> str:
        """One plain sentence: what packing does to the latency here."""
        ratios = [
            f"{m.scheme.bits} bits {m.one_ms / self.one_ms:.2f}× (1 sentence), "
            f"{m.batch_ms / self.batch_ms:.2f}× ({BATCH})"
            for m in self.measured
        ]
        return f"Time of f32 = 1, with int8 activations on {self.threads} threads: {'; '.join(ratios)}."

    def _verdict(self, m: Measured) -> str:
        """One plain sentence: what these bits cost this model."""
        q = m.int8_activations
        facts = (
            f"mean cosine {q.mean_cosine:.4f}, {1 - q.overlap:.1%} of the nearest neighbours change, "
            f"{1 - q.same_nearest:.1%} of the sentences get another nearest one"
        )
        if q.mean_cosine >= 0.999:
            return f"{m.scheme.bits} bits cost {self.model} next to nothing: {facts}."
        if q.mean_cosine >= 0.99:
            return f"{m.scheme.bits} bits cost {self.model} little: {facts}."
        return (
            f"{m.scheme.bits} bits cost {self.model} visibly: {facts}. For search over many near "
            "duplicates take more bits; for coarse clustering it will do."
        )


def run(sentences: int = 256, picture: Path | None = None, package: bool = True) -> DemoResult:
    """Runs the whole demo on `sentences` sentences; `package=False` trains the small encoder in any case.

    The picture is written to `picture` if given; without matplotlib a note says why there is none.
    Raises ValueError for fewer than 200 sentences, OSError where the picture cannot be written.
    """
    if sentences < MIN_SENTENCES:
        raise ValueError(
            f"{sentences} sentences are too few for steady figures; use at least {MIN_SENTENCES}"
        )
    if picture and not picture.parent.is_dir():
        raise FileNotFoundError(f"{picture.parent} is no directory; create it before drawing {picture}")
    texts = library_sentences(sentences)
    encoder, notes = _encoder(package)
    if picture and not can_draw():
        notes.append(f"No picture was drawn: {NO_MATPLOTLIB}.")
        picture = None
    linear_layers = [m for m in encoder.model.modules() if isinstance(m, nn.Linear)]
    linear_bytes = sum(m.weight.nbytes for m in linear_layers)
    model_bytes = _nbytes(encoder.model)
    reference = _encode(encoder, texts, "f32")
    schemes = [Scheme(bits=bits) for bits in (8, 4)]
    copies = [_quantized(encoder, scheme) for scheme in schemes]
    latencies = _latencies([encoder, *copies], texts)
    measured = tuple(
        _measure(quantized, reference, texts, scheme, latency)
        for quantized, scheme, latency in zip(copies, schemes, latencies[1:], strict=True)
    )
    curves = sweep(encoder, texts, reference) if picture else {}
    if picture:
        subtitle = f"{sentences} {SOURCE} · groups of 64, weights only · band: 5 % to 95 % of the sentences"
        draw(curves, picture, f"What fewer bits cost {encoder.name}", subtitle)
    return DemoResult(
        encoder.name, encoder.origin, tuple(notes), sentences, len(linear_layers), linear_bytes, model_bytes,
        *latencies[0], torch.get_num_threads(), measured, curves, str(picture) if picture else None,
    )  # fmt: skip


def sweep(
    encoder: Encoder, texts: Sequence[str], reference: torch.Tensor, bits: Sequence[int] = range(2, 9)
) -> Curves:
    """Quality against bits, weights only: `SCHEMES` at each width, and the prefixes of the nested one.

    `reference`: the f32 embeddings (sentences, width) of `texts`.
    """
    copy_ = Encoder(encoder.name, encoder.origin, copy.deepcopy(encoder.model), encoder.tokenize)
    curves: Curves = {}
    jobs = [(name, scheme(b), b) for name, scheme in SCHEMES.items() for b in bits]
    jobs += [(NESTED, Scheme.nested(), b) for b in (4, 8)]
    with Progress("error against bits", len(jobs)) as progress:
        for name, scheme, read in jobs:
            _round_weights(encoder.model, copy_.model, scheme, read)
            curves.setdefault(name, []).append((read, compare_embeddings(reference, copy_.encode(texts))))
            progress.advance(note=f"{name}, {read} bits")
    return curves


@torch.no_grad()
def _round_weights(source: nn.Module, target: nn.Module, scheme: Scheme, bits: int) -> None:
    """Gives every linear layer of `target` the weight of `source` after a trip through `scheme` at `bits`."""
    for original, rounded in zip(source.modules(), target.modules(), strict=True):
        if isinstance(original, nn.Linear) and isinstance(rounded, nn.Linear):
            rounded.weight.copy_(pack(original.weight, scheme=scheme).dequantize(bits))


def _encoder(package: bool) -> tuple[Encoder, list[str]]:
    """MiniLM, or the small encoder and a note that says why."""
    try:
        if package:
            return load_minilm(), []
        reason = "The small encoder was asked for"
    except BackendUnavailable as error:
        reason = f"MiniLM cannot be had here ({error})"
    corpus = library_sentences(CORPUS_SENTENCES)
    with Progress("train a small encoder", TRAINING_STEPS) as progress:
        encoder = train_small_encoder(corpus, each=progress.update)
    note = f"{reason}: a small encoder was trained instead; its figures say nothing about MiniLM."
    return encoder, [note]


def _quantized(encoder: Encoder, scheme: Scheme) -> Encoder:
    model = copy.deepcopy(encoder.model)
    quantize_(model, scheme, progress=False)
    return Encoder(encoder.name, encoder.origin, model, encoder.tokenize)


def _measure(
    encoder: Encoder,
    reference: torch.Tensor,
    texts: Sequence[str],
    scheme: Scheme,
    latency: tuple[float, float],
) -> Measured:
    layers = [m for m in encoder.model.modules() if isinstance(m, QuantLinear)]
    int8 = compare_embeddings(reference, _encode(encoder, texts, f"{scheme.bits} bits, int8 activations"))
    for layer in layers:
        layer.activations = "float"
    weights = compare_embeddings(reference, _encode(encoder, texts, f"{scheme.bits} bits, weights only"))
    linear_bytes = sum(layer.packed.nbytes for layer in layers)
    return Measured(scheme, linear_bytes, _nbytes(encoder.model), weights, int8, *latency)


def _encode(encoder: Encoder, texts: Sequence[str], label: str) -> torch.Tensor:
    with Progress(f"encode ({label})", len(texts)) as progress:
        return encoder.encode(texts, each=progress.update)


def _nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers."""
    return sum(value.nbytes for value in model.state_dict().values())


def _latencies(encoders: Sequence[Encoder], texts: Sequence[str]) -> list[tuple[float, float]]:
    """Median milliseconds of one sentence and of a batch for each encoder, measured turn by turn."""
    one = encoders[0].tokenize(texts[:1])
    batch = encoders[0].tokenize(texts[:BATCH])
    rounds = {"one": (one, 30), "batch": (batch, 8)}
    times: dict[str, list[list[float]]] = {name: [[] for _ in encoders] for name in rounds}
    with Progress("latency", sum(count for _, count in rounds.values())) as progress:
        for name, (tokens, count) in rounds.items():
            for _ in range(count):
                for encoder, mine in zip(encoders, times[name], strict=True):
                    start = time.perf_counter()
                    encoder.forward(*tokens)
                    mine.append(1000 * (time.perf_counter() - start))
                progress.advance()
    return [
        (statistics.median(a), statistics.median(b))
        for a, b in zip(times["one"], times["batch"], strict=True)
    ]
