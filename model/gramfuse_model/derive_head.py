"""Derives which layer of a model is its head, to fit it in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gramfuse_model.exponents import exponents_of
from gramfuse_model.head_features import features_of
from gramfuse_model.heads import last_linear
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.loading.new_head import pool_by_mean
from gramfuse_model.loading.zero_head import plan_for
from gramfuse_model.probing.lengths import check_lengths
from gramfuse_model.probing.public_batch import check_long_texts, public_batch, trying
from gramfuse_model.probing.rows import find_rows
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.tasks.registry import kind_of

DISCRIMINANT = "discriminant"
"""The way of fitting heads that is chosen by default."""


def suits_fit(plan: Plan, base: Base) -> bool:
    """Return whether a head should be fitted: one task, one label for each example or word, and a base without head.

    Without training it always should, since it is the only result.

    Args:
        base: the plan's.
    """
    task = next(iter(plan.tasks.values()))
    kind = kind_of(task)
    if plan.training.epochs == 0:
        return True
    if plan.task or kind.fit != DISCRIMINANT or any(silo.labels for silo in plan.silo):
        return False
    batch = public_batch(base)
    try:
        with trying(base, batch):
            head = derive_head(base, batch, task)
    except ModelError:
        return False
    trained = {name for name, parameter in base.model.named_parameters() if parameter.requires_grad}
    return head.weight in base.fresh and trained.issuperset(head.tensors)


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
    if kind.fits_words:
        features = features[batch["attention_mask"].bool()]
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


def load_for_head(model: str, task: Task, directory: Path) -> Base:
    """Load a model whose head is to be fitted, fine-tuned or not.

    Where its files have no head of its shape, the head is new, seeded as that of a base. Otherwise it stays, whatever
    its labels are called: its last layer is replaced.

    Args:
        model: hub id, directory or bundled name.
        task: with the labels of the head.
        directory: relative paths start here.

    Raises:
        ModelError: if it cannot be loaded.
    """
    base = load_base(plan_for("model", model, task), directory, as_saved=True)
    pool_by_mean(base.model, base.fresh)
    return base


def probe_for_head(model: str, base: Base, task: Task) -> HeadLayout:
    """Return the layout of the head of such a model.

    Args:
        model: the name that it was loaded by.

    Raises:
        ModelError: if its outputs depend on the rest of a batch, or on lengths, or its head has no closed form.
        PlanError: if the task's texts are longer than the model takes.
    """
    check_lengths(base, [task], trains=False)
    check_long_texts(plan_for("model", model, task), base)
    batch = public_batch(base)
    with trying(base, batch):
        find_rows(base.model, batch, {})
        return derive_head(base, batch, task)
