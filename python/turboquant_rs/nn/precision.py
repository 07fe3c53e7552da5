"""How many bits of each code a model reads: set for good, for a `with` block, or switched by the forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from turboquant_rs.errors import NoLayersMatched

from .convert import require_module
from .patterns import Pattern, no_match, summary
from .switch import Choose, Rungs, Switch
from .weight import PackedWeight

Layers = dict[str, PackedWeight]


def set_precision(model: nn.Module, bits: int | Mapping[str, int | None] | None) -> None:
    """Makes the quantized layers of `model` read the first `bits` bits of every code (None: all of them).

    Nothing is copied, repacked or waited for. CUDA graphs that have captured the layers read that many bits
    from their next replay on, bit for bit what a new graph would give. Refinement (`tq.refine`) of these
    layers ends. With a mapping of patterns
    (globs on module names, or `re:` and a regular expression; the first match wins) the layers that no
    pattern matches keep the precision they have.

    Layers under a `tq.PrecisionController` leave it by this.

    Raises `ValueError`, and changes nothing, if a layer cannot be read at that width: a prefix ends where a
    bit plane ends, see `tq.Scheme.nested`. Raises `NoLayersMatched` if `model` has no quantized layers, or if
    a pattern matches none of them.
    """
    layers = _quantized_layers(model)
    wanted = _wanted(layers, bits)
    _require_readable(layers, wanted)
    for name, width in wanted.items():
        layers[name].read_bits = width


@contextmanager
def precision(model: nn.Module, bits: int | Mapping[str, int | None] | None) -> Iterator[nn.Module]:
    """`with tq.precision(model, 4): ...`: `set_precision`, undone at the end of the block, however it ends.

    Blocks may be nested. The precision belongs to the layers, so other threads that use the model see it.
    """
    before = [(layer, layer._read_bits, layer._rows) for layer in _quantized_layers(model).values()]
    set_precision(model, bits)
    try:
        yield model
    finally:
        for layer, width, rows in before:
            if isinstance(width, Rungs) and width.switch.removed:
                width = width.now()
            layer._read_as(width, rows)


def switchable(model: nn.Module, levels: Sequence[Mapping[str, int]], choose: Choose | None = None) -> Switch:
    """Puts the layers that `levels` name under a switch, at level 0 (see `nn.switch`).

    levels: {name of a layer: bits} each, all for the same layers. choose: the level of a forward by its
    arguments, in place of `switch.level`.

    Raises `ValueError`, and changes nothing, if a layer cannot be read at one of the levels, is under a
    switch already, or is refined; `NoLayersMatched` if a name is that of no quantized layer.
    """
    found = _quantized_layers(model)
    missing = [name for name in levels[0] if name not in found]
    if missing:
        raise NoLayersMatched(f"{summary(missing)} are no quantized layers; quantize with the plan first")
    layers = {name: found[name] for name in levels[0]}
    require_free(layers)
    if refined := [name for name, layer in layers.items() if layer._rows is not None]:
        raise ValueError(
            f"{summary(refined)} are refined row by row (tq.refine), which no ladder moves; end that first "
            "with tq.set_precision(model, None)"
        )
    for level in levels:
        _require_readable(layers, level)
    return Switch(model, layers, levels, choose)


def require_free(layers: Mapping[str, PackedWeight]) -> None:
    """Raises `ValueError` where layers are under a switch."""
    if taken := [name for name, layer in layers.items() if isinstance(layer._read_bits, Rungs)]:
        raise ValueError(
            f"{summary(taken)} follow a ladder, or the intervals of a plan; close the "
            "tq.PrecisionController (controller.close()), or end it with tq.set_precision(model, None)"
        )


def _require_readable(layers: Layers, wanted: Mapping[str, int | None]) -> None:
    """Raises `ValueError` with all the layers that cannot be read at the bits wanted."""
    refused = [
        f"{name} ({' or '.join(map(str, layers[name].readable_bits))})"
        for name, width in wanted.items()
        if width is not None and (type(width) is not int or width not in layers[name].readable_bits)
    ]
    if refused:
        shown = ", ".join(refused[:8]) + (f" and {len(refused) - 8} more" if len(refused) > 8 else "")
        raise ValueError(
            f"{len(refused)} of {len(wanted)} layers cannot be read at the bits asked for; they allow: "
            f"{shown}; quantize with tq.Scheme.nested to make prefixes readable"
        )


def _quantized_layers(model: nn.Module) -> Layers:
    require_module(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    if not layers:
        raise NoLayersMatched(
            f"{type(model).__name__} has no quantized layers to set the precision of; call tq.quantize_ first"
        )
    return layers


def _wanted(layers: Layers, bits: int | Mapping[str, int | None] | None) -> dict[str, int | None]:
    if not isinstance(bits, Mapping):
        return dict.fromkeys(layers, bits)
    wanted: dict[str, int | None] = {}
    for text, width in bits.items():
        pattern = Pattern(text)
        matched = [name for name in layers if pattern.matches(name)]
        if not matched:
            raise no_match(text, list(layers))
        wanted.update((name, width) for name in matched if name not in wanted)
    return wanted
