"""Contributions on the coordinator's disk, so that its memory use does not grow with the number of silos."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from gramfuse_protocol.contract.form import Slice
from gramfuse_protocol.errors import RunDirectoryError
from gramfuse_protocol.files import replacing

Array = NDArray[Any]

CHUNK = 2**19
"""Elements that `Spool.add_to` reads at a time."""


SHA256 = "sha256"


class Spool:
    """A directory with one file for each silo and piece, created when the first piece is saved.

    Each file contains the digest of its arrays. Files of an interrupted run are verified once, so that a damaged piece
    counts as missing and is requested again.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._sound: set[Path] = set()

    def save(self, silo: str, piece: int, arrays: Mapping[str, Array]) -> None:
        """Write one checked piece atomically."""
        path = self._path(silo, piece)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        with replacing(path, private=True) as temporary:
            save_file(kept, temporary, metadata={SHA256: _sha256(kept)})
        self._sound.add(path)

    def has(self, silo: str, piece: int) -> bool:
        """Whether this piece was saved and is intact; a damaged file is removed.

        Raises:
            RunDirectoryError: if the file cannot be read.
        """
        path = self._path(silo, piece)
        try:
            if path not in self._sound and path.exists():
                if _is_sound(path):
                    self._sound.add(path)
                else:
                    path.unlink()
        except OSError as error:
            raise RunDirectoryError(f"{path}: cannot be read: {error}") from None
        return path in self._sound

    def read(self, silo: str, piece: int, name: str) -> Array:
        """Read one array of a piece."""
        with safe_open(self._path(silo, piece), "numpy") as file:
            return np.asarray(file.get_tensor(name))

    def add_to(self, total: Array, silo: str, piece: int, name: str) -> None:
        """Add one flat array of a piece to another, in place, in chunks."""
        with safe_open(self._path(silo, piece), "numpy") as file:
            kept = file.get_slice(name)
            for start in range(0, total.size, CHUNK):
                stop = min(total.size, start + CHUNK)
                total[start:stop] += kept[start:stop]

    def _path(self, silo: str, piece: int) -> Path:
        return self.directory / silo / f"{piece:06}.safetensors"


class Spooled:
    """A silo's open contribution, read from the spool block by block.

    Args:
        pieces: how contributions are cut.
        examples, tokens: what the silo reported.
    """

    def __init__(
        self, spool: Spool, silo: str, pieces: tuple[tuple[Slice, ...], ...], examples: int, tokens: Mapping[str, int]
    ) -> None:
        self.spool = spool
        self.silo = silo
        self.examples = examples
        self.tokens = tokens
        self._places: dict[str, list[tuple[int, Slice]]] = defaultdict(list)
        for number, piece in enumerate(pieces):
            for part in piece:
                self._places[part.block.name].append((number, part))

    def block(self, name: str) -> Array:
        """Read one block."""
        parts = [self.spool.read(self.silo, number, part.name) for number, part in self._places[name]]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([part.reshape(-1) for part in parts]).reshape(self._places[name][0][1].block.shape)


def _is_sound(path: Path) -> bool:
    try:
        with safe_open(path, "numpy") as file:
            digest = (file.metadata() or {}).get(SHA256)
        return digest == _sha256(load_file(path))
    except (SafetensorError, ValueError, KeyError, TypeError):
        return False


def _sha256(arrays: Mapping[str, Array]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(arrays):
        hasher.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        hasher.update(arrays[name].reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()
