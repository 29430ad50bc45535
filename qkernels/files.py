"""Files: written whole or not at all, and where those that are kept for a user lie."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to, in the same folder: it takes the place of `path` at the end, and is gone after an error.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "answer")
    >>> with replacing(path) as temporary:
    ...     _ = temporary.write_text("42")
    >>> path.read_text()
    '42'
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # some writers, safetensors among them, make private files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_directory() -> pathlib.Path:
    """$QKERNELS_CACHE, else qkernels in the user's cache directory."""
    if chosen := os.environ.get("QKERNELS_CACHE"):
        return pathlib.Path(chosen)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "qkernels"
