"""The base model behind a fine-tuned model that others published: as it is, with a head of zeros.

Whoever fine-tuned it began with a head that nobody else has. The closed form does not depend on what differences are
taken from, W₀ + S⁻¹ Σ c Ĝ (W − W₀) = S⁻¹ Σ c Ĝ W, so zeros will do, and every gramfuse has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from gramfuse_model.heads import head_parameters
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Header, Merge, Model, Privacy, Silo, Training
from gramfuse_protocol.contract.task import Task, TaskSettings


def plan_for(
    name: str, base: str, task: Task, *, freeze: Iterable[str] = (), gram: Mapping[str, str] | None = None
) -> Plan:
    """Return the plan of one silo that has such a model.

    Args:
        name: of the model.
        base: hub id, directory or bundled name.
        freeze: patterns of parameters that stay as they are.
        gram: structures of Gram matrices by pattern; by default all of them are full.
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
        plan: of `plan_for`.
        directory: where a relative path starts.

    Raises:
        ModelError: if it cannot be loaded.
    """
    base = load_base(plan, directory)
    head = head_parameters(base.model)
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if name in head:
                parameter.zero_()
    return base
