"""sandwich: one nested weight, trained to be good at many bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from turboquant_rs import ops

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

    Raises `ValueError` for a model without prepared layers, and bits that a layer cannot read.
    """
    layers = prepared_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no prepared layers; prepare it with tq.QAT first")
    common = set.intersection(*(set(layer.scheme.prefixes) for layer in layers.values()))
    widths = sorted(set(bits) if bits is not None else {width for width in common if width > 1})
    if not widths or not set(widths) <= common:
        raise ValueError(
            f"bits {widths} are not readable in every layer, {sorted(common)} are; prepare with "
            "tq.Scheme.nested"
        )
    between = widths[1:-1]
    chosen = [widths[-1], widths[0]] if len(widths) > 1 else widths
    if between:
        word, *_ = ops.cpu.philox((0, 2 << 24, 0, step % 2**32), (seed & 0xFFFFFFFF, seed >> 32))
        chosen.append(between[word * len(between) >> 32])
    try:
        for width in chosen:
            for layer in layers.values():
                layer.read_bits = width
            yield width
    finally:
        for layer in layers.values():
            layer.read_bits = None
