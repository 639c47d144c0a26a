"""Files and directories that only their owner can read; files are there whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    if durable:
        sync_directory(path.parent)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait until no other process holds this file, and hold it; it is made if it is not there, and stays."""
    with os.fdopen(open_private(path, os.O_APPEND), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_private_directory(directory: Path) -> None:
    """Make a directory and all that are missing above it, each 0700 and on the disk before this returns."""
    if not directory.is_dir():  # one by one, since parents=True makes those above with the usual mode
        make_private_directory(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
        sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Have a directory's names on the disk before this returns."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
