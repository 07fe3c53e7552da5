"""What every bit width costs two real models, recorded in results/quality.json.

    python benches/quality.py                              the sentence encoder of the demo
    python benches/quality.py --model DIR --text FILE      and a causal language model on a text of yours

Encoder: mean cosine to f32 and nearest neighbours kept, over sentences of Python's own documentation.
Language model: mean KL to f32 (nats), equal first choice and perplexity ratio over the first 4,096 tokens of
the text in 8 windows of 512; the perplexity itself over the first 65,536 tokens in 128 windows. Every row is
measured twice: weights only, and with int8 activations. A section that is not measured this time keeps its
record.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import machine
import turboquant_rs as tq
from turboquant_rs import quality
from turboquant_rs.demo import Encoder, library_sentences, load_minilm
from turboquant_rs.demo.sentences import SOURCE
from turboquant_rs.progress import Progress

RESULTS = Path(__file__).parent / "results" / "quality.json"
SENTENCES = 512
KL_WINDOWS, PERPLEXITY_WINDOWS = 8, 128
WIDTHS = range(8, 1, -1)
ACTIVATIONS = {"weights": "float", "int8": "int8"}
Row = dict[str, object]


@dataclass(frozen=True)
class Variant:
    """One way to quantize: a scheme, and the bits that are read of it."""

    label: str
    scheme: tq.Scheme
    bits: int


def variants() -> Iterator[Variant]:
    """Every scheme at every width, groups of 64; finer groups at 4 bits; the nested prefixes."""
    for bits in WIDTHS:
        yield Variant("extreme", tq.Scheme(bits=bits), bits)
        yield Variant("mse", tq.Scheme(bits=bits, scale="mse"), bits)
        yield Variant("asymmetric", tq.Scheme(bits=bits, symmetric=False), bits)
    yield Variant("asymmetric, groups of 32", tq.Scheme(bits=4, group_size=32, symmetric=False), 4)
    for planes in ((4, 4), (2, 1, 1, 1, 1, 2)):
        scheme = tq.Scheme.nested(planes=planes)
        for bits in (bits for bits in reversed(scheme.prefixes) if bits > 1):
            yield Variant(f"nested {'+'.join(map(str, planes))}", scheme, bits)


def quantized(model: nn.Module, variant: Variant) -> Iterator[tuple[str, nn.Module]]:
    """The model quantized as `variant` says, once for each kind of activations."""
    ours = copy.deepcopy(model)
    tq.quantize_(ours, variant.scheme, progress=False)
    if variant.bits != variant.scheme.bits:
        tq.set_precision(ours, variant.bits)
    for name, activations in ACTIVATIONS.items():
        for layer in ours.modules():
            if isinstance(layer, tq.nn.QuantLinear):
                layer.activations = activations
        yield name, ours


def head(variant: Variant) -> Row:
    return {"scheme": variant.label, "bits": variant.bits}


def bits_per_weight(model: nn.Module) -> float:
    """Bits an element of the quantized weights as they are read, scales and zero points included."""
    packed = [layer.packed for layer in model.modules() if isinstance(layer, tq.nn.QuantLinear)]
    return 8 * sum(p.nbytes for p in packed) / sum(p.shape.numel() for p in packed)


def measure_encoder() -> Row:
    """Rows of the sentence encoder."""
    encoder = load_minilm()
    sentences = library_sentences(SENTENCES)
    reference = encoder.encode(sentences)
    rows: list[Row] = []
    chosen = list(variants())
    with Progress(encoder.name, len(chosen)) as progress:
        for variant in chosen:
            row = head(variant)
            for kind, model in quantized(encoder.model, variant):
                row["bits_per_weight"] = bits_per_weight(model)
                copy_ = Encoder(encoder.name, encoder.origin, model, encoder.tokenize)
                found = quality.compare_embeddings(reference, copy_.encode(sentences))
                row[kind] = found.to_dict()
            rows.append(row)
            progress.advance()
            log(row, "mean_cosine")
    return {
        "model": encoder.name,
        "origin": encoder.origin,
        "text": f"{SENTENCES} {SOURCE}",
        "rows": rows,
    }


def measure_language(folder: Path, text: Path) -> Row:
    """Rows of the causal language model in `folder` on `text`."""
    model, tokens = load_language(folder, text)
    short = quality.windows(tokens, KL_WINDOWS)
    reference = [quality.log_probabilities(predictor(model), window) for window in short]
    rows: list[Row] = []
    chosen = list(variants())
    with Progress(folder.name, len(chosen)) as progress:
        for variant in chosen:
            row = head(variant)
            for kind, ours in quantized(model, variant):
                row["bits_per_weight"] = bits_per_weight(ours)
                row[kind] = quality.compare_logits(reference, predictor(ours), short).to_dict()
            rows.append(row)
            progress.advance()
            log(row, "kl")
    return {
        "model": folder.name,
        "text": text.name,
        "tokens": tokens.numel(),
        "rows": rows,
        "perplexity": measure_perplexity(model, quality.windows(tokens, PERPLEXITY_WINDOWS)),
    }


def measure_perplexity(model: nn.Module, texts: Tensor) -> Row:
    """Perplexity over the long protocol: f32, and 8 and 4 bits as users run them."""
    found: Row = {"windows": len(texts), "f32": perplexity(model, texts, "f32")}
    for bits in (8, 4):
        *_, (kind, ours) = quantized(model, Variant("extreme", tq.Scheme(bits=bits), bits))
        found[f"{bits} bits, {kind} activations"] = perplexity(ours, texts, f"{bits} bits")
    return found


def perplexity(model: nn.Module, texts: Tensor, label: str) -> float:
    with Progress(f"perplexity {label}", len(texts)) as progress:
        value = quality.perplexity(predictor(model), texts, each=progress.update)
    print(f"perplexity {label}: {value:.4f}", file=sys.stderr, flush=True)
    return value


def load_language(folder: Path, text: Path) -> tuple[nn.Module, Tensor]:
    """The model in f32 and the whole text as tokens, without special tokens."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return model.eval(), torch.tensor(ids)


def predictor(model: nn.Module) -> quality.Predict:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def log(row: Row, figure: str) -> None:
    values = " / ".join(f"{row[kind][figure]:.5f}" for kind in ACTIVATIONS)
    print(f"{row['scheme']:24} {row['bits']} bits  {figure} {values}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory of a causal language model (transformers)")
    parser.add_argument("--text", type=Path, help="UTF-8 text it is measured on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    sections = {"encoder": measure_encoder}
    if options.model:
        sections["language"] = lambda: measure_language(options.model, options.text)
    for name, measure in sections.items():
        start = time.perf_counter()
        found = measure() | {"machine": machine.describe(), "threads": torch.get_num_threads()}
        found["seconds"] = round(time.perf_counter() - start)
        record[name] = found | {"command": command(options)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


def command(options: argparse.Namespace) -> str:
    """The command to repeat this, with the names of the inputs but not where they lie."""
    inputs = f" MODEL={options.model.name} TEXT={options.text.name}" if options.model else ""
    return f"make quality{inputs}"


if __name__ == "__main__":
    main()
