"""Patterns over module names: globs, or `re:` and a regular expression; both match the whole name."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence

from turboquant_rs.errors import NoLayersMatched


class Pattern:
    """`model.layers.*.mlp.*`, `*q_proj`, `re:model\\.layers\\.[01]\\..*`; `ValueError` for a bad one."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"a pattern is a str, got {type(text).__name__} ({text!r})")
        self.text = text
        try:
            self._expression = re.compile(text[3:] if text.startswith("re:") else fnmatch.translate(text))
        except re.error as error:
            raise ValueError(f"pattern {text!r} is no regular expression: {error}") from error

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the whole of `name`."""
        return self._expression.fullmatch(name) is not None

    def singles_out(self, name: str) -> bool:
        """Whether it matches `name` for what it is called, and not any sibling of whatever name.

        `*`, `model.*` do not single out `model.embed_tokens`; `*embed*`, `model.embed_tokens` do.
        """
        parent, _, _ = name.rpartition(".")
        stranger = f"{parent}.\0" if parent else "\0"
        return self.matches(name) and not self.matches(stranger)


def no_match(text: str, candidates: Sequence[str]) -> NoLayersMatched:
    """The error for a pattern that matches none of `candidates`, with the names it may have meant."""
    lines = [f"pattern {text!r} matches no layer"]
    inside = sum(name.startswith(f"{text}.") for name in candidates)
    if inside:
        lines.append(f"it names a module around {inside} of them: write {text + '.*'!r} for all of those")
    elif near := near_misses(text, candidates):
        lines.append("did you mean " + " or ".join(map(repr, near)) + "?")
    lines.append(f"the {len(candidates)} layers are: {summary(candidates)}")
    return NoLayersMatched("; ".join(lines))


def near_misses(text: str, candidates: Sequence[str]) -> list[str]:
    """Up to three candidates whose name, or last part of it, looks like `text` without its wildcards."""
    plain = text.removeprefix("re:").replace("\\.", ".").strip("*.^$")
    by_last_part = {name.rpartition(".")[2]: name for name in reversed(candidates)}
    last_part = plain.rpartition(".")[2]
    close = difflib.get_close_matches(plain, candidates, n=3)
    close += [by_last_part[part] for part in difflib.get_close_matches(last_part, list(by_last_part), n=3)]
    return list(dict.fromkeys(close))[:3]


def summary(names: Sequence[str], limit: int = 24) -> str:
    """`names` with running numbers folded: `h.*.mlp.c_fc (12)`, each one a pattern that would match."""
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    shown = [f"{pattern} ({len(group)})" if len(group) > 1 else group[0] for pattern, group in folded.items()]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more
