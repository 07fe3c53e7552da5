"""Two real models end to end, f32, bf16 and ours taking turns in one process: how fast, and how far from f32.

    python benches/models.py                              the sentence encoder of the demo
    python benches/models.py --model DIR --text FILE      and a causal language model on a text of yours
    python benches/models.py --quick --threads 1          fewer turns, less text; recorded only by --results

Encoder: sentences/s in batches of 32 and one by one, tokenized beforehand, like lengths sharing a batch.
Language model: tokens/s of a prompt of 512 (its last logits only, as generate() asks for them) and of greedy
decoding behind it, one token a call with a KV cache. The loop is a plain one: generate() would add its own
overhead to every token. Models run eagerly, as transformers load them.

A turn of one contender is an uncounted call, which wakes its threads, and one pass over the inputs. Rates are
medians over the rounds; so are the ratios, each taken within a round. Beside them stands the distance from
f32, measured as quality.py does. What `keep_if_slower=True` would change is shown where it changes anything.
A section that is not measured this time keeps its record.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import machine
import turboquant_rs as tq
from quality import KL_WINDOWS, SENTENCES, load_language, predictor
from turboquant_rs.demo import Encoder, library_sentences, load_minilm
from turboquant_rs.demo.sentences import SOURCE
from turboquant_rs.errors import BackendUnavailable
from turboquant_rs.progress import Progress
from turboquant_rs.quality import compare_embeddings, compare_logits, log_probabilities, windows

RESULTS = Path(__file__).parent / "results" / "models.json"
BATCH = 32
PROMPT = 512

Seconds = dict[str, float]
"""A unit (sentence or token), by kind of work."""


@dataclass(frozen=True)
class Effort:
    """Rounds of turns; what a turn reads; what the distance from f32 is measured on."""

    rounds: int = 7
    sentences: int = 256
    singles: int = 32
    new_tokens: int = 64
    compared_sentences: int = SENTENCES
    compared_windows: int = KL_WINDOWS


QUICK = Effort(3, sentences=64, singles=16, new_tokens=16, compared_sentences=128, compared_windows=2)

REFERENCES = ("torch f32", "torch bf16")
WHERE_FASTER = ", where faster"


def quantized(schemes: int | dict[str, int], **options: bool) -> Callable[[nn.Module], tq.Report]:
    return partial(tq.quantize_, schemes=schemes, progress=False, **options)


VARIANTS: dict[str, Callable[[nn.Module], object]] = {
    "torch f32": nn.Module.float,
    "torch bf16": nn.Module.bfloat16,
    "ours 8 bits": quantized(8),
    "ours 4 bits": quantized(4),
    f"ours 8 bits{WHERE_FASTER}": quantized(8, keep_if_slower=True),
    f"ours 4 bits{WHERE_FASTER}": quantized(4, keep_if_slower=True),
}
"""What is done to the model, in place."""

WITH_HEAD = {
    "ours 8 bits, head too": quantized({"*": 8, "*embed_tokens": 8, "lm_head": 8}),
    "ours 4 bits, head at 8": quantized({"*embed_tokens": 8, "lm_head": 8, "*": 4}),
}
"""The output head, which quantize_ leaves alone unless asked, with the embedding tied to it."""


@dataclass(frozen=True)
class Contest:
    """One model's inputs and measures.

    turn: an uncounted call, then seconds a unit of each kind of work.
    distance: the figures of a variant against f32.
    """

    model: nn.Module
    variants: dict[str, Callable[[nn.Module], object]]
    turn: Callable[[nn.Module], Seconds]
    distance: Callable[[nn.Module], dict[str, float]]


def encoder_contest(encoder: Encoder, effort: Effort) -> Contest:
    """Sentences in batches and one by one; mean cosine to the embeddings of f32."""
    compared = library_sentences(effort.compared_sentences)
    sentences = sorted(library_sentences(effort.sentences), key=len)
    pieces = (sentences[start : start + BATCH] for start in range(0, len(sentences), BATCH))
    batches = [encoder.tokenize(piece) for piece in pieces]
    singles = [encoder.tokenize([s]) for s in sentences[:: len(sentences) // effort.singles]]

    def of(model: nn.Module) -> Encoder:
        return Encoder(encoder.name, encoder.origin, model, encoder.tokenize)

    def read(model: nn.Module, inputs: list[tuple[Tensor, Tensor]]) -> float:
        start = time.perf_counter()
        for ids, mask in inputs:
            of(model).forward(ids, mask)
        return (time.perf_counter() - start) / sum(len(ids) for ids, _ in inputs)

    def turn(model: nn.Module) -> Seconds:
        read(model, batches[-1:])
        return {f"batch {BATCH}": read(model, batches), "batch 1": read(model, singles)}

    reference = encoder.encode(compared)

    def distance(model: nn.Module) -> dict[str, float]:
        return compare_embeddings(reference, of(model).encode(compared)).to_dict()

    return Contest(encoder.model, VARIANTS, turn, distance)


def language_contest(model: nn.Module, tokens: Tensor, effort: Effort) -> Contest:
    """A prompt and the tokens behind it; mean KL to f32, and more, over windows of the text."""
    prompt = tokens[None, :PROMPT]
    texts = windows(tokens, effort.compared_windows, PROMPT)

    @torch.inference_mode()
    def turn(model: nn.Module) -> Seconds:
        model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        read = time.perf_counter()
        for _ in range(effort.new_tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        end = time.perf_counter()
        return {"prefill": (read - start) / PROMPT, "decode": (end - read) / effort.new_tokens}

    reference = [log_probabilities(predictor(model), window) for window in texts]

    def distance(model: nn.Module) -> dict[str, float]:
        return compare_logits(reference, predictor(model), texts).to_dict()

    return Contest(model, VARIANTS | WITH_HEAD, turn, distance)


def measure(contest: Contest, threads: Iterable[int], effort: Effort) -> list[dict[str, Any]]:
    """A row for each variant and number of threads."""
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        models = build(contest)
        before = machine.processor_seconds()
        rounds = take_turns(contest, models, effort.rounds)
        others = machine.used_by_others(before)
        for name, model in models.items():
            row = {"variant": name, "threads": count, "others": others, **sizes(model)}
            row |= speeds(rounds, name) | {"distance": contest.distance(model)}
            rows.append(row)
            show(row)
    return rows


def build(contest: Contest) -> dict[str, nn.Module]:
    """Every variant of the model, but those that keep no more of its layers than their plain twin."""
    models: dict[str, nn.Module] = {}
    for name, change in contest.variants.items():
        model = copy.deepcopy(contest.model)
        change(model)
        twin = models.get(name.removesuffix(WHERE_FASTER))
        if twin is None or sizes(model) != sizes(twin):
            models[name] = model
    return models


def take_turns(contest: Contest, models: dict[str, nn.Module], rounds: int) -> list[dict[str, Seconds]]:
    """For each round, what the turn of each variant took; a first round only warms up."""
    seen = []
    with Progress(f"threads {torch.get_num_threads()}", (1 + rounds) * len(models)) as progress:
        for _ in range(1 + rounds):
            seen.append({})
            for name, model in models.items():
                progress.update(progress.done, name)
                seen[-1][name] = contest.turn(model)
                progress.advance()
    return seen[1:]


def sizes(model: nn.Module) -> dict[str, float]:
    """Layers that are quantized; MB of all parameters and buffers."""
    layers = sum(isinstance(layer, tq.nn.QuantLinear | tq.nn.QuantEmbedding) for layer in model.modules())
    held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return {"quantized": layers, "megabytes": round(sum(held.values()) / 1e6, 1)}


def speeds(rounds: list[dict[str, Seconds]], name: str) -> dict[str, dict[str, Any]]:
    """Units a second of each kind of work, and how many times longer the references take."""

    def medians(figure: Callable[[dict[str, Seconds], str], float]) -> dict[str, float]:
        works = rounds[0][name]
        return {work: digits(statistics.median(figure(seen, work) for seen in rounds)) for work in works}

    def ratio(other: str, seen: dict[str, Seconds], work: str) -> float:
        return seen[other][work] / seen[name][work]

    return {
        "per_second": medians(lambda seen, work: 1 / seen[name][work]),
        "ratios": {other: medians(partial(ratio, other)) for other in REFERENCES},
    }


def digits(value: float) -> float:
    """Four of them."""
    return float(f"{value:.4g}")


def show(row: dict[str, Any]) -> None:
    """A line on stderr: rates, and the time of the references over it."""
    line = f"{row['variant']:27} threads: {row['threads']}"
    for work, rate in row["per_second"].items():
        ratios = ", ".join(f"{other} ×{ratio[work]:.2f}" for other, ratio in row["ratios"].items())
        line += f"   {work} {rate:.1f}/s ({ratios})"
    print(line, file=sys.stderr, flush=True)


def measure_encoder(threads: Iterable[int], effort: Effort) -> dict[str, Any]:
    """The section of the sentence encoder."""
    encoder = load_minilm()
    rows = measure(encoder_contest(encoder, effort), threads, effort)
    return {"model": encoder.name, "origin": encoder.origin, "text": SOURCE, "rows": rows}


def measure_language(folder: Path, text: Path, threads: Iterable[int], effort: Effort) -> dict[str, Any]:
    """The section of the causal language model in `folder` on `text`."""
    model, tokens = load_language(folder, text)
    rows = measure(language_contest(model, tokens, effort), threads, effort)
    return {"model": folder.name, "text": text.name, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory of a causal language model (transformers)")
    parser.add_argument("--text", type=Path, help="UTF-8 text it reads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (1 2)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer turns, less text; recorded only by --results"
    )
    parser.add_argument("--results", type=Path, help=f"JSON file to record in (results/{RESULTS.name})")
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")

    effort = QUICK if options.quick else Effort()
    path = options.results or (None if options.quick else RESULTS)
    threads = sorted(options.threads)
    sections: dict[str, Callable[[], dict[str, Any]]] = {"encoder": partial(measure_encoder, threads, effort)}
    if options.model:
        sections["language"] = partial(measure_language, options.model, options.text, threads, effort)
    for name, section in sections.items():
        start = time.perf_counter()
        try:
            found = section()
        except BackendUnavailable as missing:
            print(f"{name}: {missing}", file=sys.stderr)
            continue
        about = {
            "machine": machine.describe(),
            "transformers": metadata.version("transformers"),
            "effort": asdict(effort),
            "load": [round(average, 2) for average in os.getloadavg()],  # ours included
            "seconds": round(time.perf_counter() - start),
            "command": command(options),
        }
        if path:
            save(path, name, about | found)


def save(path: Path, name: str, section: dict[str, Any]) -> None:
    record = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {name: section}, indent=1) + "\n")


def command(options: argparse.Namespace) -> str:
    """The command to repeat this, with the names of the inputs but not where they lie."""
    inputs = f" --model {options.model.name} --text {options.text.name}" if options.model else ""
    threads = " ".join(map(str, options.threads))
    return f"python benches/models.py{inputs} --threads {threads}{' --quick' * options.quick}"


if __name__ == "__main__":
    main()
