"""Phases: time intervals of a generation, and how a forward tells which one it is in.

Prefill is the forward that reads the prompt; decode positions count the tokens generated since.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Phases:
    """Intervals that get bits of their own: prefill, and ranges of decode positions.

    prefill: whether it is an interval of its own; else it belongs to the first one of decode.
    decode: bounds from 0 on, None for no end: (0, 32, None) is the first 32 tokens and those that follow.
    prompt: how many tokens of each scored sequence stand for the prompt; None: half of them.

    Raises `ValueError` for bounds that do not ascend from 0 to None, `TypeError` where prefill is no bool.
    """

    prefill: bool = True
    decode: tuple[int | None, ...] = (0, 32, None)
    prompt: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prefill, bool):
            raise TypeError(f"prefill must be True or False, got {self.prefill!r}")
        *bounds, end = (self.decode if isinstance(self.decode, tuple | list) else ()) or (self.decode,)
        whole = [bound for bound in bounds if isinstance(bound, int) and not isinstance(bound, bool)]
        rising = all(a < b for a, b in pairwise(whole))
        if len(whole) < len(bounds) or end is not None or whole[:1] != [0] or not rising:
            raise ValueError(f"decode must ascend from 0 to None, such as (0, 32, None), got {self.decode!r}")
        object.__setattr__(self, "decode", tuple(self.decode))
        if self.prompt is not None and (type(self.prompt) is not int or self.prompt < 1):
            raise ValueError(f"prompt must be a whole number of tokens above 0, got {self.prompt!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """What the intervals are called, in order."""
        ranges = [f"decode {a}…{'' if b is None else b - 1}" for a, b in pairwise(self.decode)]
        return (*(("prefill",) if self.prefill else ()), *ranges)

    def at(self, generated: int | None) -> int:
        """The interval of the forward that reads the token of that decode position; None: the prompt."""
        if generated is None:
            return 0
        found = max(i for i, bound in enumerate(self.decode[:-1]) if bound is not None and bound <= generated)
        return found + self.prefill

    def of(self, length: int) -> Tensor:
        """The interval of every position of a scored sequence: (length,) int64.

        Raises `ValueError` where the sequence leaves nothing to decode.
        """
        generated = torch.arange(length) - self.prompt_of(length)
        bounds = torch.tensor([bound for bound in self.decode[1:] if bound is not None], dtype=torch.int64)
        found = torch.bucketize(generated, bounds, right=True) + self.prefill
        return found.where(generated >= 0, self.at(None))

    def prompt_of(self, length: int) -> int:
        """The tokens of a sequence that stand for the prompt."""
        prompt = length // 2 if self.prompt is None else self.prompt
        if not 0 < prompt < length:
            raise ValueError(
                f"a sequence of {length} tokens does not hold a prompt of {prompt} and something to decode; "
                "give longer batches, or Phases(prompt=…)"
            )
        return prompt

    def forwards(self, length: int) -> tuple[int, ...]:
        """How many forwards of a generation of that length fall into each interval; prefill is one."""
        prompt = self.prompt_of(length)
        found = [0] * len(self.names)
        found[self.at(None)] += 1
        for generated in range(length - prompt):
            found[self.at(generated)] += 1
        return tuple(found)


class Position:
    """Which interval a forward is in, by what it is called with: `choose` of `nn.precision.switchable`.

    The tokens in its cache (`past_key_values`, later named `cache`, or `cache_position`) are what the model
    itself goes by. A forward without a cache, or of several tokens, is prefill.
    """

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._starts: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The interval of a forward with these arguments."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        past = _cached(cache, kwargs.get("cache_position"))
        length = _length(args, kwargs)
        if not past or length != 1:
            self._note(cache, past + length)
            return self._phases.at(None)
        return self._phases.at(past - self._start(cache, past))

    def _note(self, cache: Any, prompt: int) -> None:
        if cache is not None and not isinstance(cache, tuple):
            self._starts[cache] = prompt

    def _start(self, cache: Any, past: int) -> int:
        """The length of the prompt; what is in a cache never seen before is one."""
        if cache is None or isinstance(cache, tuple):
            return 0
        return self._starts.setdefault(cache, past)

    def __getstate__(self) -> dict[str, Phases]:
        return {"phases": self._phases}  # notes about caches do not go along

    def __setstate__(self, state: dict[str, Phases]) -> None:
        self._phases, self._starts = state["phases"], weakref.WeakKeyDictionary()


def _cached(cache: Any, position: Any) -> int:
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, tuple) and cache:
        return int(cache[0][0].shape[-2])
    return int(position[0]) if isinstance(position, Tensor) and position.numel() else 0


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens a sequence of a forward."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(value, Tensor) and value.dim() >= 2:
            return int(value.shape[1])
    return 0
