"""Watching what enters modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Hook = Callable[[nn.Module, tuple[torch.Tensor, ...]], None]
"""Called with a module and its positional inputs, before the module runs."""


@contextmanager
def observing(model: nn.Module, hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Hook modules while the model is in evaluation mode and without autograd; all is as before afterwards.

    Each module gets back its own mode: a part that was kept in evaluation mode stays so.
    """
    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()
