"""The base model of a published fine-tuned model, with a head of zeros.

The head from which fine-tuning started is unknown. The closed form does not depend on it, since
W₀ + S⁻¹ Σ c Ĝ (W − W₀) = S⁻¹ Σ c Ĝ W, so every gramfuse uses zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from gramfuse_model.adapters.attach import attach_matrices
from gramfuse_model.heads import head_parameters
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Header, Merge, Model, Privacy, Silo, Training
from gramfuse_protocol.contract.task import Task, TaskSettings


def plan_for(
    name: str, base: str, task: Task, *, freeze: Iterable[str] = (), gram: Mapping[str, str] | None = None
) -> Plan:
    """Return a plan with one silo, for such a model.

    Args:
        name: name of the model.
        base: hub id, directory or bundled name.
        freeze: patterns of frozen parameters.
        gram: structures of Gram matrices by pattern; by default all full.
    """
    settings = {field: getattr(task, field) for field in TaskSettings.model_fields}
    return Plan(
        plan=Header(name=name),
        model=Model(base=base, task=task.task, **settings),
        training=Training(freeze=tuple(freeze)),
        merge=Merge(gram=gram or {"*": "full"}),
        privacy=Privacy(secure_aggregation=False, metrics="none"),
        silo=(Silo(name=name),),
    )


def load_zero_headed(plan: Plan, directory: Path) -> Base:
    """Load a plan's base model with a head of zeros.

    Args:
        plan: a plan of `plan_for`.
        directory: base directory of relative paths.

    Raises:
        ModelError: if the base model cannot be loaded.
    """
    base = load_base(plan, directory, as_saved=True)
    head = head_parameters(base.model)
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if name in head:
                parameter.zero_()
    return base


def load_with_adapter(plan: Plan, directory: Path, frozen: Mapping[str, torch.Tensor], saved: Iterable[str]) -> Base:
    """Load a plan's base model with a head of zeros and with adapters that have given A; each B is zero.

    Args:
        plan: a plan of `plan_for`.
        directory: base directory of relative paths.
        frozen: A, (rank, d_in), by the name of its module.
        saved: names of the modules that were trained whole.

    Raises:
        ModelError: if the base model cannot be loaded, or an A does not fit.
    """
    base = load_zero_headed(plan, directory)
    attached = attach_matrices(base.model, frozen, tuple(saved))
    return replace(base, shared=frozenset(base.model.state_dict()), adapters=attached)
