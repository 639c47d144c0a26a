"""Estimates the layout of a plan with adapters from the base's configuration alone, without its weights.

Running the base shows more: `plan lock` finds the first layers, which see tokens without context, and averages them, so
that they have no Gram matrix; and it trains parameters whole that are not in the base's files, such as a pooler's.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from gramfuse_model.adapters.attach import NAME, modules_to_save, targets_of
from gramfuse_model.heads import last_linear
from gramfuse_model.layers import LinearModule
from gramfuse_model.loading.base_model import base_without_weights
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.layout import Group, Layout, Linear, Tensor
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.tasks.registry import kind_of


class Estimated(NamedTuple):
    """An estimated layout.

    Args:
        plan: with a head, as `plan lock` would choose it for a base without one.
        layout: without scales.
        parameters: number of the base's parameters.
    """

    plan: Plan
    layout: Layout
    parameters: int


def estimate_layout(plan: Plan, directory: Path | None) -> Estimated:
    """Estimate a plan's layout; the base needs only a `config.json`.

    Args:
        directory: base directory of relative paths.

    Raises:
        PlanError: if the plan has no adapters.
        ModelError: if the base's configuration cannot be loaded, or the adapters do not fit it.
    """
    lora = plan.training.lora
    if lora is None:
        raise PlanError("an estimate from the configuration alone is for plans with adapters ([training.lora])")
    task = next(iter(plan.tasks.values()))
    plan = plan.with_head("fitted" if kind_of(task).exclusive and not plan.task else "same")
    model = base_without_weights(plan, directory)
    saved = modules_to_save(model, lora, ())
    targets = targets_of(model, lora, saved)
    groups, tensors = [], []
    for name, module in targets.items():
        b = f"{name}.lora_B.{NAME}"
        linear = Linear(weight=f"{b}.weight", d_out=module.d_out, transposed=True)
        groups.append(Group(name=b, d_in=lora.rank, structure="full", weights=(linear,)))
        tensors.append(Tensor(name=linear.weight, shape=(module.d_out, lora.rank), merge="regmean"))
    whole = tuple(f"{name}." for name in saved)
    tensors += [
        Tensor(name=name, shape=tuple(parameter.shape), merge="mean")
        for name, parameter in model.named_parameters()
        if name.startswith(whole)
    ]
    frozen = tuple(name for name, _ in model.named_parameters() if not name.startswith(whole))
    head = _head(model, plan, last_linear(model, kind_of(task).outputs(task))) if plan.fits_head else None
    layout = Layout(groups=tuple(groups), tensors=tuple(tensors), frozen=frozen, head=head)
    return Estimated(plan, layout, sum(parameter.numel() for parameter in model.parameters()))


def _head(model: PreTrainedModel, plan: Plan, last: LinearModule | None) -> HeadLayout | None:
    kind = kind_of(plan.model.single_task)
    if last is None or kind.fit is None:
        return None
    bias = f"{last.weight.removesuffix('weight')}bias"
    return HeadLayout(
        fit=kind.fit,
        weight=last.weight,
        bias=bias if bias in model.state_dict() else None,
        features=last.d_in,
        outputs=last.d_out,
        columns=kind.columns(plan.model.single_task),
        exponents=(0,) * last.d_in,
    )
