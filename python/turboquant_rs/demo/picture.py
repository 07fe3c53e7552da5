"""The demo's picture: error and neighbour overlap against bits."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turboquant_rs.picture import GRID, INK, NO_MATPLOTLIB, QUIET, can_draw, dress, new_figure
from turboquant_rs.quality import EmbeddingQuality

__all__ = ["NO_MATPLOTLIB", "can_draw", "draw"]

Curve = Sequence[tuple[int, EmbeddingQuality]]
"""(bits, quality) pairs, bits ascending."""

STYLES = (("#1f5fbf", "o"), ("#d9772b", "s"), ("#2a9d74", "^"), ("#8b5fbf", "D"))


def draw(curves: Mapping[str, Curve], path: Path, title: str, subtitle: str) -> None:
    """Writes the PNG: left the error 1 − cosine (log scale), right the neighbour overlap, one curve a scheme.

    The first curve carries a band from the 5th to the 95th percentile of the sentences. Raises
    BackendUnavailable where matplotlib is missing, OSError where `path` cannot be written.
    """
    figure = new_figure(10.4, 4.9)
    ticker = importlib.import_module("matplotlib.ticker")
    error_axes, overlap_axes = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.975, top=0.77, bottom=0.13, wspace=0.2)
    figure.text(0.022, 0.945, title, fontsize=15, fontweight="bold", color=INK, va="center")
    figure.text(0.022, 0.885, subtitle, fontsize=9.5, color=QUIET, va="center")
    for index, (name, curve) in enumerate(curves.items()):
        _draw_curve(error_axes, overlap_axes, name, curve, index)
    error_axes.set_yscale("log")
    error_axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    overlap_axes.set_ylim(None, 103)
    overlap_axes.yaxis.set_major_formatter(ticker.PercentFormatter(decimals=0))
    neighbours = next(iter(curves.values()))[0][1].neighbours
    _dress(error_axes, "Error of the embeddings: 1 − cosine to f32", curves)
    _dress(overlap_axes, f"Nearest {neighbours} neighbours kept", curves)
    overlap_axes.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=INK, handlelength=1.6)
    figure.savefig(path, format="png")


def _draw_curve(error_axes: Any, overlap_axes: Any, name: str, curve: Curve, index: int) -> None:
    color, marker = STYLES[index % len(STYLES)]
    style = {"color": color, "marker": marker, "markersize": 5.5, "linewidth": 1.8, "label": name}
    style |= {"markeredgecolor": "white", "markeredgewidth": 0.9, "zorder": 5 - index / 10}
    bits = [b for b, _ in curve]
    errors = [1 - quality.mean_cosine for _, quality in curve]
    if bits != list(range(bits[0], bits[-1] + 1)):  # single points: nothing was measured between them
        style |= {"linestyle": "none", "markersize": 9, "markeredgecolor": color, "markerfacecolor": "none"}
        style |= {"markeredgewidth": 1.5, "zorder": 6}
    error_axes.plot(bits, errors, **style)
    overlap_axes.plot(bits, [100 * quality.overlap for _, quality in curve], **style)
    if index == 0:
        low = [1 - quality.p95_cosine for _, quality in curve]
        high = [1 - quality.p05_cosine for _, quality in curve]
        error_axes.fill_between(bits, low, high, color=color, alpha=0.13, linewidth=0)
        for b, error in zip(bits, errors, strict=True):
            if b in (4, 8):
                error_axes.annotate(
                    f"{error:.2g}", (b, error), (7, 8), textcoords="offset points",
                    fontsize=9, color=color, fontweight="bold",
                )  # fmt: skip


def _dress(axes: Any, title: str, curves: Mapping[str, Curve]) -> None:
    """House style: no frame, quiet grid, title at the left, whole bits as ticks."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=9)
    axes.set_xlabel("bits a weight (linear layers)", fontsize=9.5, color=QUIET)
    axes.set_xticks(sorted({b for curve in curves.values() for b, _ in curve}))
    axes.margins(x=0.12)
    axes.grid(True, color=GRID, linewidth=0.9)
    dress(axes)
