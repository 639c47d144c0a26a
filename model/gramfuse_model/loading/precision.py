"""Looking at a model of half precision in float32, where what is the same and what is not can be told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Have the parameters and buffers of a model that are in half precision in float32; all is as before afterwards.

    They stay the same objects, bit for bit of the same values, and take three times their memory meanwhile.
    """
    kept = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.dtype in HALVES]
    try:
        for tensor, half in kept:
            tensor.data = half.float()
        yield
    finally:
        for tensor, half in kept:
            tensor.data = half


def widened(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with what is in half precision in float32."""
    return {key: value.float() if value.dtype in HALVES else value for key, value in batch.items()}
