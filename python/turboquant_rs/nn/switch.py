"""Switch: several precisions of one model, of which every forward reads exactly one.

    switch.level = 3  ──►  model(x)  begins: 3 is noted for this thread  ──►  each layer reads bits[3]
                 └──►  memory of the GPU  ──►  a graph of model(x)  begins: noted there  ──┘

A layer under a switch holds the bits it has at every level; which one counts is asked where it is used. Thus
switching stores one integer: it allocates nothing, packs nothing and waits for nobody. For graphs that have
captured the model it is written to the memory of the GPU too, on torch's current stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from turboquant_rs.ops.cuda.chosen import NUMBERS, Choice, Number, capturing

if TYPE_CHECKING:
    from .weight import PackedWeight

Choose = Callable[[tuple[Any, ...], dict[str, Any]], int]
"""The level of a forward by its arguments (args, kwargs)."""


class Switch:
    """The levels of a model; made by `nn.precision.switchable`.

    A forward of the model itself reads, from its first layer to its last, the level that held when it began,
    whatever other threads do meanwhile. Layers that are called on their own read the level of the moment.

    So does every replay of a CUDA graph that has captured such a forward; `choose` is asked at capture alone.

    Under torch.compile the level is a constant of the graph, guarded: each level compiles once, up to
    `torch._dynamo.config.recompile_limit` of them. A graph break within the model splits a forward in two,
    which may read different levels.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, PackedWeight],
        levels: Sequence[Mapping[str, int]],
        choose: Choose | None,
    ) -> None:
        """levels: {layer: bits} for the same `layers` each. choose: overrides `level`, forward by forward."""
        self._level, self._count, self._choose = 0, len(levels), choose
        self._number = Number(0)
        self.removed = False
        self._here = _Here()
        self._layers = dict(layers)
        for name, layer in layers.items():
            layer._read_as(Rungs(self, tuple(level[name] for level in levels)))
        self._hooks = (
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        )

    @property
    def level(self) -> int:
        """What forwards read that begin from now on. Raises `ValueError` for a level that does not exist."""
        return self._level

    @level.setter
    def level(self, level: int) -> None:
        if type(level) is not int or not 0 <= level < self._count:
            raise ValueError(f"there is no level {level!r}; there are 0 to {self._count - 1}")
        self._level = level
        self._number.set(level)

    @property
    def current(self) -> int:
        """The level of the forward that this thread is in, else that of the moment."""
        if torch.compiler.is_compiling():
            return self._level
        level = self._here.level
        return self._level if level is None else level

    def number(self, device: int) -> Tensor | None:
        """Where a graph that is being captured finds the level: as the forward that this thread is in began,
        else that of the moment. None where it is a constant of the graph.

        Raises `ValueError` if there are more levels than launches can be chosen by.
        """
        if self._choose is not None:
            return None
        if self._count > NUMBERS:
            raise ValueError(
                f"a CUDA graph follows ladders of up to {NUMBERS} levels, this one has {self._count}; use "
                f"plan.ladder({NUMBERS})"
            )
        notes, number = self._here.notes, self._number.on(device)
        if notes is None:
            return number
        if device not in notes:
            notes[device] = number.clone()
        return notes[device]

    def remove(self) -> None:
        """Ends it: the layers that it still has keep the bits of the level that holds."""
        self.removed = True
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers.values():
            if isinstance(layer._read_bits, Rungs) and layer._read_bits.switch is self:
                layer._read_as(layer._read_bits.bits[self._level])

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Noted anew each time: after an interrupt, which runs no hooks, an old note may be left.
        if not torch.compiler.is_compiling():
            self._here.level = self._level if self._choose is None else self._choose(args, kwargs)
            self._here.notes = None
            if capturing() and self._choose is None:
                self._here.notes = {}
                self.number(torch.cuda.current_device())

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._here.level = self._here.notes = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _here=_Here())


class Rungs:
    """What a layer under a switch has in place of a number of bits: `bits` of them at each level."""

    __slots__ = ("bits", "switch")

    def __init__(self, switch: Switch, bits: tuple[int, ...]) -> None:
        self.switch, self.bits = switch, bits

    def now(self) -> int:
        """The bits that count in this thread."""
        return self.bits[self.switch.current]

    def choice(self, device: int) -> Choice | None:
        """What a graph that is being captured chooses the bits by; None where they are constants of it."""
        number = self.switch.number(device)
        if number is None:
            return None
        widths: dict[int, int] = {}
        for level, bits in enumerate(self.bits):
            widths[bits] = widths.get(bits, 0) | 1 << level
        return Choice(number, widths)


class _Here(threading.local):
    level: int | None = None
    notes: dict[int, Tensor] | None = None  # while a graph captures the forward: the level, by device
