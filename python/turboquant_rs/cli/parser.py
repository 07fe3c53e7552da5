"""The grammar of the command line; every verb carries the function of `commands` that runs it."""

from __future__ import annotations

import argparse
from typing import NoReturn

from turboquant_rs.cli import commands
from turboquant_rs.cli.commands import UsageError
from turboquant_rs.precision import Phases

__all__ = ["UsageError", "build_parser"]

DESCRIPTION = "Quantize tensors and models to packed low-bit planes."
SELECTION = (
    "By default the floating-point matrices named *.weight are quantized, except embeddings, norms, routers "
    "and output heads. --include takes shell globs of tensor names and replaces that rule; --exclude removes "
    "from whatever is selected. Everything else is copied unchanged and listed with its reason."
)


PLANNING = (
    "Layers are scored by gradients over the text: what each costs at each number of bits, in nats of KL. "
    "The plan spends the budget where that falls most; scales count. --data is a UTF-8 text like what the "
    "model will see; some thousand tokens do."
)


class _Parser(argparse.ArgumentParser):
    """One line for a wrong command line, as for every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `turboquant-rs`; parsed options have `run`, the function to call with them."""
    parser = _Parser(prog="turboquant-rs", description=DESCRIPTION)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _info(verbs.add_parser("info", help="what this machine and this build can do"))
    _quantize(
        verbs.add_parser(
            "quantize", help="quantize a safetensors file or a model directory", epilog=SELECTION
        )
    )
    _plan(
        verbs.add_parser(
            "plan", help="say how many bits each layer of a language model gets", epilog=PLANNING
        )
    )
    _inspect(verbs.add_parser("inspect", help="what is in a file or model directory, and what it costs"))
    _compare(verbs.add_parser("compare", help="how far apart two checkpoints are, tensor by tensor"))
    _bench(verbs.add_parser("bench", help="time this machine against torch eager and plain copies"))
    _demo(verbs.add_parser("demo", help="quantize a real sentence encoder and say what it costs"))
    return parser


def _common(verb: argparse.ArgumentParser, run: commands.Command, threads: bool = True) -> None:
    verb.set_defaults(run=run)
    verb.add_argument("--json", action="store_true", help="print one JSON document")
    if threads:
        verb.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")


def _info(verb: argparse.ArgumentParser) -> None:
    _common(verb, commands.info, threads=False)


def _quantize(verb: argparse.ArgumentParser) -> None:
    _common(verb, commands.quantize)
    verb.add_argument(
        "source", metavar="IN", help="a .safetensors file, or a directory of them with its config"
    )
    verb.add_argument("target", metavar="OUT", help="a new file or directory, of the same kind as IN")
    scheme = verb.add_argument_group("scheme")
    scheme.add_argument("--bits", type=int, metavar="B", help="1…8 (default 4; 8 if nested)")
    scheme.add_argument(
        "--group-size", type=_group_size, default=64, metavar="N",
        help="elements that share a scale, at least 8, or 'row' (default 64)",
    )  # fmt: skip
    scheme.add_argument("--asymmetric", action="store_true", help="store a zero point for each group")
    scheme.add_argument(
        "--scale", choices=("extreme", "mse"), default="extreme", help="how scales are chosen"
    )
    scheme.add_argument("--scale-dtype", choices=("bf16", "f16", "f32"), default="bf16")
    scheme.add_argument(
        "--levels", choices=("uniform", "nf4", "lloyd"), default="uniform", help="what the codes stand for"
    )
    scheme.add_argument(
        "--nested", nargs="?", type=_planes, const=(4, 4), metavar="PLANES",
        help="8 bits whose prefixes can be read alone: 4,4 (default) or 4,1,1,2 or 2,1,1,1,1,2",
    )  # fmt: skip
    verb.add_argument(
        "--plan", metavar="JSON", help="what 'plan' wrote: in place of one scheme for all tensors"
    )
    rounding = verb.add_argument_group("rounding")
    rounding.add_argument(
        "--rounding", default="nearest", metavar="MODE",
        choices=("nearest", "stochastic", "iid", "antithetic", "stratified", "systematic", "subtractive"),
        help="nearest (default, best for weights), or a stochastic mode: iid (= stochastic), antithetic, "
        "stratified, systematic, subtractive",
    )  # fmt: skip
    rounding.add_argument(
        "--seed", type=int, metavar="S", help="seed of stochastic rounding (required there)"
    )
    verb.add_argument(
        "--nan", choices=("error", "zero"), default="error", help="what a NaN is (default error)"
    )
    selection = verb.add_argument_group("selection")
    selection.add_argument("--include", nargs="+", action="extend", default=[], metavar="GLOB")
    selection.add_argument("--exclude", nargs="+", action="extend", default=[], metavar="GLOB")
    verb.add_argument("--dry-run", action="store_true", help="say what would be done and how big it becomes")
    verb.add_argument("--force", action="store_true", help="replace OUT if it is a file that exists")


def _plan(verb: argparse.ArgumentParser) -> None:
    _common(verb, commands.plan)
    verb.add_argument("model", metavar="MODEL", help="directory of a causal language model (transformers)")
    verb.add_argument("--data", required=True, metavar="FILE", help="UTF-8 text to score on")
    budget = verb.add_argument_group("budget").add_mutually_exclusive_group(required=True)
    budget.add_argument("--bits", type=float, metavar="B", help="bits an element, scales included: 4.0")
    budget.add_argument("--bytes", type=_positive, metavar="N", help="bytes of the planned weights")
    budget.add_argument(
        "--latency-ms",
        type=float,
        metavar="MS",
        help="of one call of each layer, by the kernels of this machine",
    )
    verb.add_argument(
        "--batch", type=_positive, default=1, metavar="M", help="rows of input for --latency-ms"
    )
    verb.add_argument("-o", "--output", required=True, metavar="JSON", help="where the plan is written")
    verb.add_argument(
        "--plot", nargs="?", const="", metavar="PNG", help="draw the plan (default: beside the output)"
    )
    verb.add_argument("--force", action="store_true", help="replace the files if they exist")
    scheme = verb.add_argument_group("scheme")
    scheme.add_argument("--group-size", type=_group_size, default=64, metavar="N", help="as in quantize")
    scheme.add_argument("--asymmetric", action="store_true", help="store a zero point for each group")
    scheme.add_argument(
        "--scale", choices=("extreme", "mse"), default="extreme", help="how scales are chosen"
    )
    search = verb.add_argument_group("search")
    search.add_argument(
        "--choices", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8], metavar="B", help="default 2 3 4 5 6 8"
    )
    search.add_argument(
        "--score", choices=("fisher", "probe", "error"), default="fisher",
        help="gradients (default), KL measured layer by layer, or errors of outputs",
    )  # fmt: skip
    search.add_argument(
        "--tie", nargs="+", action="extend", default=[], metavar="REGEX",
        help="layers of one parent that share their bits: 'q_proj|k_proj|v_proj'",
    )  # fmt: skip
    search.add_argument("--floor", type=int, default=2, metavar="B", help="fewest bits (default 2)")
    search.add_argument("--ceiling", type=int, default=8, metavar="B", help="most bits (default 8)")
    search.add_argument(
        "--refine", type=int, default=0, metavar="N", help="swaps to try by measured KL (default 0)"
    )
    search.add_argument(
        "--phases", nargs="?", type=_bounds, const=(0, 32, None), metavar="BOUNDS",
        help="bits for prefill and for ranges of decode positions: 0,32 (default) is the first 32 tokens and "
        "the others; half of a window stands for the prompt",
    )  # fmt: skip
    search.add_argument("--windows", type=_positive, default=16, metavar="N", help="of text (default 16)")
    search.add_argument(
        "--length", type=_positive, default=512, metavar="N", help="tokens each (default 512)"
    )


def _inspect(verb: argparse.ArgumentParser) -> None:
    _common(verb, commands.inspect)
    verb.add_argument("path", metavar="PATH")
    verb.add_argument(
        "--original", metavar="PATH", help="what it was made from: adds the SQNR of every tensor"
    )


def _compare(verb: argparse.ArgumentParser) -> None:
    _common(verb, commands.compare)
    verb.add_argument("original", metavar="A", help="the original")
    verb.add_argument("other", metavar="B", help="what is measured against it")


def _bench(verb: argparse.ArgumentParser) -> None:
    _common(verb, commands.bench)
    verb.add_argument(
        "model", metavar="MODEL", nargs="?",
        help="a .safetensors file or model directory: time the shapes of its linear layers against f32 and "
        "bf16, instead of one weight of --rows and --columns",
    )  # fmt: skip
    verb.add_argument(
        "--rows", type=_positive, default=4096, metavar="N", help="of the weight (default 4096)"
    )
    verb.add_argument(
        "--columns", type=_positive, default=4096, metavar="K", help="of the weight (default 4096)"
    )
    verb.add_argument("--bits", type=int, nargs="+", default=[4, 8], metavar="B", help="default: 4 8")
    verb.add_argument(
        "--batches", type=_positive, nargs="+", default=[1, 64], metavar="M",
        help="rows of the input, with MODEL (default: 1 64)",
    )  # fmt: skip
    verb.add_argument("--repeats", type=_positive, default=7, metavar="R", help="rounds; medians are shown")


def _demo(verb: argparse.ArgumentParser) -> None:
    _common(verb, commands.demo)
    verb.add_argument(
        "--sentences", type=_positive, default=256, metavar="N", help="at least 200 (default 256)"
    )
    verb.add_argument(
        "--picture", metavar="PNG",
        help="where to draw (default turboquant-demo.png, turboquant-adaptive.png; '' for none)",
    )  # fmt: skip
    verb.add_argument("--small", action="store_true", help="train a small encoder instead of using MiniLM")
    verb.add_argument(
        "--adaptive",
        action="store_true",
        help="serve a burst of requests with precision that follows the load",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _group_size(text: str) -> int | None:
    if text == "row":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor 'row'")
    return int(text)


def _bounds(text: str) -> tuple[int | None, ...]:
    try:
        return Phases(decode=(*map(int, text.split(",")), None)).decode
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of bounds from 0 on, such as 0,32") from None


def _planes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of plane widths such as 4,4") from None
