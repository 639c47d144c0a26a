"""Keeps the frozen weights of a model with adapters in bfloat16, which halves the memory of the base."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gramfuse_model.adapters.attach import Attached, is_adapter


def halve_frozen(model: nn.Module, attached: Attached) -> None:
    """Convert all frozen parameters but those of adapters to bfloat16, in place.

    Adapters and the modules that are trained whole stay in float32; their inputs are converted where they enter.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not is_adapter(name):
            parameter.data = parameter.data.to(torch.bfloat16)
    for name in attached.saved:
        model.get_submodule(name).register_forward_pre_hook(_in_float32, with_kwargs=True)


def _in_float32(
    _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_widened, arguments)), {key: _widened(value) for key, value in named.items()}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
