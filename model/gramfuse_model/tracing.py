"""Makes the layout: which linear weights share an input, found by running the base model once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from gramfuse_model.base import Base
from gramfuse_model.linear import linear_modules
from gramfuse_model.observation import Hook, observing
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.layout import EXPONENT, Group, Layout, Linear, Tensor
from gramfuse_protocol.plan import Merge, Plan

PUBLIC_TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs.",
    "Good morning, could you please tell me when the office opens on Saturday?",
    "I have been charged twice this month and would like my money back!",
    "The patient was given 40 mg of the drug at 9:30 and felt better within an hour.",
    "Nobody answered the phone, so we drove to the station and waited in the rain.",
    "Revenue rose by 3.5% in the second quarter, while costs fell slightly.",
    "What a wonderful book: I read it in one night and cried at the end.",
    "no",
    "Terms and conditions apply; see section 4(b) of the agreement dated 1 March 2019.",
    "She plays the violin, he cooks, and their children build castles out of boxes.",
    "ERROR 504: the server did not respond. Restart the device, then try again.",
    "An acid and a base react to give a salt and water.",
    "Does this train stop in Lyon, or do I have to change?",
    "They lost 2-1 after extra time, but the crowd sang until midnight.",
    "Turn left at the bakery, cross the bridge, and you will see it on your right.",
)
"""What activations are measured on to find the scale of each feature; it is nobody's data."""

QUIETEST = 8
"""Powers of two by which a feature's scale may lie below that of the loudest in its group."""


def plan_layout(plan: Plan, base: Base, given: Layout | None = None) -> Layout:
    """Return the layout of a plan over its base model, and check it against a locked plan.

    Args:
        given: the layout that came with a locked plan. It is taken if it has the plan's digest and differs from the
            one derived here by no more than what rounding on another machine may do to its exponents.

    Raises:
        ModelError: if the plan is locked to another layout.
    """
    batch = base.tokenizer(list(PUBLIC_TEXT), padding=True, return_tensors="pt")
    layout = derive_layout(base.model, dict(batch), plan.merge, scaled=True)
    if given is not None and given.digest == plan.merge.layout and given.follows(layout):
        return given
    if plan.merge.layout is not None and layout.digest != plan.merge.layout:
        raise ModelError(
            f"the layout derived here has digest {layout.digest}, the plan is locked to {plan.merge.layout}; "
            "both sides must run the same versions of gramfuse and transformers"
        )
    return layout


def derive_layout(
    model: nn.Module, batch: Mapping[str, Any], merge: Merge | None = None, *, scaled: bool = False
) -> Layout:
    """Run a model once on a public batch and find its groups.

    Linear modules belong to one group if every one of their calls received the identical tensor, and if they
    have the same Gram structure. Modules that the model does not call keep the mean.

    Args:
        batch: keyword arguments of the model's forward; values only need the right shapes.
        merge: structures and exclusions; by default full Gram matrices for everything.
        scaled: whether the layout says how large each feature is on this batch, which a secure sum needs; the batch
            must then be public.
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
    inputs, power = _inputs(model, batch, {weight: linear.module for weight, linear in candidates.items()})
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
            exponents=_exponents(power[weights[0]]) if scaled else (),
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


def _inputs(
    model: nn.Module, batch: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, tuple[Any, ...]], dict[str, torch.Tensor]]:
    """Return, for each module that is called, the identities of the tensors that it received, and their power.

    The power is the mean square of each feature over all rows, padding included: float64 (d_in,).
    """
    calls: dict[str, tuple[Any, ...]] = {}
    power: dict[str, torch.Tensor] = {}
    alive: list[torch.Tensor] = []  # an identity is only good while the tensor lives

    def record(weight: str) -> Hook:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0]
            alive.append(x)
            key = (x.data_ptr(), x.storage_offset(), tuple(x.shape), x.stride(), x._version)
            calls[weight] = (*calls.get(weight, ()), key)
            rows = x.reshape(-1, x.shape[-1]).double()
            power[weight] = torch.maximum(power.get(weight, torch.zeros(())), (rows * rows).mean(dim=0).cpu())

        return hook

    device = next(model.parameters()).device
    with observing(model, [(module, record(weight)) for weight, module in modules.items()]):
        model(**{key: value.to(device) for key, value in batch.items()})
    return calls, power


def _exponents(power: torch.Tensor) -> tuple[int, ...]:
    """Return the smallest e with 2^e above each feature's root mean square, raised to QUIETEST below the highest."""
    amplitudes = power.sqrt().tolist()
    found = [math.frexp(amplitude)[1] if amplitude else -EXPONENT for amplitude in amplitudes]
    floor = max(found) - QUIETEST
    return tuple(min(EXPONENT, max(-EXPONENT, floor, exponent)) for exponent in found)


def _structure(merge: Merge, weight: str) -> str:
    fitting = [pattern for pattern in merge.gram if fnmatchcase(weight, pattern)]
    if not fitting:
        raise ModelError(f'merge.gram: no pattern fits {weight!r}; add a pattern "*"')
    return merge.gram[max(fitting, key=lambda pattern: (len(pattern), pattern))]
