"""Follows files that other processes append lines to."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Growing:
    """A file that other processes append to, read from where it ended when this object was made."""

    path: Path
    _inode: int = 0
    _position: int = 0

    def __post_init__(self) -> None:
        with suppress(FileNotFoundError):
            status = self.path.stat()
            self._inode, self._position = status.st_ino, status.st_size

    def lines(self) -> list[str]:
        """Return the complete lines added since the last call."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._position:  # replaced or truncated
                    self._inode, self._position = status.st_ino, 0
                file.seek(self._position)
                added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._position += len(whole)
        return whole.decode("utf-8", "replace").splitlines()
