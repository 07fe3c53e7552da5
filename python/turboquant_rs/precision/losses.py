"""What a model is scored by: the distribution its output stands for.

A loss draws labels from the model itself and gives their negative log-likelihood: the second moment of its
gradients is then the Fisher information, and half the quadratic form of that is KL(p ‖ p̂) to second order
(Kullback, "Information Theory and Statistics", 1959, ch. 2). Labels of a data set would give another matrix
(Kunstner, Balles and Hennig, "Limitations of the empirical Fisher approximation", 2019).

    Categorical   logits: classes, tokens           KL(softmax ‖ softmax)
    Gaussian      embeddings, N(output, 1)          KL = ½ ‖output − other‖²; for unit vectors 1 − cosine
    a function    (model, batch) -> 0-d tensor      a loss with labels of its own, and how much it rises
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Tensor]
"""(model, batch) to the output that the distribution is made of."""


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def logits(model: nn.Module, batch: Any) -> Tensor:
    """The logits (positions, classes) of a model: its output, or the `logits` of that.

    Positions that an `attention_mask` in the batch marks with 0 are left out.
    """
    output = call(model, batch)
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.dim() < 2 or not found.is_floating_point():
        raise TypeError(
            f"{type(model).__name__} returns {type(output).__name__} without logits (..., classes); say how "
            "it is scored: loss=tq.Categorical(lambda model, batch: logits), or tq.Gaussian for embeddings"
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == found.shape[:-1]:
        return found[mask.bool()]
    return found.flatten(0, -2)


@dataclass(frozen=True)
class Categorical:
    """Logits `(..., classes)`, each vector a distribution over classes."""

    forward: Forward = logits

    def sample(self, model: nn.Module, batch: Any, seed: int) -> tuple[Tensor, int]:
        """−Σ log p(y) with each y drawn from p, in nats, and the number of distributions."""
        scores = torch.log_softmax(self.outputs(model, batch), dim=-1)
        generator = torch.Generator(scores.device).manual_seed(seed)
        weights = scores.detach().exp()
        if not bool(weights.isfinite().all()):
            return scores.sum(), len(scores)  # the caller refuses it
        drawn = torch.multinomial(weights, 1, generator=generator)
        return -scores.gather(1, drawn).sum(), len(scores)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits (distributions, classes) in f32."""
        found = self.forward(model, batch).float()
        return found.reshape(-1, found.shape[-1])

    def divergence(self, original: Tensor, other: Tensor) -> float:
        """Σ KL(original ‖ other) in nats."""
        p, q = (torch.log_softmax(x, dim=-1) for x in (original, other))
        return float((p.exp() * (p - q)).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Gaussian:
    """Vectors `(..., width)`, each the mean of a normal distribution with variance 1 in every direction."""

    forward: Forward

    def sample(self, model: nn.Module, batch: Any, seed: int) -> tuple[Tensor, int]:
        """A scalar whose gradient is that of −Σ log p(y), each y drawn from p, and the number of vectors."""
        vectors = self.outputs(model, batch)
        generator = torch.Generator(vectors.device).manual_seed(seed)
        noise = torch.randn(vectors.shape, generator=generator, device=vectors.device)
        return (vectors * noise).sum(), len(vectors)  # ∂/∂μ of ½ ‖y − μ‖² is μ − y, a normal draw

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Vectors (count, width) in f32."""
        found = self.forward(model, batch).float()
        return found.reshape(-1, found.shape[-1])

    def divergence(self, original: Tensor, other: Tensor) -> float:
        """Σ ½ ‖original − other‖²."""
        return float((original - other).double().square().sum()) / 2


@dataclass(frozen=True)
class Scalar:
    """The loss of a function of the user's, summed over a batch, with labels of its own."""

    forward: Forward

    def sample(self, model: nn.Module, batch: Any, seed: int) -> tuple[Tensor, int]:
        """The loss itself; a batch counts as one."""
        return self.outputs(model, batch), 1

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss, 0-d. Raises TypeError for anything else."""
        found = self.forward(model, batch)
        if not isinstance(found, Tensor) or found.numel() != 1:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"loss returns {what}; a function returns one number, loss=tq.Categorical(function) takes "
                "its logits (..., classes), loss=tq.Gaussian(function) its embeddings (..., width)"
            )
        return found.float().reshape(())

    def divergence(self, original: Tensor, other: Tensor) -> float:
        """How much the loss rises."""
        return float(other) - float(original)


Loss = Categorical | Gaussian | Scalar


def resolve(loss: Loss | Forward | None) -> Loss:
    """The loss that the argument `loss` stands for: None is that of causal language models."""
    if loss is None:
        return Categorical()
    if isinstance(loss, Categorical | Gaussian | Scalar):
        return loss
    if not callable(loss):
        raise TypeError(f"loss must be a function (model, batch) -> tensor or None, got {loss!r}")
    return Scalar(loss)


def iterate(batches: Any) -> Iterable[Any]:
    """`batches` to iterate over. Raises TypeError for a single batch in its place."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; give a list of batches: [batch] for one")
    return batches
