"""How far a quantized model is from its original: pure measures, nothing here loads or quantizes a model.

Encoders are compared by their embeddings (`compare_embeddings`), language models by the distributions they
predict (`compare_logits`, `perplexity`), tensors by `Distance`, which is summed up block by block so that no
two tensors need to be in memory whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Distance",
    "EmbeddingQuality",
    "LanguageQuality",
    "compare_embeddings",
    "compare_logits",
    "log_probabilities",
    "perplexity",
    "windows",
]


PIECE = 1 << 15
"""Elements summed in f32 before f64 takes over: in cache, precise, too few for torch to wake its threads."""


@dataclass
class Distance:
    """The distance of `other` from `original`, accumulated over blocks in f64."""

    signal: float = field(default=0.0, repr=False)
    other: float = field(default=0.0, repr=False)
    noise: float = field(default=0.0, repr=False)
    max_error: float = 0.0

    def update(self, original: Tensor, other: Tensor) -> None:
        """Adds one pair of equally shaped blocks (any real dtype; the differences are taken in f32)."""
        pieces = zip(_pieces(original), _pieces(other), strict=True)
        for a, b in ((x.float(), y.float()) for x, y in pieces if x.numel()):
            error = a - b
            self.signal += _square(a)
            self.other += _square(b)
            self.noise += _square(error)
            low, high = error.aminmax()
            self._raise_max_error(max(-float(low), float(high)))

    def _raise_max_error(self, value: float) -> None:
        if math.isnan(value) or value > self.max_error:  # a NaN, once there, stays: nothing is above it
            self.max_error = value

    def merge(self, more: Distance) -> None:
        """Adds the sums of another accumulator, for totals over tensors."""
        self.signal += more.signal
        self.other += more.other
        self.noise += more.noise
        self._raise_max_error(more.max_error)

    @property
    def sqnr_db(self) -> float:
        """10·log10(Σx² / Σ(x − x̂)²) in dB; infinite for equal tensors."""
        if math.isnan(self.noise) or math.isnan(self.signal):
            return math.nan
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two tensors seen as vectors (1 for two zero tensors)."""
        norm = math.sqrt(self.signal) * math.sqrt(self.other)
        inner = (self.signal + self.other - self.noise) / 2  # 2·a·b = a² + b² − (a − b)²
        return inner / norm if norm else float(self.signal == self.other)

    def to_dict(self) -> dict[str, float]:
        """The three figures people read: `sqnr_db`, `cosine`, `max_error`."""
        return {"sqnr_db": self.sqnr_db, "cosine": self.cosine, "max_error": self.max_error}


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x.flatten(), PIECE)


def _square(x: Tensor) -> float:
    """Σx², by the reduction that leaves other threads asleep (torch.dot may wake MKL's)."""
    return float(torch.linalg.vector_norm(x)) ** 2


@dataclass(frozen=True)
class EmbeddingQuality:
    """Embeddings of a quantized encoder against those of the original, over the same sentences.

    `cosines` are per sentence; `overlap` is the mean share of the `neighbours` nearest other sentences that
    both encoders agree on; `same_nearest` is the share of sentences whose single nearest one is the same.
    """

    mean_cosine: float
    min_cosine: float
    p05_cosine: float
    p95_cosine: float
    neighbours: int
    overlap: float
    same_nearest: float

    def to_dict(self) -> dict[str, float]:
        """All fields, for JSON."""
        return asdict(self)


def compare_embeddings(original: Tensor, quantized: Tensor, neighbours: int = 10) -> EmbeddingQuality:
    """Compares two (sentences, width) embedding matrices row by row and by who is whose neighbour.

    Raises ValueError if the shapes differ or there are too few sentences to have that many neighbours.
    """
    if original.shape != quantized.shape or original.dim() != 2:
        raise ValueError(
            f"embeddings must be two (sentences, width) matrices of one shape, got {tuple(original.shape)} "
            f"and {tuple(quantized.shape)}; encode the same sentences with both models"
        )
    if len(original) <= neighbours:
        raise ValueError(
            f"{len(original)} sentences cannot have {neighbours} neighbours each; "
            f"give more than {neighbours} sentences or a smaller `neighbours`"
        )
    cosines = F.cosine_similarity(original.double(), quantized.double(), dim=1)
    low, high = torch.quantile(cosines, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    theirs, ours = _nearest(original, neighbours), _nearest(quantized, neighbours)
    shared = (theirs.unsqueeze(2) == ours.unsqueeze(1)).any(2).double().mean()
    return EmbeddingQuality(
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        p05_cosine=low,
        p95_cosine=high,
        neighbours=neighbours,
        overlap=float(shared),
        same_nearest=float((theirs[:, 0] == ours[:, 0]).double().mean()),
    )


def _nearest(embeddings: Tensor, count: int) -> Tensor:
    """Indices (sentences, count) of the nearest other rows by cosine, nearest first."""
    unit = F.normalize(embeddings.double(), dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-math.inf)
    return similarity.topk(count, dim=1).indices


Predict = Callable[[Tensor], Tensor]
"""Token ids (1, length) to logits (1, length, vocabulary)."""


@dataclass(frozen=True)
class LanguageQuality:
    """Predictions of a quantized language model against those of the original, over the same tokens."""

    kl: float
    """Mean KL(original ‖ quantized) of the next-token distributions, in nats."""
    same_top1: float
    """Share of positions where both put the same token first."""
    perplexity_ratio: float
    """Perplexity of the quantized model over that of the original."""
    perplexity: float

    def to_dict(self) -> dict[str, float]:
        """All fields, for JSON."""
        return asdict(self)


def windows(tokens: Tensor, count: int, length: int = 512) -> Tensor:
    """The first `count` windows (count, length) of a 1-D token tensor; nothing is carried between windows.

    Raises ValueError if there are too few tokens.
    """
    if tokens.numel() < count * length:
        raise ValueError(
            f"{count} windows of {length} tokens need {count * length} tokens, got {tokens.numel()}; "
            "give a longer text or fewer windows"
        )
    return tokens[: count * length].view(count, length)


def compare_logits(original: Iterable[Tensor], predict: Predict, texts: Tensor) -> LanguageQuality:
    """Compares a model with the recorded log-probabilities of its original.

    `texts`: (windows, length) token ids; `original`: one (length − 1, vocabulary) f32 log-probability matrix
    a window, as `log_probabilities` gives them; `predict`: the quantized model.
    """
    kl = same = ours = theirs = 0.0
    positions = 0
    for reference, window in zip(original, texts, strict=True):
        candidate = log_probabilities(predict, window)
        target = window[1:].unsqueeze(1)
        kl += float((reference.exp() * (reference - candidate)).sum(dtype=torch.float64))
        same += float((reference.argmax(1) == candidate.argmax(1)).sum())
        theirs -= float(reference.gather(1, target).sum(dtype=torch.float64))
        ours -= float(candidate.gather(1, target).sum(dtype=torch.float64))
        positions += target.numel()
    return LanguageQuality(
        kl=kl / positions,
        same_top1=same / positions,
        perplexity_ratio=math.exp((ours - theirs) / positions),
        perplexity=math.exp(ours / positions),
    )


def log_probabilities(predict: Predict, window: Tensor) -> Tensor:
    """Log-probabilities (length − 1, vocabulary) in f32 of all tokens of `window` (length,) but the first."""
    with torch.inference_mode():
        return torch.log_softmax(predict(window.unsqueeze(0))[0, :-1].float(), dim=1)


def perplexity(predict: Predict, texts: Tensor, each: Callable[[int], None] = lambda done: None) -> float:
    """exp of the mean negative log-likelihood over `texts` (windows, length); `each` hears of each."""
    total, positions = 0.0, 0
    for done, window in enumerate(texts, 1):
        scores = log_probabilities(predict, window)
        total -= float(scores.gather(1, window[1:].unsqueeze(1)).sum(dtype=torch.float64))
        positions += len(window) - 1
        each(done)
    return math.exp(total / positions)
