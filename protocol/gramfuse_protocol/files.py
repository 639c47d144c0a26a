"""Files that are there whole or not at all, and files and directories that only their owner can read."""

from __future__ import annotations

import fcntl
import os
import secrets
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
    with replacing(path, private=True, durable=durable) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, *, private: bool, durable: bool = False, new: bool = False) -> Iterator[Path]:
    """Yield an empty file to write to, which becomes `path` when the block ends, and is removed if the block fails.

    Args:
        private: whether only its owner can read it (0600), from its first moment.
        durable: whether it is on the disk before this returns, so that a power failure does not undo it.
        new: whether a file that is there already stays.

    Raises:
        FileExistsError: if it is to be new, and a file of that name is there when the block ends.
    """
    temporary = path.with_name(f"{path.name}.partial" if not new else f".{path.name}.{secrets.token_hex(8)}")
    temporary.unlink(missing_ok=True)  # what a killed process left may have another mode
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
    try:
        yield temporary
        if durable:
            sync(temporary)
        if new:
            os.link(temporary, path)  # unlike a rename, a link never replaces a file
            temporary.unlink()
        else:
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


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
        sync(directory.parent)


def sync(path: Path) -> None:
    """Have a file's content, or a directory's names, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
