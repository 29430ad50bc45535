"""One look for every table that is printed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence


def text(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A title above a table, as wide as it needs; the first text_columns columns to the left, numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < text_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))  # Text: names are not markup
    out = io.StringIO()
    # Notebooks: rich would show the table at once and return nothing of it; FORCE_COLOR, which they set, adds escapes.
    Console(file=out, width=100_000, no_color=True, force_jupyter=False, force_terminal=False).print(table)
    return "\n".join([_printable(title), *(line.rstrip() for line in out.getvalue().strip("\n").splitlines())])


def _printable(cell: str) -> str:
    """Names in a file may hold what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in cell)


def size(count: float) -> str:
    """Bytes for people: 1.2 kB, 53.1 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
