"""sandwich: one nested weight, trained to be good at many bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from turboquant_rs import ops
from turboquant_rs.nn.convert import require_module
from turboquant_rs.scheme import Rounding

from .layers import prepared_layers


def sandwich(
    model: nn.Module, bits: Sequence[int] | None = None, *, step: int, seed: int = 0
) -> Iterator[int]:
    """Sets the prepared layers of `model` to the most bits, the fewest, and one choice drawn in between.

        for width in tq.sandwich(model, (2, 3, 4, 8), step=i):
            loss(model, batch).backward()       # gradients add up; then one optimizer step

    The rule of slimmable networks (Yu and Huang 2019): the extremes bound what lies between. bits: among the
    prefixes of the layers' nested scheme; default all of 2 bits and more. step, seed: address the draw. The
    most bits come first, so that their output can teach the others. Afterwards the layers read all their
    bits.

    Raises `ValueError` for a model without prepared layers or whose layers have but one width in common
    (not nested), for bits that a layer cannot read, and a step or seed out of range.
    """
    require_module(model)
    layers, draw = prepared_layers(model), Rounding.stochastic(seed, step)  # checks both
    if not layers:
        raise ValueError(f"{type(model).__name__} has no prepared layers; prepare it with tq.QAT first")
    if bits is not None and not isinstance(bits, Iterable):
        raise TypeError(f"bits must be several numbers of bits, such as (2, 4, 8), got {bits!r}")
    common = set.intersection(*(set(layer.scheme.prefixes) for layer in layers.values()))
    widths = sorted(set(bits) if bits is not None else {width for width in common if width > 1})
    if not widths or not set(widths) <= common:
        raise ValueError(
            f"bits {widths} are not readable in every layer, {sorted(common)} are; prepare with "
            "tq.Scheme.nested"
        )
    if len(common) < 2:
        raise ValueError(
            f"all layers can be read at {sorted(common)} bits alone, and a sandwich has several widths; "
            "prepare them with one nested scheme, such as tq.Scheme.nested(planes=(2, 1, 1, 1, 1, 2))"
        )
    between = widths[1:-1]
    chosen = [widths[-1], widths[0]] if len(widths) > 1 else widths
    if between:
        word, *_ = ops.cpu.philox((0, 2 << 24, 0, draw.step), (draw.seed & 0xFFFFFFFF, draw.seed >> 32))
        chosen.append(between[word * len(between) >> 32])
    try:
        for width in chosen:
            for layer in layers.values():
                layer.read_bits = width
            yield width
    finally:
        for layer in layers.values():
            layer.read_bits = None
