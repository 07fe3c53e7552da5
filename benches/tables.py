"""Renders the recorded figures into the tables of README.md.

    python benches/tables.py [--check] [README.md]

Every pair of lines `<!-- table: NAME -->` and `<!-- end of table -->` encloses one table, made of the JSON in
results/. `--check` changes nothing and fails where a table is not what the records say.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
HOW = {
    "speed": "make bench-speed",
    "quality": "make quality",
    "linear": "make bench-linear",
    "linear-avx2": "benches/linear.py with --results on a CPU that has AVX2 and no more",
    "models": "make bench-models",
    "precision": "make quality",
    "control": "make quality",
    "qat": "python benches/qat.py",
    "cuda": "make gpu",
    "cuda_matmul": "make gpu",
    "cuda_int8": "make gpu",
    "cuda_models": "make gpu",
}
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


class NotRecorded(Exception):
    """There is no record yet to make a table of."""


def read(name: str, section: str) -> Any:
    """A section of a record. Raises: NotRecorded."""
    path = RESULTS / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if section not in record:
        raise NotRecorded(f"{path.name} has no {section} yet; run {HOW[name]}")
    return record[section]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def grid(section: dict, cell: Callable[[dict], str], extra: dict[str, Callable[[dict], str]]) -> str:
    """One line a width, one column a scheme, then columns of `extra` figures of the default scheme."""
    found = {(row["scheme"], row["bits"]): row for row in section["rows"] if "groups" not in row["scheme"]}
    schemes = list(dict.fromkeys(scheme for scheme, _ in found))
    lines = []
    for bits in sorted({bits for _, bits in found}, reverse=True):
        cells = [cell(found[s, bits]) if (s, bits) in found else "" for s in schemes]
        default = found.get(("extreme", bits))
        lines.append([str(bits), *cells, *(show(default) if default else "" for show in extra.values())])
    return markdown(["bits", *schemes, *extra], lines)


def encoder() -> str:
    """Mean cosine to f32: weights only / with int8 activations."""

    def cosines(row: dict) -> str:
        return " / ".join(f"{row[kind]['mean_cosine']:.4f}" for kind in ("weights", "int8"))

    section = read("quality", "encoder")
    extra = {"nearest 10 kept (extreme, int8)": lambda row: f"{row['int8']['overlap']:.1%}"}
    return grid(section, cosines, extra)


def language() -> str:
    """Mean KL to f32 in nats: weights only / with int8 activations."""

    def divergences(row: dict) -> str:
        return " / ".join(f"{row[kind]['kl']:.5f}" for kind in ("weights", "int8"))

    section = read("quality", "language")
    extra = {
        "same first choice (extreme)": lambda row: f"{row['int8']['same_top1']:.3f}",
        "perplexity ratio (extreme)": lambda row: f"{row['int8']['perplexity_ratio']:.4f}",
    }
    return grid(section, divergences, extra)


def perplexity() -> str:
    """Perplexity over the long protocol."""
    values = dict(read("quality", "language")["perplexity"])
    windows = values.pop("windows")
    lines = [[name, f"{value:.4f}", f"{value / values['f32']:.4f}"] for name, value in values.items()]
    return markdown(["", f"perplexity, {windows} windows of 512", "ratio"], lines)


def speed() -> str:
    """One line a job: median time, bandwidth, and how many times longer each peer takes."""
    rows = read("speed", "rows")
    lines = []
    for row in rows:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        bandwidth = f"{row['gigabytes_per_second']:.1f}"
        lines.append([row["row"].replace("_", " "), f"{1e3 * row['seconds']:.2f}", bandwidth, ratios])
    return markdown(["job", "ms", "GB/s", "time of the peer over ours"], lines)


CONTESTS = {
    "ours W8": ("W8A8",),
    "ours W4 g128": ("W4A8 g128", "W4A16 g128"),
    "ours W4 g32": ("W4A8 g32", "W4A16 g32"),
    "ours W4 g128 bf16 activations": ("W4A16 g128",),
}
"""Who of ours meets which kinds of peers."""


def linear(record: str) -> str:
    """One line a cell: ours, and the time of the fastest peer that does the same, over ours."""
    contenders = read(record, "contenders")
    floats = [name for name, about in contenders.items() if about["kind"] == "float"]
    lines = []
    for cell in (cell for cell in read(record, "cells") if not cell["hot"]):
        line = [f"{cell['n']} × {cell['k']}", str(cell["threads"]), str(cell["m"])]
        for ours, kinds in CONTESTS.items():
            peers = [name for name in cell["gops"] if contenders[name]["kind"] in kinds]
            best = max(set(peers) - CONTESTS.keys(), key=cell["gops"].__getitem__, default="")
            line += [rate(cell, ours), f"{ratio(cell, best, ours)} {best}"]
        lines.append([*line, " / ".join(ratio(cell, name, "ours W8") for name in floats)])
    columns = [column for ours in CONTESTS for column in (ours, "fastest peer's time over it")]
    return markdown(["n × k", "threads", "m", *columns, f"{' / '.join(floats)} over W8"], lines)


def linear_all() -> str:
    """One line a contender, one column a cell of the first shape; the error is that to floats."""
    contenders, cells = read("linear", "contenders"), read("linear", "cells")
    first = [cell for cell in cells if (cell["n"], cell["k"]) == (cells[0]["n"], cells[0]["k"])]
    limits = read("linear", "limits")
    streams = [cell["m"] == 1 and not cell["hot"] for cell in first]

    def limit(name: str, unit: str, streaming: bool) -> list[str]:
        return [
            f"{limits[name][str(cell['threads'])]:.0f} {unit}" if streamed == streaming else ""
            for cell, streamed in zip(first, streams, strict=True)
        ]

    lines = [
        ["reading memory", "", "", *limit("read_gigabytes_per_second", "GB/s", streaming=True)],
        ["int8 products in registers", "", "", *limit("int8_gops", "GOP/s", streaming=False)],
        ["float products in registers", "", "", *limit("float_gops", "GOP/s", streaming=False)],
    ]
    for name, about in contenders.items():
        rates = (rate(cell, name) for cell in first)
        lines.append([name, f"{about['bits']:.2f}", f"{about['error']:.3f}", *rates])
    lines += [[f"{name}: {reason}"] for name, reason in read("linear", "refused").items()]
    columns = (f"m = {cell['m']}{', hot' * cell['hot']}, threads {cell['threads']}" for cell in first)
    shape = f"{cells[0]['n']} × {cells[0]['k']}"
    return markdown([shape, "bits", "error", *columns], lines)


def rate(cell: dict, name: str) -> str:
    """GB/s of stored weight at m = 1, GOP/s above; empty for who took no part."""
    unit = ("gigabytes_per_second", "GB/s") if cell["m"] == 1 else ("gops", "GOP/s")
    return f"{cell[unit[0]][name]:.0f} {unit[1]}" if name in cell["gops"] else ""


def ratio(cell: dict, peer: str, ours: str) -> str:
    """The peer's time over ours; empty where one of them took no part."""
    times = cell["milliseconds"]
    return f"{times[peer] / times[ours]:.2f}" if {peer, ours} <= times.keys() else ""


def models_encoder() -> str:
    """One line a variant and number of threads: sentences a second, and how near it is to f32."""
    figures = {
        "mean cosine": lambda row: f"{row['distance']['mean_cosine']:.4f}",
        "nearest 10 kept": lambda row: f"{row['distance']['overlap']:.1%}",
    }
    return end_to_end("encoder", "sentences/s", figures)


def models_language() -> str:
    """The same for tokens a second of the language model."""
    figures = {
        "mean KL": lambda row: f"{row['distance']['kl']:.5f}",
        "perplexity ratio": lambda row: f"{row['distance']['perplexity_ratio']:.4f}",
    }
    return end_to_end("language", "tokens/s", figures)


def end_to_end(section: str, unit: str, figures: dict[str, Callable[[dict], str]]) -> str:
    """Rates of each kind of work, the time of f32 and of bf16 over each, then `figures`."""
    rows = read("models", section)["rows"]
    works = list(rows[0]["per_second"])
    lines = []
    for row in rows:
        line = [str(row["threads"]), row["variant"], f"{row['megabytes']:.0f}"]
        for work in works:
            ratios = " / ".join(f"{ratio[work]:.2f}" for ratio in row["ratios"].values())
            line += [f"{row['per_second'][work]:.0f}", ratios]
        lines.append([*line, *(show(row) for show in figures.values())])
    against = " / ".join(name.removeprefix("torch ") for name in rows[0]["ratios"])
    columns = [column for work in works for column in (f"{work}, {unit}", f"{against} over it")]
    return markdown(["threads", "model", "MB", *columns, *figures], lines)


def interval(value: dict) -> str:
    """A figure and its 95 % interval."""
    return f"{value['value']:.3f} ({value['low']:.3f} … {value['high']:.3f})"


def precision_plans() -> str:
    """One line a model and budget: KL of the plan over that of uniform bits at the same bytes."""
    lines = []
    for section in ("language", "encoder"):
        record = read("precision", section)
        for row in record["plans"]["layers"]:
            if row["kind"] == "plan":
                found = interval(row["over_uniform"])
                predicted = f"{row['predicted_over_uniform']:.3f}"
                lines.append([record["model"], f"{row['effective_bits']:.2f}", found, predicted])
    return markdown(["model", "bits, scales included", "KL over uniform (95 %)", "predicted"], lines)


def control_burst() -> str:
    """One line a contender of the recorded burst."""
    burst = read("control", "burst")
    lines = [
        [
            name,
            f"{row['p95_ms']:.0f}",
            f"{row['violations']} of {row['requests']}",
            f"{row['mean_bits']:.2f}",
            f"{row['kl']:.1e}",
        ]
        for name, row in burst.items()
        if isinstance(row, dict) and "p95_ms" in row
    ]
    return markdown(["read at", "p95, ms", "too late", "mean bits", "KL"], lines)


def cuda_pack() -> str:
    """One line a job: share of the bandwidth of a copy."""
    peers = ("ours", "torch.compile", "torch eager")
    lines = [
        [row["row"], *(f"{row['of_copy'][name]:.0%}" if name in row["of_copy"] else "" for name in peers)]
        for row in read("cuda", "rows")
    ]
    return markdown(["job, bf16 8192 × 8192", *peers], lines)


def cuda_matmul() -> str:
    """One line a shape and m: time of the float layer over ours."""
    lines = []
    for row in read("cuda_matmul", "rows"):
        seconds = row["seconds"]
        names = ("w4 g128", "w8 g128", "tinygemm g128")
        over = [f"{seconds['bf16 linear'] / seconds[name]:.2f}" if name in seconds else "" for name in names]
        floor = row.get("read_floor", {}).get("w4 g128")
        limit = f"{seconds['w4 g128'] / floor:.2f}" if floor and row["m"] == 1 else ""
        microseconds = f"{1e6 * seconds['w4 g128']:.1f}"
        lines.append([f"{row['n']} × {row['k']}", str(row["m"]), microseconds, *over, limit])
    columns = ["W4, µs", "bf16 over W4", "bf16 over W8", "bf16 over tinygemm", "W4 over its read floor"]
    return markdown(["n × k", "m", *columns], lines)


def cuda_int8() -> str:
    """One line a shape and m: a layer with int8 activations, quantizing them included, beside the float layer
    and the bare product of int8."""
    lines = []
    for row in read("cuda_int8", "rows"):
        seconds = row["seconds"]
        whole = seconds["w8"]
        bare = f"{seconds['_int_mm'] / whole:.2f}" if "_int_mm" in seconds else ""
        grouped = [
            f"{seconds['bf16 linear'] / seconds[name]:.2f}" for name in ("w8 g128", "w4 g128", "w4 g64")
        ]
        over = [f"{seconds['bf16 linear'] / whole:.2f}", bare, *grouped]
        lines.append([f"{row['n']} × {row['k']}", str(row["m"]), f"{1e6 * whole:.1f}", *over])
    columns = ["W8 rows, µs", "bf16 over W8", "_int_mm over W8", "bf16 over W8 g128", "W4 g128", "W4 g64"]
    return markdown(["n × k", "m", *columns], lines)


def cuda_int8_quantize() -> str:
    """One line a size: share of the bandwidth of a copy of as many bytes."""
    names = ("a row", "g128", "g64")
    lines = [
        [f"{row['m']} × {row['k']}", *(f"{row['copy'] / row['seconds'][name]:.0%}" for name in names)]
        for row in read("cuda_int8", "quantize")
    ]
    return markdown(["x, bf16", *(f"scale {name}" if name == "a row" else name for name in names)], lines)


def cuda_models(section: str) -> str:
    """One line a contender: tokens a second by batch, the time of bf16 over ours, distance from f32."""
    rows = read("cuda_models", section)["rows"]
    batches = list(rows[0]["per_second"])
    lines = []
    for row in rows:
        rates = [f"{row['per_second'][batch]:.0f} ({row['ratios'][batch]:.2f})" for batch in batches]
        distance = [f"{row['distance']['kl']:.5f}"] if "distance" in row else []
        lines.append([row["variant"], f"{row['megabytes']:.0f}", *rates, *distance])
    columns = [f"batch {batch}, tokens/s (bf16 over it)" for batch in batches]
    kl = ["mean KL"] if "distance" in rows[0] else []
    return markdown(["layers", "MB", *columns, *kl], lines)


def qat() -> str:
    """One line a trained variant and number of bits, over all windows: KL of rounding and after training."""
    windows = read("qat", "text")["windows"]
    known = {(row["name"], row["bits"]): row for row in read("qat", "rows")}
    lines = []
    for (name, bits), row in known.items():
        if name.startswith("rounded"):
            continue
        plain = known["rounded nested" if name == "lsq nested" else "rounded", math.floor(bits)]
        kl, ratio = row[f"kl_{windows}"], row[f"perplexity_ratio_{windows}"]
        before, won = plain[f"kl_{windows}"]["value"], row[f"recovered_{windows}"]
        lines.append(
            [
                name.removesuffix(f" {bits}"),
                f"{math.floor(bits)} on average" if "learned" in row else str(bits),
                f"{before:.4f}",
                f"{kl['value']:.4f} ({kl['low']:.4f} … {kl['high']:.4f})",
                f"{won['value']:.0%} ({won['low']:.0%} … {won['high']:.0%})"
                if won["value"] > 0
                else "nothing",
                f"{plain[f'perplexity_ratio_{windows}']['value']:.3f}",
                interval(ratio),
            ]
        )
    columns = ["KL, rounded", "KL, trained (95 %)", "won back", "perplexity, rounded", "trained"]
    return markdown(["method", "bits", *columns], lines)


TABLES = {
    "cuda-models-language": partial(cuda_models, "language"),
    "cuda-models-large": partial(cuda_models, "large"),
    "qat": qat,
    "precision-plans": precision_plans,
    "control-burst": control_burst,
    "cuda-pack": cuda_pack,
    "cuda-matmul": cuda_matmul,
    "cuda-int8": cuda_int8,
    "cuda-int8-quantize": cuda_int8_quantize,
    "quality-encoder": encoder,
    "quality-language": language,
    "quality-perplexity": perplexity,
    "speed": speed,
    "linear": partial(linear, "linear"),
    "linear-avx2": partial(linear, "linear-avx2"),
    "linear-all": linear_all,
    "models-encoder": models_encoder,
    "models-language": models_language,
}


def render(text: str) -> tuple[str, list[str]]:
    """`text` with every marked block replaced by its table, and what is missing to replace the others."""
    missing: list[str] = []

    def block(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise SystemExit(f"no table is called {match['name']!r}; there are {', '.join(TABLES)}")
        try:
            return match[1] + TABLES[match["name"]]() + match[3]
        except NotRecorded as error:
            missing.append(str(error))
            return match[0]

    return BLOCK.sub(block, text), missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "README.md")
    options = parser.parse_args()
    text = options.file.read_text()
    rendered, missing = render(text)
    for what in missing:
        print(what, file=sys.stderr)
    if options.check:
        if rendered != text:
            print(f"{options.file.name} is out of date; run python benches/tables.py", file=sys.stderr)
        return int(rendered != text or bool(missing))
    if rendered != text:
        options.file.write_text(rendered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
