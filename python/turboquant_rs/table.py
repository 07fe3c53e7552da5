"""Plain text tables and sizes for people."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["human_bytes", "printable", "table"]


def printable(text: str) -> str:
    """`text` with escapes in place of what no terminal should get: names of a file may hold anything."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Columns aligned by spaces: the first to the left, the others (figures) to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return (indent + "  ".join([first, *rest])).rstrip()

    return "\n".join([line(header), line(["─" * width for width in widths]), *map(line, rows)])


def human_bytes(count: float) -> str:
    """`1_234_567` → `"1.2 MB"` (powers of 1000, three figures)."""
    units = ["TB", "GB", "MB", "kB", "B"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop()
    unit = units[-1]
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
