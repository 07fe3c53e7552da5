"""The pictures of a sensitivity (layer × bits), a plan (bits by layer) and a history (bits over time)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboquant_rs.picture import ACCENT, GRID, INK, QUIET, dress, new_figure, save

if TYPE_CHECKING:
    from .history import History
    from .plan import Plan
    from .sensitivity import Sensitivity

LINE = 0.17  # inches a layer


def draw_sensitivity(found: Sensitivity, path: str | Path) -> None:
    """A heat map: one line a layer, one column a choice, the logarithm of the score as colour."""
    scores = [score for layer in found.layers for score in layer.scores]
    least = min((score for score in scores if score > 0), default=1.0)
    values = [[math.log10(max(score, least)) for score in layer.scores] for layer in found.layers]
    figure, axes = _axes(len(found.layers), 7.0, f"What each layer costs {found.model}")
    image = axes.imshow(values, aspect="auto", cmap="YlOrRd")
    axes.set_xticks(range(len(found.choices)), [str(bits) for bits in found.choices])
    axes.set_yticks(range(len(found.layers)), [layer.key for layer in found.layers])
    axes.set_xlabel("bits a weight", fontsize=9.5, color=QUIET)
    dress(axes)
    axes.tick_params(labelsize=7.5)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=QUIET, labelsize=8, length=0)
    what = "relative error" if found.score == "error" else f"KL in nats ({found.score})"
    bar.set_label(f"log₁₀ of the {what}", fontsize=9, color=QUIET)
    save(figure, path)


def draw_plan(plan: Plan, path: str | Path) -> None:
    """Bars: the bits of each layer, as thick as it is large."""
    draw_plans([plan], [f"{plan.effective_bits:.2f} bits an element for {plan.sensitivity.model}"], path)


def draw_plans(plans: Sequence[Plan], titles: Sequence[str], path: str | Path) -> None:
    """The bars of plans for the same layers, side by side."""
    layers = plans[0].sensitivity.layers
    figure = new_figure(3.2 + 3.8 * len(plans), 1.4 + LINE * max(len(layers), 4))
    panels = figure.subplots(1, len(plans), sharey=True, squeeze=False)[0]
    largest = max(layer.elements for layer in layers)
    heights = [0.25 + 0.6 * math.sqrt(layer.elements / largest) for layer in layers]
    for axes, plan, title in zip(panels, plans, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
        axes.barh(range(len(layers)), plan.widths, height=heights, color=ACCENT)
        axes.axvline(plan.effective_bits, color=INK, linewidth=1)
        axes.set_yticks(range(len(layers)), [layer.key for layer in layers])
        axes.set_xticks(range(9))
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_xlabel("bits a weight; the line: effective bits, scales counted", fontsize=9.5, color=QUIET)
        axes.grid(True, axis="x", color=GRID, linewidth=0.9)
        dress(axes)
        axes.tick_params(labelsize=7.5)
    save(figure, path)


def draw_history(history: History, path: str | Path) -> None:
    """Over time: the latency of each step beside the promise, what waits if that is known, and the bits."""
    steps = list(history)
    start = steps[0][0] if steps else 0.0
    times = [step[0] - start for step in steps]
    waiting = [step[2] for step in steps]
    rows = 3 if any(queue is not None for queue in waiting) else 2
    figure = new_figure(8.6, 1.0 + 1.5 * rows)
    first, *others = figure.subplots(rows, 1, sharex=True)
    first.set_title("Precision under load", loc="left", fontsize=12, fontweight="bold", color=INK, pad=12)
    promise = history.settings.slo.p95_ms
    first.plot(times, [step[1] for step in steps], ".", color=ACCENT, markersize=3, alpha=0.6)
    first.axhline(promise, color=INK, linewidth=1)
    first.annotate(
        f"promised: {promise:g} ms", (1, promise), (0, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", fontsize=8.5, color=INK,
    )  # fmt: skip
    first.set_ylim(0, None)
    if rows == 3:
        others[0].fill_between(times, [queue or 0 for queue in waiting], step="post", color=QUIET, alpha=0.35)
        others[0].set_ylim(0, None)
    others[-1].step(times, [history.settings.bits[step[-1]] for step in steps], where="post", color=ACCENT)
    others[-1].set_xlabel("seconds", fontsize=9.5, color=QUIET)
    labels = ("ms a step", "steps waiting", "bits a weight") if rows == 3 else ("ms a step", "bits a weight")
    for axes, label in zip((first, *others), labels, strict=True):
        axes.set_ylabel(label, fontsize=9.5, color=QUIET)
        axes.grid(True, color=GRID, linewidth=0.9)
        dress(axes)
    figure.align_ylabels()
    save(figure, path)


def _axes(lines: int, width: float, title: str) -> tuple[Any, Any]:
    figure = new_figure(width, 1.4 + LINE * max(lines, 4))
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    return figure, axes
