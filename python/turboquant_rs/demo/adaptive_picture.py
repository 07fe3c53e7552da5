"""The picture of the adaptive demo: load, latency and bits over the same seconds."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboquant_rs.picture import GRID, INK, QUIET, dress, new_figure

if TYPE_CHECKING:
    from .adaptive import Contender

STYLES = (("#d9772b", 0.45), ("#9aa3b2", 0.6), ("#1f5fbf", 0.8))  # 8 bits, 4 bits, controlled
SHADE = "#f4f1ea"
BIN = 0.25  # seconds of arrivals in a bar


def draw(contenders: Sequence[Contender], slo_ms: float, seconds: Sequence[float], path: Path) -> None:
    """Writes the PNG: requests a second, latency of every request (log scale), effective bits.

    Raises BackendUnavailable where matplotlib is missing, OSError where `path` cannot be written.
    """
    figure = new_figure(10.4, 7.2)
    ticker = importlib.import_module("matplotlib.ticker")
    rows = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": (1.0, 2.4, 1.5)})
    load, latency, bits = rows
    figure.subplots_adjust(left=0.075, right=0.975, top=0.845, bottom=0.075, hspace=0.3)
    figure.text(
        0.022, 0.96, "Precision that follows the load", fontsize=15, fontweight="bold", color=INK, va="center"
    )
    subtitle = "one model, the same requests three times: read at 8 bits, at 4 bits, and as a controller says"
    figure.text(0.022, 0.921, subtitle, fontsize=9.5, color=QUIET, va="center")
    calm, burst, after = seconds
    for axes in rows:
        axes.axvspan(calm, calm + burst, color=SHADE, linewidth=0, zorder=0)
    _load(load, [request.time for request in contenders[0].served], calm + burst + after)
    load.annotate(
        "three times the requests", (calm + burst / 2, 1), (0, 4), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="center", fontsize=9, color=QUIET,
    )  # fmt: skip
    for own, (color, alpha) in zip(contenders, STYLES, strict=True):
        times = [request.time for request in own.served]
        late = own.violations(slo_ms) / len(own.served)
        label = f"{own.name}: {late:.1%} too late, KL {own.kl:.1g}"
        values = [request.latency_ms for request in own.served]
        latency.plot(
            times, values, ".", color=color, alpha=alpha, markersize=5, markeredgewidth=0, label=label
        )
        bits.step(times, [request.bits for request in own.served], where="post", color=color, linewidth=1.8)
    latency.axhline(slo_ms, color=INK, linewidth=1.1)
    latency.annotate(
        f"promised: {slo_ms:.0f} ms", (1, slo_ms), (-6, 4), ha="right", xycoords=("axes fraction", "data"),
        textcoords="offset points", fontsize=9, color=INK, fontweight="bold",
    )  # fmt: skip
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    latency.legend(
        loc="upper left", frameon=False, fontsize=9, labelcolor=INK, markerscale=2, handlelength=0.8
    )
    top = max(request.bits for own in contenders for request in own.served)
    bits.set_ylim(min(request.bits for own in contenders for request in own.served) - 0.5, top + 0.5)
    bits.set_xlim(0, calm + burst + after)
    bits.set_xlabel("seconds", fontsize=9.5, color=QUIET)
    _dress(load, "Requests a second")
    _dress(latency, "Milliseconds until a request is done, waiting included")
    _dress(bits, "Bits a weight that are read, scales included")
    figure.savefig(path, format="png")


def _load(axes: Any, times: Sequence[float], end: float) -> None:
    """Bars of arrivals."""
    count = round(end / BIN)
    heights = [0.0] * count
    for time in times:
        heights[min(int(time / BIN), count - 1)] += 1 / BIN
    axes.bar([(i + 0.5) * BIN for i in range(count)], heights, width=0.86 * BIN, color=QUIET, alpha=0.55)


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=7)
    axes.grid(True, color=GRID, linewidth=0.9)
    dress(axes)
