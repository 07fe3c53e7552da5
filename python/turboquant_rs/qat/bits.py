"""Learnable bits: real numbers while training, on the surface of the budget; whole ones afterwards.

    θ of each layer ── + μ, the same for all ──► bits b(θ), Σ n·b = budget ──► noise of width Δ(b) ──► loss
                                                       └── settle: the whole bits nearest, in what they cost

The step Δ(b) falls by half with each bit, so the noise tells the loss what a bit is worth, and its gradient
reaches b (Défossez, Adi and Synnaeve 2022, "Differentiable Model Compression via Pseudo Quantization Noise").
There the size is a penalty with a weight of its own; here μ(θ) keeps every step on the budget, and gradients
follow its surface: db/dθ = 1 − n / Σn.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from turboquant_rs import ops
from turboquant_rs.precision import Budget
from turboquant_rs.precision.variants import at_bits

if TYPE_CHECKING:
    from .layers import Prepared

FLOOR, CEILING = 2, 8
CHOICES = tuple(range(FLOOR, CEILING + 1))


class LearnedBits:
    """The bits of all layers of a model under one budget."""

    def __init__(self, layers: Sequence[Sequence[Prepared]], budget: Budget) -> None:
        """`layers`: those that share a weight together. Raises `ValueError` for a budget they cannot meet."""
        self._layers = [[weakref.ref(layer) for layer in group] for group in layers]
        shapes = [tuple(group[0].logical.shape) for group in layers]
        self._elements = torch.tensor([float(n * k) for n, k in shapes], dtype=torch.float64)
        schemes = [group[0].scheme for group in layers]
        self._costs = np.array(
            [
                [at_bits(scheme, bits).nbytes(n, k) for bits in CHOICES]
                for scheme, (n, k) in zip(schemes, shapes, strict=True)
            ],
            dtype=np.uint64,
        )
        total = float(self._elements.sum())
        self.nbytes = int(budget.bits * total / 8) if budget.bits is not None else int(budget.bytes or 0)
        least, most = int(self._costs[:, 0].sum()), int(self._costs[:, -1].sum())
        if not least <= self.nbytes <= most:
            raise ValueError(
                f"a budget of {self.nbytes} bytes is infeasible: {len(layers)} layers of {FLOOR} to "
                f"{CEILING} bits take {least} to {most} "
                f"bytes ({8 * least / total:.4f} to {8 * most / total:.4f} bits "
                "an element)"
            )
        overhead = float(least) - FLOOR * total / 8
        self._mean = (self.nbytes - overhead) * 8 / total
        device = layers[0][0].weight.device
        self._theta = [nn.Parameter(torch.tensor(self._mean, device=device)) for _ in layers]
        self._settled: tuple[tuple[float, ...], tuple[int, ...]] = ((), ())  # real bits, and the whole ones
        self._known: tuple[tuple[int, ...], Tensor] | None = None  # versions of θ, and their μ

    @classmethod
    def attach(cls, layers: Sequence[Sequence[Prepared]], budget: Budget) -> LearnedBits:
        """Gives each layer its Parameter `weight_bits`."""
        bits = cls(layers, budget)
        for place, (group, theta) in enumerate(zip(layers, bits._theta, strict=True)):
            for layer in group:
                layer.weight_bits, layer.qat.bits, layer.qat.place = theta, bits, place
        return bits

    def join(self, layer: Prepared) -> None:
        """Takes in a copy of a layer, in its place; for copies of the model, whose bits know no layer yet."""
        self._layers[layer.qat.place].append(weakref.ref(layer))

    def __getstate__(self) -> dict[str, Any]:
        """All but the layers, which a copy or a pickle may hold in part: those that are in it join."""
        return vars(self) | {"_layers": [[] for _ in self._layers], "_theta": self.theta, "_known": None}

    @property
    def theta(self) -> list[nn.Parameter]:
        """θ of each layer, its Parameter `weight_bits`; of a layer that is gone, the last one."""
        for place, group in enumerate(self._layers):
            for reference in group:
                if (layer := reference()) is not None and layer.weight_bits is not None:
                    self._theta[place] = layer.weight_bits
        return self._theta

    def _offset(self, theta: Tensor) -> Tensor:
        """μ with Σ n · clamp(θ + μ) = n̄ · budget, by bisection."""
        low, high = FLOOR - theta.max(), CEILING - theta.min()
        for _ in range(50):
            middle = (low + high) / 2
            mean = (self._elements * (theta + middle).clamp(FLOOR, CEILING)).sum() / self._elements.sum()
            low, high = (middle, high) if mean < self._mean else (low, middle)
        return (low + high) / 2

    def _require_finite(self, theta: Tensor) -> None:
        """One θ that is not finite makes μ so, and with it the bits of every layer."""
        for group, finite in zip(self._layers, theta.isfinite().tolist(), strict=True):
            if not finite:
                name = next((layer.qat.name for ref in group if (layer := ref()) is not None), "a layer")
                raise ValueError(
                    f"the learned bits of {name} are NaN or infinite: training has diverged; go back to a "
                    "checkpoint, and lower the rate or clip gradients"
                )

    def real(self) -> Tensor:
        """The bits (layers,) as they are learned, f64, differentiable.

        Raises `ValueError` where a θ is NaN or infinite.
        """
        parameters = self.theta
        theta = torch.stack(list(parameters)).cpu().double()
        versions = tuple(version for p in parameters for version in (p._version, p.data_ptr()))
        if self._known is None or self._known[0] != versions:
            self._require_finite(theta.detach())
            self._known = (versions, self._offset(theta.detach()))
        offset = self._known[1]
        free = ((theta + offset).detach() - (FLOOR + CEILING) / 2).abs() < (CEILING - FLOOR) / 2
        weights = self._elements * free
        drift = (weights * (theta - theta.detach())).sum() / weights.sum().clamp(min=1)
        return (theta + offset - drift).clamp(FLOOR, CEILING)

    def of(self, layer: Prepared) -> Tensor:
        """The bits of one layer, 0-d f32 on its device."""
        return self.real()[layer.qat.place].to(layer.weight.device, torch.float32)

    def settle(self) -> tuple[int, ...]:
        """Whole bits within the budget, given to the layers as their scheme.

        At the optimum a layer's loss is c·4^−b with n·4^b ∝ c·(a common factor), so those whole bits are
        chosen that cost least of Σ n·4^(b − whole), by the solver of `tq.allocate`.
        """
        real = tuple(self.real().detach().tolist())
        if real != self._settled[0]:
            scores = np.array(
                [
                    [n * 4.0 ** (b - w) for w in CHOICES]
                    for n, b in zip(self._elements.tolist(), real, strict=True)
                ]
            )
            chosen = ops.cpu.allocate(self._costs.reshape(-1), scores.reshape(-1), len(CHOICES), self.nbytes)
            self._settled = (real, tuple(CHOICES[choice] for choice in chosen))
        for group, bits in zip(self._layers, self._settled[1], strict=True):
            for reference in group:
                if (layer := reference()) is not None and layer.scheme.bits != bits:
                    layer.set_scheme(at_bits(layer.scheme, bits))
        return self._settled[1]
