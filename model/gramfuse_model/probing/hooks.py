"""Watching what enters modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gramfuse_protocol.contract.layout import Rows
from gramfuse_protocol.errors import GramfuseError, ModelError
from gramfuse_protocol.text import one_line

Hook = Callable[[nn.Module, torch.Tensor, tuple[Any, ...]], None]
"""Called before a module runs, with it, its input, and all else that it is called with, positional or by keyword."""


MOST = 500
"""Characters that are shown of what a model says when it fails."""


def run(model: nn.Module, batch: Mapping[str, Any], what: str = "the batch that a layout is made on") -> Any:
    """Return what a model puts out for a batch, which is put onto its device.

    Args:
        batch: keyword arguments of its forward.
        what: the batch, for errors.

    Raises:
        ModelError: if the model fails, with what it said, and its error as the cause.
    """
    device = next(model.parameters()).device
    try:
        return model(**{key: value.to(device) for key, value in batch.items()})
    except GramfuseError:
        raise
    except Exception as error:  # models raise what they like
        raise ModelError(failure(model, batch, what, error)) from error


def failure(model: nn.Module, batch: Mapping[str, Any], what: str, error: Exception) -> str:
    """Say that a model cannot compute a batch, and why."""
    sizes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items())
    said = f"{type(error).__name__}: {one_line(str(error), MOST).removesuffix('.')}"
    return f"{type(model).__name__} cannot compute {what} ({sizes}): {said}"


@contextmanager
def observing(model: nn.Module, hooks: Iterable[tuple[nn.Module, Hook]], *, gradients: bool = False) -> Iterator[None]:
    """Hook modules while the model is in evaluation mode; all is as before afterwards.

    Each module gets back its own mode: a part that was kept in evaluation mode stays so.

    Args:
        gradients: whether autograd is on.
    """
    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_pre_hook(_with_input(hook), with_kwargs=True) for module, hook in hooks]
    model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()


def rows_of(x: torch.Tensor, kind: Rows, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of a layer's input that count, one example after the other: (rows, d_in).

    Args:
        x: as `by_example` takes it; for `all` and `table`, of which every row counts, of any shape.
        kind: which rows count.
        mask: bool (examples, length), where real tokens are; without one every row counts.

    Raises:
        ValueError: if these are not rows of so many examples and places.
    """
    if mask is None or kind in ("all", "table"):
        return x.reshape(-1, x.shape[-1])
    return by_example(x, kind, mask)[:, : mask.shape[1]][mask].reshape(-1, x.shape[-1])


def by_example(x: torch.Tensor, kind: Rows, mask: torch.Tensor) -> torch.Tensor:
    """Return a layer's input as (examples, places, …, d_in).

    Args:
        x: the same, with `turned` (places, examples, …, d_in), or flattened to (any, d_in). There may be more places
            than in the mask: what a model pads inside comes after them.

    Raises:
        ValueError: if it is of no such shape.
    """
    examples, length = mask.shape
    if x.dim() == 2:
        if x.shape[0] % examples:
            raise ValueError(f"{x.shape[0]} rows are not as many for each of {examples} examples")
        x = x.view(-1, examples, x.shape[-1]) if kind == "turned" else x.view(examples, -1, x.shape[-1])
    if kind == "turned":
        x = x.transpose(0, 1)
    if x.shape[0] != examples or x.shape[1] < length:
        raise ValueError(f"{tuple(x.shape[:2])} are not the rows of {examples} examples of {length} places")
    return x


def _with_input(hook: Hook) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def call(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, *others = (*arguments, *named.values())
        hook(module, x, tuple(others))

    return call
