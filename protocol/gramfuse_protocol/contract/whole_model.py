"""A whole model on the wire: its differences from the base, without the tensors that equal the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.layout import Layout


def without_zeros(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the differences that are not zero throughout, by block name."""
    return {name: array for name, array in arrays.items() if np.any(array)}


def with_zeros(layout: Layout, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the differences of all of a layout's tensors, by block name; those that are missing are zeros.

    The zeros are read-only and take no memory. Unknown names are kept, for `check_slices` to refuse.
    """
    missing = {
        piece.name: np.broadcast_to(np.float32(0), piece.block.shape)
        for piece in layout.deltas
        if piece.name not in arrays
    }
    return {**missing, **arrays}
