"""What all pictures share: matplotlib on first use, and the house style."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from turboquant_rs.errors import BackendUnavailable

__all__ = ["ACCENT", "GRID", "INK", "NO_MATPLOTLIB", "QUIET", "can_draw", "dress", "new_figure", "save"]

INK, QUIET, GRID, ACCENT = "#1f2430", "#6b7280", "#e6e8ec", "#1f5fbf"

NO_MATPLOTLIB = "it needs matplotlib, which is not installed; pip install 'turboquant-rs[demo]'"


def can_draw() -> bool:
    """Whether matplotlib is there; it is looked for, not imported."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that size in inches. Raises BackendUnavailable without matplotlib."""
    try:
        figure = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise BackendUnavailable(f"a picture cannot be drawn: {NO_MATPLOTLIB}") from error
    return figure.Figure(figsize=(width, height), dpi=160, facecolor="white")


def dress(axes: Any) -> None:
    """No frame, quiet ticks."""
    axes.tick_params(colors=QUIET, labelsize=9, length=0, which="both")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def save(figure: Any, path: str | Path) -> None:
    """Writes the figure as PNG. Raises OSError where `path` cannot be written."""
    figure.savefig(path, format="png", bbox_inches="tight")
