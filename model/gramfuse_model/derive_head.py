"""Derives which layer of a base model is its head, for a plan that fits it in closed form."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gramfuse_model.exponents import exponents_of
from gramfuse_model.head_features import features_of
from gramfuse_model.heads import last_linear
from gramfuse_model.loading.base_model import Base
from gramfuse_model.probing.public_batch import public_batch, trying
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.tasks.registry import kind_of


def suits_fit(plan: Plan, base: Base) -> bool:
    """Return whether a head should be fitted before training: one task, one label an example, and a base without head.

    Args:
        base: the plan's.
    """
    task = next(iter(plan.tasks.values()))
    kind = kind_of(task)
    if plan.task or kind.fit is None or not kind.exclusive or any(silo.labels for silo in plan.silo):
        return False
    batch = public_batch(base)
    try:
        with trying(base, batch):
            head = derive_head(base, batch, task)
    except ModelError:
        return False
    return head.weight in base.fresh


def derive_head(base: Base, batch: Mapping[str, torch.Tensor], task: Task) -> HeadLayout:
    """Return the layout of a base model's head.

    Args:
        batch: public data, as keyword arguments of the model's forward (`gramfuse_model.probing.public_batch`).
        task: of a kind whose head can be fitted.

    Raises:
        ModelError: if the model's last layer is not a linear one with as many outputs as the task has, or the model's
            output is not that of the layer.
    """
    model, kind = base.model, kind_of(task)
    assert kind.fit is not None  # noqa: S101  # the plan is valid
    outputs = kind.outputs(task)
    features = features_of(model, batch, outputs, "head")
    last = last_linear(model, outputs)
    if last is None or not last.kind.transposed:
        raise ModelError(f"the head of {type(model).__name__} does not end with a linear layer, so it cannot be fitted")
    bias = f"{last.weight.removesuffix('weight')}bias"
    return HeadLayout(
        fit=kind.fit,
        weight=last.weight,
        bias=bias if bias in model.state_dict() else None,
        features=last.d_in,
        outputs=outputs,
        columns=kind.columns(task),
        exponents=exponents_of(features.double().square().mean(dim=0)),
    )
