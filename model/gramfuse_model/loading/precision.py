"""Temporary conversion of half-precision models to float32, in which equal values can be told from different ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Convert a model's half-precision parameters and buffers to float32; they are restored on exit.

    They remain the same objects, are restored bit for bit, and take three times their memory meanwhile.
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
    """Return a batch with half-precision tensors converted to float32."""
    return {key: value.float() if value.dtype in HALVES else value for key, value in batch.items()}
