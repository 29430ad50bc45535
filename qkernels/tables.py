"""One look for every table that is printed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> Any:
    """A rich Table: the first text_columns columns to the left, numbers to the right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < text_columns else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def as_text(made: Any) -> str:
    """A rich renderable as plain text, as wide as it needs."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=200, no_color=True).print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def size(count: float) -> str:
    """Bytes for people: 1.2 kB, 53.1 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
