"""Files that others add lines to, read as they grow."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Growing:
    """A file that lines are added to, read from where it ended at first."""

    path: Path
    _inode: int = 0
    _position: int = 0

    def __post_init__(self) -> None:
        with suppress(FileNotFoundError):
            found = self.path.stat()
            self._inode, self._position = found.st_ino, found.st_size

    def lines(self) -> list[str]:
        """Return the whole lines that were added since the last call."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._position:  # another file took its place
                    self._inode, self._position = found.st_ino, 0
                file.seek(self._position)
                added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._position += len(whole)
        return whole.decode("utf-8", "replace").splitlines()
