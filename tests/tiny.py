"""A language model small enough to be scored, probed and quantized in a test."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import nn

import turboquant_rs as tq

WORDS, WIDTH, LENGTH = 48, 64, 24


class Block(nn.Module):
    """A causal mean of values in place of attention, then an MLP."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 96)
        self.down = nn.Linear(96, WIDTH, bias=False)
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device).view(1, -1, 1)
        x = x + self.weight * self.v_proj(x).cumsum(1) / count * torch.sigmoid(self.q_proj(x))
        return x + self.weight * self.down(torch.relu(self.up(x)))


class LanguageModel(nn.Module):
    """Tokens (batch, length) to logits (batch, length, WORDS); the first block weighs more than the last."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(1.5), Block(0.6), Block(0.2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            nn.init.normal_(self.embed.weight, std=0.1)  # as large as before, a token would predict itself
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.lm_head(self.norm(x))
        return logits


LAYERS = [f"blocks.{i}.{name}" for i in range(3) for name in ("q_proj", "v_proj", "up", "down")]


def batches(count: int = 4) -> list[torch.Tensor]:
    """Token ids (4, LENGTH), `count` times."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, WORDS, (4, LENGTH), generator=generator) for _ in range(count)]


@cache
def scored(score: str = "fisher", granularity: str = "tensor", **options: object) -> tq.Sensitivity:
    """The sensitivity of a LanguageModel; measured once."""
    return tq.sensitivity(
        LanguageModel(), batches(), score=score, granularity=granularity, progress=False, **options
    )


def state(model: nn.Module) -> tuple[object, ...]:
    """All that scoring could change about a model."""
    return (
        {name: (type(module), id(module), module.training) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()},
        [len(module._forward_hooks) for module in model.modules()],
        {name: value.tolist() for name, value in copy.deepcopy(model.state_dict()).items()},
    )


def divergence(original: nn.Module, other: nn.Module) -> float:
    """Mean KL(original ‖ other) over the batches, in nats."""
    loss = tq.Categorical()
    with torch.no_grad():
        pairs = [(loss.outputs(original, b), loss.outputs(other, b)) for b in batches()]
    return sum(loss.divergence(a, b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


class Ends(nn.Module):
    """What a language model has: a table, layers between, a head. Tokens (...) to logits (..., 100)."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 128, dtype=dtype)
        self.up, self.down = nn.Linear(128, 320, dtype=dtype), nn.Linear(320, 128, bias=False, dtype=dtype)
        self.head = nn.Linear(128, 100, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.down(nn.functional.silu(self.up(hidden)))
        y: torch.Tensor = self.head(hidden)
        return y


def quantized_ends(scheme: tq.Scheme, activations: str, dtype: torch.dtype) -> Ends:
    """The same, quantized and on the GPU."""
    torch.manual_seed(0)
    made = Ends(dtype)
    tq.quantize_(made, {"embed": scheme, "*": scheme}, activations=activations, progress=False)
    return made.eval().cuda()


def ends_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Its input, on the GPU."""
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).cuda()
