"""A language model of bytes, trained on the spot: quick to train, and one byte at a time it is read whole.

Bengio, Ducharme, Vincent and Jauvin, "A neural probabilistic language model" (2003), with residual blocks:
the last bytes, embedded side by side, to the next one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT, EMBEDDED, WIDTH, INNER, BLOCKS = 32, 32, 1024, 2048, 4
TRAINING_STEPS, BATCH, RATE = 60, 64, 1e-3


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, WIDTH), both."""
        found: Tensor = x + self.down(F.relu(self.up(self.norm(x))))
        return found


class ByteModel(nn.Module):
    """The last CONTEXT bytes (batch, CONTEXT) to logits of the next one (batch, 256); 18 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, EMBEDDED)
        self.input = nn.Linear(CONTEXT * EMBEDDED, WIDTH)
        self.blocks = nn.Sequential(*(_Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, context: Tensor) -> Tensor:
        """context: (batch, CONTEXT) int64 -> (batch, 256)."""
        x = self.blocks(self.input(self.embed(context).flatten(1)))
        logits: Tensor = self.head(self.norm(x))
        return logits


def encoded(text: str) -> Tensor:
    """The bytes of a text, int64."""
    return torch.tensor(list(text.encode("utf-8")))


def contexts(data: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` places of `data` drawn by `seed`: contexts (count, CONTEXT), the byte after each (count,)."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(data) - CONTEXT, (count,), generator=generator)
    return data[starts.unsqueeze(1) + torch.arange(CONTEXT)], data[starts + CONTEXT]


def train(data: Tensor, each: Callable[[int], None] = lambda done: None) -> ByteModel:
    """A model trained on `data` for TRAINING_STEPS steps; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=TRAINING_STEPS)
    for step in range(TRAINING_STEPS):
        x, y = contexts(data, BATCH, step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]  # untyped in torch
        optimizer.step()
        schedule.step()
        each(step + 1)
    return model.eval()


@torch.inference_mode()
def generate(model: nn.Module, context: Tensor, count: int) -> Tensor:
    """The `count` likeliest bytes, one after the other, that follow a context (CONTEXT,)."""
    text = context
    for _ in range(count):
        text = torch.cat([text, model(text[-CONTEXT:].unsqueeze(0)).argmax(1)])
    return text[len(context) :]
