"""What each verb of the command line does: call the library, print its result for people or as JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from turboquant_rs.checkpoint import (
    Comparison,
    Contents,
    compare_checkpoints,
    inspect_checkpoint,
    quantize_checkpoint,
)
from turboquant_rs.cli import bench as bench_
from turboquant_rs.cli import plan as plan_
from turboquant_rs.info import info as machine_info
from turboquant_rs.picture import NO_MATPLOTLIB, can_draw
from turboquant_rs.precision import Budget, Phases, Plan, read_plan
from turboquant_rs.report import describe_scheme
from turboquant_rs.scheme import Rounding, Scheme
from turboquant_rs.table import human_bytes, printable, table

__all__ = ["Command", "UsageError", "bench", "compare", "demo", "info", "inspect", "plan", "quantize"]

Command = Callable[[argparse.Namespace], None]


class UsageError(Exception):
    """The command line contradicts itself or asks for something that does not exist."""


def info(options: argparse.Namespace) -> None:
    """`turboquant-rs info`"""
    facts = machine_info()
    if options.json:
        return _print_json(facts)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {_flat(value)}")


def quantize(options: argparse.Namespace) -> None:
    """`turboquant-rs quantize IN OUT`"""
    scheme = _planned(options) if options.plan else _scheme(options)
    rounding = _rounding(options)
    _set_threads(options)
    report = quantize_checkpoint(
        Path(options.source),
        Path(options.target),
        scheme,
        rounding,
        include=options.include,
        exclude=options.exclude,
        dry_run=options.dry_run,
        replace=options.force,
        nan_zero=options.nan == "zero",
    )
    if options.json:
        return _print_json(report.to_dict())
    print(report)


def plan(options: argparse.Namespace) -> None:
    """`turboquant-rs plan MODEL`"""
    _set_threads(options)
    output = Path(options.output)
    picture = None
    if options.plot is not None:
        picture = Path(options.plot or output.with_suffix(".png"))
        if not can_draw():
            raise UsageError(f"--plot draws a picture: {NO_MATPLOTLIB}")
    for path in filter(None, (output, picture)):
        _refuse(path, options.force)
    budget = _usage(lambda: Budget(options.bits, options.bytes, options.latency_ms, options.batch))
    scheme = _usage(
        lambda: Scheme(group_size=options.group_size, symmetric=not options.asymmetric, scale=options.scale)
    )
    request = plan_.Request(
        budget,
        scheme,
        choices=options.choices,
        score=options.score,
        tie=options.tie,
        floor=options.floor,
        ceiling=options.ceiling,
        refine=options.refine,
        count=options.windows,
        length=options.length,
        phases=None if options.phases is None else Phases(decode=options.phases),
    )
    found = plan_.run(Path(options.model), Path(options.data), request)
    output.write_text(found.to_json() + "\n", encoding="utf-8")
    if picture is not None:
        found.plot(picture)
    if options.json:
        return _print_json(found.to_dict())
    print(found)
    if isinstance(found, Plan):
        print(f"  written to {output}; turboquant-rs quantize MODEL OUT --plan {output} packs it")
    else:
        print(
            f"  written to {output}; tq.quantize_(model, tq.PhasedPlan.from_json(text)) packs and follows it"
        )


def inspect(options: argparse.Namespace) -> None:
    """`turboquant-rs inspect PATH`"""
    _set_threads(options)
    contents = inspect_checkpoint(Path(options.path))
    compared = None
    if options.original:
        compared = compare_checkpoints(Path(options.original), Path(options.path))
    if options.json:
        return _print_json(contents.to_dict() | ({"against": compared.to_dict()} if compared else {}))
    _print_contents(contents, compared)


def compare(options: argparse.Namespace) -> None:
    """`turboquant-rs compare A B`"""
    _set_threads(options)
    compared = compare_checkpoints(Path(options.original), Path(options.other))
    if options.json:
        return _print_json(compared.to_dict())
    rows = [
        [name, _decibel(d.sqnr_db), f"{d.cosine:.6f}", f"{d.max_error:.3g}"]
        for name, d in (*compared.tensors.items(), ("all of them", compared.total))
    ]
    print(table(["tensor", "SQNR", "cosine", "largest error"], rows))
    _print_names("only in A", compared.only_original)
    _print_names("only in B", compared.only_other)


def bench(options: argparse.Namespace) -> None:
    """`turboquant-rs bench`"""
    _set_threads(options)
    for bits in options.bits:
        _usage(partial(Scheme, bits=bits))
    if options.model is not None:
        return _bench_model(options)
    timings = bench_.run(options.rows, options.columns, options.bits, options.repeats)
    if options.json:
        return _print_json(
            {
                "machine": machine_info(),
                "shape": [options.rows, options.columns],
                "threads": torch.get_num_threads(),
                "timings": [timing.to_dict() for timing in timings],
            }
        )
    rows = [
        [
            t.job, f"{1e3 * t.seconds:.2f} ms", f"{t.gigabytes_per_second:.1f} GB/s",
            _times(t.seconds, t.copy_seconds), _times(t.torch_seconds, t.seconds),
        ]
        for t in timings
    ]  # fmt: skip
    facts = machine_info()
    print(
        f"f32 weight {options.rows} × {options.columns}, groups of {bench_.GROUP}, "
        f"{facts['isa']}, {torch.get_num_threads()} threads, medians of {options.repeats}"
    )
    print(table(["job", "time", "moved", "time of a copy", "faster than torch"], rows))
    print("  a copy moves as many bytes; torch is eager group quantization, or F.linear in f32 for matmul")


def _bench_model(options: argparse.Namespace) -> None:
    results = bench_.run_model(Path(options.model), options.bits, options.batches, options.repeats)
    if options.json:
        return _print_json({"machine": machine_info(), "models": [speeds.to_dict() for speeds in results]})
    for speeds in results:
        print(speeds)
    print("  milliseconds a call; the last column is against the faster of float32 and bfloat16")


def demo(options: argparse.Namespace) -> None:
    """`turboquant-rs demo`"""
    from turboquant_rs.demo import adaptive, run  # the demo and what it needs are loaded for nobody else

    _set_threads(options)
    default = "turboquant-adaptive.png" if options.adaptive else "turboquant-demo.png"
    name = default if options.picture is None else options.picture
    picture = Path(name) if name else None
    result: object
    if options.adaptive:
        result = adaptive.run(picture)
    else:
        result = run(options.sentences, picture, package=not options.small)
    if options.json:
        return _print_json(result.to_dict())
    print(result)


def _scheme(options: argparse.Namespace) -> Scheme:
    if options.nested is not None:
        return _usage(lambda: _nested(options))
    return _usage(
        lambda: Scheme(
            bits=4 if options.bits is None else options.bits,
            group_size=options.group_size,
            symmetric=not options.asymmetric,
            levels=options.levels,
            scale=options.scale,
            scale_dtype=options.scale_dtype,
        )
    )


def _planned(options: argparse.Namespace) -> Plan:
    """The plan named on the command line, which then says all about schemes and which tensors have one."""
    given = {
        "--bits": options.bits is not None,
        "--group-size": options.group_size != 64,
        "--asymmetric": options.asymmetric,
        "--scale": options.scale != "extreme",
        "--scale-dtype": options.scale_dtype != "bf16",
        "--levels": options.levels != "uniform",
        "--nested": options.nested is not None,
        "--include": bool(options.include),
    }
    if twice := [name for name, is_given in given.items() if is_given]:
        raise UsageError(f"--plan says what {' and '.join(twice)} would say; leave {twice[0]} out")
    return read_plan(Path(options.plan))


def _refuse(path: Path, replace: bool) -> None:
    """Refuses a file to be written, before any work is done for it."""
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists; choose another name, or replace it with --force")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no directory; create it before writing {path}")


def _nested(options: argparse.Namespace) -> Scheme:
    if options.bits not in (None, 8):
        raise ValueError(f"--nested is 8 bits, --bits {options.bits} contradicts it; leave --bits out")
    return Scheme(
        bits=8,
        group_size=options.group_size,
        symmetric=not options.asymmetric,
        levels=options.levels,
        planes=options.nested,
        scale=options.scale,
        scale_dtype=options.scale_dtype,
    )


def _rounding(options: argparse.Namespace) -> Rounding:
    if options.rounding == "nearest":
        if options.seed is not None:
            raise UsageError("--seed goes with a stochastic --rounding; nearest draws no random numbers")
        return Rounding.nearest()
    if options.seed is None:
        raise UsageError(f"--rounding {options.rounding} draws random numbers; give --seed")
    mode = "iid" if options.rounding == "stochastic" else options.rounding
    return _usage(lambda: Rounding.stochastic(options.seed, mode=mode))


T = TypeVar("T")


def _usage(build: Callable[[], T]) -> T:
    """Calls `build`; what is wrong with its values is wrong with the command line."""
    try:
        return build()
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _set_threads(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)


def _print_contents(contents: Contents, compared: Comparison | None) -> None:
    rows = []
    for t in contents.tensors:
        row = [t.name, " × ".join(map(str, t.shape)) or "scalar"]
        row += [
            describe_scheme(t.scheme) if t.scheme else t.dtype,
            f"{t.bits_per_element:.2f}",
            human_bytes(t.nbytes),
        ]
        if compared:
            distance = compared.tensors.get(t.name)
            row.append(_decibel(distance.sqnr_db) if distance else "")
        rows.append(row)
    header = ["tensor", "shape", "scheme", "bits an element", "size", *(["SQNR"] if compared else [])]
    print(table(header, rows))
    quantized = [t for t in contents.tensors if t.scheme]
    print(
        f"  {len(contents.tensors)} tensors, {len(quantized)} quantized; {contents.elements:,} elements in "
        f"{human_bytes(contents.nbytes)}, {contents.bits_per_element:.2f} bits each"
    )
    if compared:
        print(f"  SQNR of all compared tensors together: {_decibel(compared.total.sqnr_db)}")


def _print_names(title: str, names: Iterable[str]) -> None:
    if names := list(names):
        print(f"  {title}: {', '.join(map(printable, names))}")


def _times(numerator: float | None, denominator: float | None) -> str:
    return f"{numerator / denominator:.2f}×" if numerator and denominator else ""


def _decibel(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.2f} dB"


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def _print_json(value: object) -> None:
    print(json.dumps(_finite(value), indent=2, default=str))


def _finite(value: object) -> object:
    """`value` with infinities and NaN as null: JSON has neither."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
