"""Which tensors of a checkpoint are quantized: a rule over names and shapes, and a reason for every other."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch

from turboquant_rs.errors import NoLayersMatched
from turboquant_rs.nn.patterns import Pattern, no_match, summary

__all__ = ["select"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# The default rule leaves these alone: tables that are looked up, not multiplied, and small matrices whose
# errors decide much. An expression is matched against each part of the dotted name.
SPARED = {
    "an embedding": re.compile(r".*embed.*|wte|wpe|shared|.*relative_attention_bias"),
    "a norm": re.compile(r".*norm.*|ln(_.*|\d+)?"),
    "an output head": re.compile(r"lm_head|output_head|classifier|score"),
    "a router": re.compile(r"router|gate"),
}


_CONV1D = re.compile(r"(.*\.)?(c_attn|q_attn|c_proj|c_fc)\.weight")


def select(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, str]:
    """Name → reason to leave the tensor alone; an empty reason means: quantize it.

    tensors: name → dtype and shape. Without `include`, the floating-point matrices named `*.weight` that are
    no embedding, norm, output head or router are selected; with it, every floating-point tensor of two or
    more dimensions that a pattern matches. `exclude` removes from either. Patterns are globs, or `re:` and a
    regular expression, over whole names.

    Raises: NoLayersMatched if a pattern, or the call as a whole, matches nothing.
    """
    names = list(tensors)
    included, excluded = [Pattern(text) for text in include], [Pattern(text) for text in exclude]
    for pattern in (*included, *excluded):
        if not any(map(pattern.matches, names)):
            raise no_match(pattern.text, names)
    reasons = {}
    transposed = _transposed(tensors)
    for name, (dtype, shape) in tensors.items():
        out = next((pattern for pattern in excluded if pattern.matches(name)), None)
        if out is not None:
            reasons[name] = f"--exclude {out.text}"
        elif included and not any(pattern.matches(name) for pattern in included):
            reasons[name] = "no --include pattern selects it"
        elif name in transposed:
            reasons[name] = (
                "a Conv1D weight, stored as (in, out) while groups run along the input; load the model and "
                "use tq.quantize_ and tq.save"
            )
        else:
            reasons[name] = _obstacle(dtype, shape) or ("" if included else _spared(name, shape))
    if all(reasons.values()):
        raise NoLayersMatched(
            f"none of the {len(names)} tensors is quantized ({_first(reasons)}); "
            f"choose some by name with --include; there are: {summary(names)}"
        )
    return reasons


def _transposed(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> set[str]:
    """The weights of transformers' Conv1D, (in, out), as GPT-2 has them.

    Linear layers of other models bear the same names. The projection to queries, keys and values tells which
    way round they are stored: (n, 3n) is Conv1D's.
    """
    weights = {name: shape for name, (_, shape) in tensors.items() if _CONV1D.fullmatch(name)}
    projections = [shape for name, shape in weights.items() if name.endswith("c_attn.weight")]
    if any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in projections):
        return set(weights)
    return set()


def _obstacle(dtype: torch.dtype, shape: Sequence[int]) -> str:
    if dtype not in FLOATS:
        return f"{str(dtype).removeprefix('torch.')}: only f32, f64, f16 and bf16 are quantized"
    if len(shape) < 2:
        return f"{len(shape)}-dimensional"
    return "" if math.prod(shape) else "empty"


def _spared(name: str, shape: Sequence[int]) -> str:
    *path, last = name.split(".")
    if last != "weight":
        return "not named *.weight"
    if len(shape) != 2:
        return f"{len(shape)}-dimensional: quantized only where --include selects it"
    for what, words in SPARED.items():
        if any(words.fullmatch(part) for part in path):
            return what
    return ""


def _first(reasons: Mapping[str, str], count: int = 3) -> str:
    shown = [f"{name}: {reason}" for name, reason in list(reasons.items())[:count]]
    return "; ".join([*shown, "…"] if len(reasons) > count else shown)
