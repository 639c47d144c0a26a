"""Derives the frozen matrix A of an adapter from a seed and its module's name.

The result does not depend on the device, on the library that draws random numbers, or on the order of modules: bits
come from SHAKE-256, and entries are rounded to bfloat16, which absorbs differences in the last bits between machines.
So an A is also the same in bfloat16 and in float32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Init = Literal["kaiming", "gaussian", "orthogonal"]

FRACTION_BITS = 53
"""Bits of a float64's fraction, and so of a uniform number."""


def derive_frozen(seed: int, module: str, rank: int, features: int, init: Init) -> torch.Tensor:
    """Return a module's A, (rank, features), float32.

    Args:
        seed: the plan's `training.seed`.
        module: the module's name in the model.
        rank: rows; at most `features` for orthogonal rows.
        features: input features of the module.
        init: as in `gramfuse_protocol.contract.plan_sections.Lora`.
    """
    match init:
        case "kaiming":
            values = (2 * _uniform(seed, module, rank * features) - 1) / math.sqrt(features)
        case "gaussian":
            values = _normal(seed, module, rank * features) / rank
        case "orthogonal":
            square = _normal(seed, module, rank * features).reshape(features, rank)
            columns, triangle = np.linalg.qr(square)
            values = (columns * np.sign(np.diag(triangle)) / math.sqrt(3)).T.ravel()
    return torch.from_numpy(values.reshape(rank, features)).to(torch.bfloat16).float()


def frozen_digest(matrices: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of all A by module name: for each, a line of text with name and shape, then float32 bytes."""
    hasher = hashlib.sha256()
    for module in sorted(matrices):
        matrix = matrices[module].detach().cpu().float().numpy()
        hasher.update(f"{module} {','.join(map(str, matrix.shape))}\n".encode())
        hasher.update(np.ascontiguousarray(matrix, "<f4").tobytes())
    return hasher.hexdigest()


def _uniform(seed: int, module: str, count: int) -> NDArray[np.float64]:
    """Return numbers from [0, 1), independent and uniform."""
    words = np.frombuffer(hashlib.shake_256(f"{seed} {module}".encode()).digest(8 * count), "<u8")
    return (words >> np.uint64(64 - FRACTION_BITS)).astype(np.float64) * 2.0**-FRACTION_BITS


def _normal(seed: int, module: str, count: int) -> NDArray[np.float64]:
    """Return independent standard normal numbers, by Box and Muller (1958)."""
    half = -(-count // 2)
    both = _uniform(seed, module, 2 * half)
    radius, angle = np.sqrt(-2 * np.log1p(-both[:half])), 2 * np.pi * both[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
