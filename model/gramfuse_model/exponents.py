"""Scales of features: powers of two above their amplitude on public data, by which secure sums scale statistics."""

from __future__ import annotations

import math

import torch

from gramfuse_protocol.contract.form import EXPONENT

QUIETEST = 8
"""Maximum number of powers of two by which a feature's scale may be below the largest in its group."""


def exponents_of(power: torch.Tensor) -> tuple[int, ...]:
    """Return each feature's smallest e with 2^e above its root mean square, but at least the largest e − QUIETEST.

    Args:
        power: mean square of each feature, (features,).
    """
    amplitudes = power.sqrt().tolist()
    exponents = [math.frexp(amplitude)[1] if amplitude else -EXPONENT for amplitude in amplitudes]
    floor = max(exponents) - QUIETEST
    return tuple(min(EXPONENT, max(-EXPONENT, floor, exponent)) for exponent in exponents)
