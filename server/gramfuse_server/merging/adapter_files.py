"""Writes the adapter that a merge of adapters' files makes, at the rank of all its rows or at a smaller one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gramfuse_model.adapters.attach import NAME, adapters_of
from gramfuse_model.loading.base_model import Base
from gramfuse_model.loading.zero_head import load_with_adapter, plan_for
from gramfuse_model.parameters import add_differences, set_values
from gramfuse_model.rescaling import fold
from gramfuse_model.saving import save_adapter
from gramfuse_protocol.contract.layout import Group
from gramfuse_protocol.contract.task import Task
from gramfuse_server.merging.accumulator import Accumulator, Merged
from gramfuse_server.merging.truncation import Array, Truncated, truncate

if TYPE_CHECKING:
    from gramfuse_server.merging.files import Settings


def write_adapters(
    directory: Path, base: Base, task: Task, merged: Merged, accumulator: Accumulator, settings: Settings, here: Path
) -> dict[str, float]:
    """Write a merged adapter.

    Args:
        directory: where it is written.
        base: with adapters over the rows of all A; it becomes the merged model.
        task: of the files.
        merged: differences from it.
        accumulator: the sums that it was merged from, which say what an error costs.
        settings: of the merge; its rank, if it has one, is that of the adapter.
        here: relative paths of models start here.

    Returns:
        The share of the mean square output that each module loses by the smaller rank; empty if nothing is cut.
    """
    add_differences(base.model, merged.rounded())
    fold(base.model, task)
    assert settings.base is not None  # noqa: S101  # it was loaded
    if settings.rank is None:
        save_adapter(base, settings.base, directory, task=task.task)
        return {}
    groups = {group.weights[0].weight: group for group in accumulator.layout.groups}
    smaller: dict[str, Truncated] = {}
    for name, layer in adapters_of(base.model):
        a, b = (getattr(layer, key)[NAME].weight.detach().double().numpy() for key in ("lora_A", "lora_B"))
        group = groups.get(f"{name}.lora_B.{NAME}.weight")
        second = None if group is None else _second(accumulator, group)
        smaller[name] = truncate(b, a, second, min(settings.rank, len(a)))
    result = _at_rank(base, task, smaller, settings.base, here)
    save_adapter(result, settings.base, directory, task=task.task)
    return {name: one.lost for name, one in smaller.items() if one.lost > 0}


def _second(accumulator: Accumulator, group: Group) -> Array:
    """Return the summed second moment of a group's inputs, (d_in, d_in)."""
    second, first = np.zeros((group.d_in, group.d_in)), 0
    for part in group.blocks.unpack(accumulator.of_group(group)[0]):
        for block in part:
            rows = slice(first, first + len(block))
            second[rows, rows], first = block, rows.stop
    return second


def _at_rank(base: Base, task: Task, smaller: Mapping[str, Truncated], name: str, here: Path) -> Base:
    """Return the merged model with other adapters in place of its own."""
    assert base.adapters is not None  # noqa: S101
    matrices = {module: torch.from_numpy(one.a).float() for module, one in smaller.items()}
    result = load_with_adapter(plan_for("merged", name, task), here, matrices, base.adapters.saved)
    whole = tuple(f"{module}." for module in base.adapters.saved)
    set_values(result.model, {key: value for key, value in base.model.state_dict().items() if key.startswith(whole)})
    with torch.no_grad():
        for module, layer in adapters_of(result.model):
            layer.lora_B[NAME].weight.copy_(torch.from_numpy(smaller[module].b))
    return result
