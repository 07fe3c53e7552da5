"""A progress bar for long work: on stderr, and only where a person is watching (a terminal)."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from turboquant_rs.table import printable

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Progress"]

REDRAW_SECONDS = 0.1
WIDTH = 28


class Progress:
    """`with Progress("quantize", total) as progress: progress.advance(n)`; draws on a terminal only.

    `unit` divides what is shown ("MB": amounts are bytes); the bar is wiped when the work ends or fails, so
    that only results stay on the screen.
    """

    def __init__(self, label: str, total: int, unit: str = "", stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.note = 0, ""
        self._stream = sys.stderr if stream is None else stream
        self._visible = self._stream.isatty()
        self._started = time.monotonic()
        self._drawn_at = -REDRAW_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._visible:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Says that `amount` more of `total` is done, and optionally what is being worked on."""
        self.update(self.done + amount, note)

    def update(self, done: int, note: str = "") -> None:
        """Says that `done` of `total` is done."""
        self.done, self.note = done, note or self.note
        now = time.monotonic()
        if self._visible and now - self._drawn_at >= REDRAW_SECONDS:
            self._drawn_at = now
            self._stream.write("\r\x1b[K" + self._line(now))
            self._stream.flush()

    def _line(self, now: float) -> str:
        share = min(self.done / self.total, 1.0) if self.total else 1.0
        filled = round(share * WIDTH)
        scale = 1e6 if self.unit == "MB" else 1
        amount = f"{self.done / scale:.0f}/{self.total / scale:.0f} {self.unit}".rstrip()
        elapsed = now - self._started
        left = f" · {elapsed / share - elapsed:.0f} s left" if share > 0.02 else ""
        note = f" · {printable(self.note)}" if self.note else ""
        return f"{self.label} {'█' * filled}{'░' * (WIDTH - filled)} {amount}{left}{note}"[:110]
