"""Files that only their owner can read, and that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def open_private(path: Path, mode: int = os.O_TRUNC) -> int:
    """Return a descriptor to write a file, 0600 from its first moment; `mode` os.O_EXCL refuses one that exists."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o600)


def write_private(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace a file as a whole.

    Args:
        durable: have it on the disk before returning, so that a power failure does not undo it.
    """
    temporary = path.with_suffix(".partial")
    try:
        with os.fdopen(open_private(temporary), "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
