"""Contributions on the coordinator's disk, so that its memory holds sums and never N silos."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from gramfuse_protocol.layout import Layout, Slice

Array = NDArray[Any]


class Spool:
    """A directory with one file for each silo and piece.

    Args:
        directory: made if it is not there.
        pieces: how contributions are cut.
    """

    def __init__(self, directory: Path, layout: Layout, piece_bytes: int) -> None:
        self.directory = directory
        self.pieces = layout.pieces(piece_bytes)
        self._places: dict[str, list[tuple[int, Slice]]] = defaultdict(list)
        for number, piece in enumerate(self.pieces):
            for part in piece:
                self._places[part.block.name].append((number, part))

    def save(self, silo: str, number: int, arrays: Mapping[str, Array]) -> None:
        """Write one checked piece, under a temporary name first."""
        path = self._path(silo, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
        os.replace(temporary, path)

    def block(self, silo: str, name: str) -> Array:
        """Read one block of a silo's contribution."""
        parts = []
        for number, part in self._places[name]:
            with safe_open(self._path(silo, number), "numpy") as file:
                parts.append(np.asarray(file.get_tensor(part.name)))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([part.reshape(-1) for part in parts]).reshape(self._places[name][0][1].block.shape)

    def _path(self, silo: str, number: int) -> Path:
        return self.directory / silo / f"{number:06}.safetensors"


@dataclass(frozen=True)
class Spooled:
    """A silo's contribution, read from the spool block by block."""

    spool: Spool
    silo: str
    examples: int
    tokens: Mapping[str, int]

    def block(self, name: str) -> Array:
        """Read one block."""
        return self.spool.block(self.silo, name)
