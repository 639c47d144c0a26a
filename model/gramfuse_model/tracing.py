"""Makes the layout: which linear weights share an input, found by running the base model once."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from gramfuse_model.base import Base
from gramfuse_model.linear import linear_modules
from gramfuse_model.observation import Hook, observing
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.layout import Group, Layout, Linear, Tensor
from gramfuse_protocol.plan import Merge, Plan

PUBLIC_TEXT = ("The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs.")


def plan_layout(plan: Plan, base: Base) -> Layout:
    """Return the layout of a plan over its base model, and check it against a locked plan.

    Raises:
        ModelError: if the plan is locked to another layout.
    """
    batch = base.tokenizer(list(PUBLIC_TEXT), padding=True, return_tensors="pt")
    layout = derive_layout(base.model, dict(batch), plan.merge)
    if plan.merge.layout is not None and layout.digest != plan.merge.layout:
        raise ModelError(
            f"the layout derived here has digest {layout.digest}, the plan is locked to {plan.merge.layout}; "
            "both sides must run the same versions of gramfuse and transformers"
        )
    return layout


def derive_layout(model: nn.Module, batch: Mapping[str, Any], merge: Merge | None = None) -> Layout:
    """Run a model once on a public batch and find its groups.

    Linear modules belong to one group if every one of their calls received the identical tensor, and if they
    have the same Gram structure. Modules that the model does not call keep the mean.

    Args:
        batch: keyword arguments of the model's forward; values only need the right shapes.
        merge: structures and exclusions; by default full Gram matrices for everything.
    """
    merge = merge or Merge()
    linears = list(linear_modules(model))
    for key, patterns in (("gram", tuple(merge.gram)), ("exclude", merge.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(linear.weight, pattern) for linear in linears):
                raise ModelError(f"merge.{key}: pattern {pattern!r} fits no linear weight of the base model")
    candidates = {
        linear.weight: linear
        for linear in linears
        if linear.module.weight.requires_grad and not any(fnmatchcase(linear.weight, p) for p in merge.exclude)
    }
    inputs = _inputs(model, batch, {weight: linear.module for weight, linear in candidates.items()})
    members: dict[tuple[Any, ...], list[str]] = {}
    for weight, keys in inputs.items():  # in the order in which the model first calls them
        members.setdefault((keys, _structure(merge, weight)), []).append(weight)
    groups = tuple(
        Group(
            name=weights[0].removesuffix(".weight"),
            d_in=candidates[weights[0]].d_in,
            structure=structure,
            weights=tuple(
                Linear(weight=w, d_out=candidates[w].d_out, transposed=candidates[w].kind.transposed) for w in weights
            ),
        )
        for (_, structure), weights in members.items()
    )
    linear = {weight for weights in members.values() for weight in weights}
    return Layout(
        groups=groups,
        tensors=tuple(
            Tensor(name=name, shape=tuple(p.shape), merge="regmean" if name in linear else "mean")
            for name, p in model.named_parameters()
            if p.requires_grad
        ),
        frozen=tuple(name for name, p in model.named_parameters() if not p.requires_grad),
    )


def _inputs(model: nn.Module, batch: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, tuple[Any, ...]]:
    """Return, for each module that is called, the identities of the tensors that it received."""
    calls: dict[str, tuple[Any, ...]] = {}
    alive: list[torch.Tensor] = []  # an identity is only good while the tensor lives

    def record(weight: str) -> Hook:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0]
            alive.append(x)
            key = (x.data_ptr(), x.storage_offset(), tuple(x.shape), x.stride(), x._version)
            calls[weight] = (*calls.get(weight, ()), key)

        return hook

    device = next(model.parameters()).device
    with observing(model, [(module, record(weight)) for weight, module in modules.items()]):
        model(**{key: value.to(device) for key, value in batch.items()})
    return calls


def _structure(merge: Merge, weight: str) -> str:
    fitting = [pattern for pattern in merge.gram if fnmatchcase(weight, pattern)]
    if not fitting:
        raise ModelError(f'merge.gram: no pattern fits {weight!r}; add a pattern "*"')
    return merge.gram[max(fitting, key=lambda pattern: (len(pattern), pattern))]
