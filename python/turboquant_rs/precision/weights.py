"""The weights of a whole model at the bits of a plan, swapped in for as long as asked: no packing yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from .sensitivity import Sensitivity
from .variants import Variants


class Weights:
    """The layers of a sensitivity in its model, each kept packed at every one of `choices` bits."""

    def __init__(self, model: nn.Module, found: Sensitivity, choices: Sequence[int]) -> None:
        self._parts: dict[str, list[int]] = {}
        for position, layer in enumerate(found.layers):
            self._parts.setdefault(layer.name, []).append(position)
        self._variants = {}
        for name, positions in self._parts.items():
            parts = [found.layers[i] for i in positions]
            modules = list(dict.fromkeys(map(model.get_submodule, (name, *parts[0].aliases))))
            rows = [part.rows[1] - part.rows[0] for part in parts]
            self._variants[name] = Variants(modules, found.scheme, choices, rows)

    @contextmanager
    def at(self, widths: Sequence[int]) -> Iterator[None]:
        """Within the block the model computes with each layer at its bits, in the order of the scores."""
        with ExitStack() as stack:
            for name, positions in self._parts.items():
                stack.enter_context(self._variants[name].swapped([widths[i] for i in positions]))
            yield
