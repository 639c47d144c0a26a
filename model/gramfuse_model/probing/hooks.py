"""Hooks that observe the inputs of modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gramfuse_protocol.contract.layout import RowKind
from gramfuse_protocol.errors import GramfuseError, ModelError
from gramfuse_protocol.text import one_line

Hook = Callable[[nn.Module, torch.Tensor, tuple[Any, ...]], None]
"""Called before a module runs, with the module, its first argument, and its other arguments, including keyword
arguments."""


MESSAGE_CHARACTERS = 500
"""Maximum length at which an error quotes a model's own error message."""


def run(model: nn.Module, batch: Mapping[str, Any], what: str = "the batch for deriving the layout") -> Any:
    """Run a model on a batch, moved to the model's device, and return its output.

    Args:
        batch: keyword arguments of its forward.
        what: noun for the batch in errors.

    Raises:
        ModelError: if the model fails; its own error is the cause.
    """
    device = next(model.parameters()).device
    try:
        return model(**{key: value.to(device) for key, value in batch.items()})
    except GramfuseError:
        raise
    except Exception as error:  # models raise all kinds of errors
        raise ModelError(failure(model, batch, what, error)) from error


def failure(model: nn.Module, batch: Mapping[str, Any], what: str, error: Exception) -> str:
    """Return the error message for a model that fails on a batch."""
    sizes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items())
    reason = f"{type(error).__name__}: {one_line(str(error), MESSAGE_CHARACTERS).removesuffix('.')}"
    return f"{type(model).__name__} cannot compute {what} ({sizes}): {reason}"


@contextmanager
def observing(model: nn.Module, hooks: Iterable[tuple[nn.Module, Hook]], *, gradients: bool = False) -> Iterator[None]:
    """Install hooks and put the model in evaluation mode; both are undone on exit.

    Each module's own mode is restored: a part that was in evaluation mode stays so.

    Args:
        gradients: whether autograd is enabled.
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


def rows_of(x: torch.Tensor, kind: RowKind, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of a layer's input that count, example by example: (rows, d_in).

    Args:
        x: as for `by_example`; any shape for `all` and `table`, in which every row counts.
        kind: which rows count.
        mask: mask of real tokens, bool (examples, length); if None, every row counts.

    Raises:
        ValueError: if the shape does not fit the mask.
    """
    if mask is None or kind in ("all", "table"):
        return x.reshape(-1, x.shape[-1])
    return by_example(x, kind, mask)[:, : mask.shape[1]][mask].reshape(-1, x.shape[-1])


def by_example(x: torch.Tensor, kind: RowKind, mask: torch.Tensor) -> torch.Tensor:
    """Return a layer's input as (examples, positions, …, d_in).

    Args:
        x: the same shape, or (positions, examples, …, d_in) for `turned`, or flattened to (rows, d_in). It can have
            more positions than the mask; a model's internal padding follows the mask's positions.

    Raises:
        ValueError: if it has none of these shapes.
    """
    examples, length = mask.shape
    if x.dim() == 2:
        if x.shape[0] % examples:
            raise ValueError(f"{x.shape[0]} rows cannot be divided among {examples} examples")
        x = x.view(-1, examples, x.shape[-1]) if kind == "turned" else x.view(examples, -1, x.shape[-1])
    if kind == "turned":
        x = x.transpose(0, 1)
    if x.shape[0] != examples or x.shape[1] < length:
        raise ValueError(f"shape {tuple(x.shape[:2])} does not fit {examples} examples of {length} positions")
    return x


def _with_input(hook: Hook) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def call(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, *others = (*arguments, *named.values())
        hook(module, x, tuple(others))

    return call
