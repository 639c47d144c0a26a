"""Watching what enters modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Hook = Callable[[nn.Module, torch.Tensor], None]
"""Called with a module and its input, positional or by keyword, before the module runs."""


@contextmanager
def observing(model: nn.Module, hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Hook modules while the model is in evaluation mode and without autograd; all is as before afterwards.

    Each module gets back its own mode: a part that was kept in evaluation mode stays so.
    """
    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_pre_hook(_with_input(hook), with_kwargs=True) for module, hook in hooks]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()


def has_rows_of(x: torch.Tensor, shape: torch.Size) -> bool:
    """Whether a layer's input has one row, or several, for each token of a batch.

    Args:
        x: (batch, length, …, d_in), or flattened to (batch·length, d_in).
        shape: (batch, length).
    """
    return x.shape[:2] == shape if x.dim() > 2 else x.dim() == 2 and x.shape[0] == shape.numel()


def _with_input(hook: Hook) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def call(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hook(module, next(iter((*arguments, *named.values()))))

    return call
