"""Atomic file writes, and files and directories that only their owner can read."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_private(path: Path, mode: int = os.O_TRUNC) -> int:
    """Open a file for writing, created with mode 0600, and return a descriptor.

    Args:
        mode: further flags: os.O_EXCL if the file must not exist, os.O_APPEND to append.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o600)


def write_private(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace a file atomically; only its owner can read it.

    Args:
        durable: sync it to the disk before returning, so that it survives a power failure.
    """
    with replacing(path, private=True, durable=durable) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, *, private: bool, durable: bool = False, new: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file that becomes `path` when the block ends, or is removed if the block fails.

    Args:
        private: create it with mode 0600.
        durable: sync it to the disk before returning, so that it survives a power failure.
        new: never replace an existing file.

    Raises:
        FileExistsError: if `new` is set and `path` exists when the block ends.
    """
    temporary = path.with_name(f"{path.name}.partial" if not new else f".{path.name}.{secrets.token_hex(8)}")
    temporary.unlink(missing_ok=True)  # a killed process may have left one with another mode
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
    try:
        yield temporary
        if durable:
            sync(temporary)
        if new:
            os.link(temporary, path)  # unlike rename, link never replaces a file
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
    """Hold an exclusive lock on a file, waiting for other processes; the file is created if missing, and kept."""
    with os.fdopen(open_private(path, os.O_APPEND), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_private_directory(directory: Path) -> None:
    """Make a directory and its missing parents, each with mode 0700 and synced to the disk."""
    if not directory.is_dir():  # recursively, since parents=True ignores the mode for parents
        make_private_directory(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
        sync(directory.parent)


def sync(path: Path) -> None:
    """Sync a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
