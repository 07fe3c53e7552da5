"""Decoders on a GPU, one token a step: bf16 and ours taking turns in one process, how fast, how far from f32.

    python benches/cuda_models.py                          eight layers of Llama 3 8B's shapes, random weights
    python benches/cuda_models.py --model DIR --text FILE  and a Llama that transformers saved, on a text

A step takes a token for each row of the batch to the next one, greedily: the model with a key-value cache of
fixed size, which is always full, the choice of the token, the place of the next. It is captured in a CUDA
graph, as nobody would launch so much from Python; a turn of one contender is a run of replays. Rates are
medians over the rounds; so are the ratios, each taken within a round. The decoder is written out here, name
for name that of transformers, so that nothing but its linear layers differs; the rest stays bf16, the output
head too. Nested contenders share one graph, whose precision is set between turns; those `alone` are captured
at their bits, without a choice.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import turboquant_rs as tq
from bench_cuda import write
from models import digits, sizes
from quality import KL_WINDOWS
from turboquant_rs.nn.precision import switchable
from turboquant_rs.nn.weight import PackedWeight
from turboquant_rs.quality import compare_logits, log_probabilities, windows

RESULTS = Path(__file__).parent / "results" / "cuda_models.json"
BATCHES = (1, 8, 64)
CONTEXT = 256
"""Tokens that the cache holds."""

ROUNDS = 9
SECONDS = 0.04
"""Of a turn, about."""


# The decoder ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a Llama is built by."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    theta: float
    eps: float
    tied: bool

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """That of a saved model."""
        config = json.loads((folder / "config.json").read_text())
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = [config[name] for name in (*names, "num_key_value_heads", "vocab_size")]
        return cls(*sizes, theta, config["rms_norm_eps"], config["tie_word_embeddings"])


LARGE = Shape(4096, 14336, 8, 32, 8, 32768, 500000.0, 1e-5, False)


@dataclass
class Cache:
    """Keys and values (layers, batch, heads, CONTEXT, width), and the position of the token to come."""

    keys: Tensor
    values: Tensor
    position: Tensor


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.width = shape.hidden // shape.heads
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, self.width * shape.kv_heads, bias=False)
        self.v_proj = nn.Linear(shape.hidden, self.width * shape.kv_heads, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, layer: int) -> Tensor:
        batch, length, _ = x.shape
        queries_and_keys = torch.cat((self.q_proj(x), self.k_proj(x)), -1)
        turned = queries_and_keys.view(batch, length, -1, self.width).transpose(1, 2)
        low, high = turned.chunk(2, -1)
        turned = turned * cos + torch.cat((-high, low), -1) * sin
        queries, keys = turned.split((self.heads, self.kv_heads), 1)
        values = self.v_proj(x).view(batch, length, -1, self.width).transpose(1, 2)
        if cache is not None:
            place = cache.position % CONTEXT
            keys = cache.keys[layer].index_copy_(2, place, keys)
            values = cache.values[layer].index_copy_(2, place, values)
        y = F.scaled_dot_product_attention(queries, keys, values, is_causal=cache is None, enable_gqa=True)
        y = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return y


class Inner(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), Inner(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.eps)

    def forward(self, x: Tensor, *where: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *where)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, shape.eps)


class Decoder(nn.Module):
    """A Llama: tokens (batch, length) to logits; with a cache, of a token each behind those that it holds."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.model = shape, Body(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if shape.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.model.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=x.device) if cache is None else cache.position
        width = self.shape.hidden // self.shape.heads
        steps = torch.arange(0, width, 2, device=x.device).float() / width
        angles = (positions.float()[:, None] * self.shape.theta**-steps).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for number, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, cache, number)
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits

    def cache(self, batch: int) -> Cache:
        """A full one, of nothing in particular."""
        shape, weight = self.shape, self.lm_head.weight
        size = (shape.layers, batch, shape.kv_heads, CONTEXT, shape.hidden // shape.heads)
        keys, values = (torch.randn(size, device=weight.device).to(weight.dtype) for _ in range(2))
        return Cache(keys, values, torch.full((1,), CONTEXT, device=weight.device))


def load(folder: Path) -> Decoder:
    """A saved Llama, in f32."""
    from safetensors.torch import load_file

    model = Decoder(Shape.of(folder))
    state = {key: part for file in folder.glob("*.safetensors") for key, part in load_file(file).items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and missing in ([], ["lm_head.weight"] * model.shape.tied), (missing, unknown)
    return model.eval()


def tokens_of(folder: Path, text: Path) -> Tensor:
    """The text as the model reads it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids)


def random_model(shape: Shape) -> Decoder:
    """One with random weights, in bf16 on the GPU."""
    with torch.device("meta"):
        model = Decoder(shape)
    model = model.bfloat16().to_empty(device="cuda").eval()
    with torch.no_grad():
        for name, part in model.named_parameters():
            part.fill_(1) if "norm" in name else part.normal_(std=0.02)
    return model


# The contenders -------------------------------------------------------------------------------------------


def quantized(scheme: int | tq.Scheme, activations: str) -> Callable[[nn.Module], object]:
    options = {"activations": activations, "progress": False}
    return partial(tq.quantize_, schemes={"model.layers.*": scheme}, **options)


NESTED = "nested, "
VARIANTS: dict[str, Callable[[nn.Module], object]] = {
    "torch bf16": lambda model: None,
    "8 bits": quantized(8, "float"),
    "4 bits": quantized(4, "float"),
    "8 bits, int8 activations": quantized(8, "int8"),
    "4 bits, int8 activations": quantized(4, "int8"),
    "nested": quantized(tq.Scheme.nested(), "float"),
}
"""What is done to the bf16 model, in place."""

WIDTHS = (8, 4)
"""Of nested contenders."""


@dataclass(frozen=True)
class Contender:
    """A captured step of a model, and how many bits it is to read (None: all)."""

    graph: torch.cuda.CUDAGraph
    model: nn.Module
    bits: int | None
    held: tuple[Any, ...]

    def seconds(self, replays: int) -> float:
        """Of a step."""
        if self.bits is not None:
            tq.set_precision(self.model, self.bits)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()
        begin.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / replays


@torch.no_grad()
def contender(model: Decoder, batch: int) -> Contender:
    """The step of a model, captured."""
    cache = model.cache(batch)
    tokens = torch.zeros(batch, 1, dtype=torch.long, device="cuda")

    def step() -> None:
        logits = model(tokens, cache)
        tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))
        cache.position.add_(1)

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return Contender(graph, model, None, (cache, tokens))


def contenders(models: dict[str, Decoder], batch: int) -> dict[str, Contender]:
    """One for each model; of the nested one, one for each width, of one graph and alone."""
    found = {}
    for name, model in models.items():
        if name != "nested":
            found[name] = contender(model, batch)
            continue
        shared = contender(model, batch)
        for bits in WIDTHS:
            found[f"{NESTED}{bits} bits"] = Contender(shared.graph, model, bits, shared.held)
        for bits in WIDTHS:
            tq.set_precision(model, bits)
            with patch.object(PackedWeight, "_choice", return_value=None):
                found[f"{NESTED}{bits} bits alone"] = contender(model, batch)
    return found


def build(model: nn.Module) -> dict[str, Decoder]:
    """Every variant of a bf16 model on the GPU."""
    models = {}
    for name, change in VARIANTS.items():
        models[name] = copy.deepcopy(model)
        change(models[name])
    return models


def measure(models: dict[str, Decoder], batches: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """{contender: tokens a second, and the time of bf16 over its own, by batch}."""
    rows: dict[str, dict[str, Any]] = {}
    for batch in batches:
        found = contenders(models, batch)
        replays = {name: max(3, round(SECONDS / each.seconds(3))) for name, each in found.items()}
        rounds = [
            {name: each.seconds(replays[name]) for name, each in found.items()} for _ in range(1 + ROUNDS)
        ][1:]
        for name in found:
            rate = statistics.median(batch / seen[name] for seen in rounds)
            over = statistics.median(seen["torch bf16"] / seen[name] for seen in rounds)
            row = rows.setdefault(name, {"variant": name, "per_second": {}, "ratios": {}})
            row["per_second"][str(batch)], row["ratios"][str(batch)] = digits(rate), digits(over)
            print(f"batch {batch:3}  {name:26} {rate:9.0f} tokens/s  bf16 over it {over:.3f}", flush=True)
        del found
        torch.cuda.empty_cache()
    return rows


@torch.no_grad()
def switch_microseconds(model: Decoder, count: int = 51) -> dict[str, float]:
    """Of the host, to change the bits that a captured model reads: layer by layer, and by a ladder."""

    def median(switch: Callable[[int], None]) -> float:
        torch.cuda.synchronize()
        times = []
        for at in range(count):
            start = time.perf_counter()
            switch(at % 2)
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return digits(1e6 * statistics.median(times))

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedWeight)}
    held = contender(model, 1)
    found = {"set_precision": median(lambda at: tq.set_precision(model, WIDTHS[at]))}
    ladder = switchable(model, [dict.fromkeys(layers, bits) for bits in WIDTHS])
    held = contender(model, 1)

    def climb(level: int) -> None:
        ladder.level = level

    found["ladder"] = median(climb)
    ladder.remove()
    del held
    return found | {"layers": len(layers)}


def section(model: nn.Module, distance: Callable[[nn.Module], dict[str, float]] | None) -> dict[str, Any]:
    """Everything about one model, bf16 on the GPU."""
    models = build(model)
    rows = measure(models, BATCHES)
    for name, row in rows.items():
        ours = models["nested" if name.startswith(NESTED) else name]
        if name.startswith(NESTED):
            tq.set_precision(ours, int(name.removeprefix(NESTED).split()[0]))
        row |= sizes(ours)
        if distance is not None:
            row["distance"] = distance(ours)
            print(f"{name:26} KL {row['distance']['kl']:.5f}", flush=True)
    switch = switch_microseconds(models["nested"])
    print(f"microseconds to switch: {switch}", flush=True)
    return {"rows": list(rows.values()), "switch_microseconds": switch}


def small(folder: Path, text: Path) -> dict[str, Any]:
    """A saved model, with its distance from f32."""
    exact = load(folder).cuda()
    texts = windows(tokens_of(folder, text), KL_WINDOWS).cuda()
    reference = [log_probabilities(exact, window) for window in texts]

    def distance(model: nn.Module) -> dict[str, float]:
        return compare_logits(reference, model, texts).to_dict()

    found = section(copy.deepcopy(exact).bfloat16(), distance)
    return {"model": folder.name, "text": text.name, "shape": asdict(exact.shape)} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a Llama (transformers)")
    parser.add_argument("--text", type=Path, help="UTF-8 text it reads")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")
    record = json.loads(options.results.read_text()) if options.results.exists() else {}
    sections = {name: record[name] for name in ("language", "large") if name in record}
    about = {"batches": BATCHES, "context": CONTEXT, "rounds": ROUNDS}
    if options.model:
        sections["language"] = small(options.model, options.text)
        write(options.results, **about, **sections)
    sections["large"] = {"shape": asdict(LARGE)} | section(random_model(LARGE), None)
    write(options.results, **about, **sections)


if __name__ == "__main__":
    main()
