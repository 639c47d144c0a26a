"""Heads that a base does not have yet: when a head is new, and what new heads take."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

import torch
from transformers import PreTrainedModel

from gramfuse_model.heads import last_linear
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError

GENERIC = re.compile(r"LABEL_\d+")
"""What transformers calls labels that nobody named."""

SPREAD = 0.02
"""Standard deviation of new weights, where the configuration has none."""


def replace_head_of_others(
    model: PreTrainedModel, named: Mapping[int, str], task: Task, where: str, fresh: Container[str], seed: int
) -> frozenset[str]:
    """Replace the last layer of a head that is for other labels, in place; a head of unnamed labels is kept.

    A layer for another number of labels is replaced by transformers. One for the same number has the right shape, and
    would give its labels the names of the task's.

    Args:
        named: the labels in the base's own configuration, by index.
        where: the directory of its files.
        fresh: names of parameters that are new already.
        seed: of the new weights.

    Returns:
        Names of the new parameters.

    Raises:
        ModelError: if the base has the task's labels in another order.
    """
    labels = [named[index] for index in sorted(named)]
    last = last_linear(model, len(task.labels)) if task.labels else None
    if last is None or last.weight in fresh or all(GENERIC.fullmatch(label) for label in labels):
        return frozenset()
    if [label.casefold() for label in labels] == [label.casefold() for label in task.labels]:
        return frozenset()
    if {label.casefold() for label in labels} == {label.casefold() for label in task.labels}:
        raise ModelError(
            f"{where}: has a head for the labels of the task in another order; write labels = {list(labels)}, or its "
            "rows would be taken for those of other labels"
        )
    if len(labels) != len(task.labels):
        return frozenset()
    bias = f"{last.weight.removesuffix('weight')}bias"
    new = {name: value for name, value in model.named_parameters() if name in (last.weight, bias)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in new.items():
            spread = getattr(model.config, "initializer_range", None) or SPREAD
            value.copy_(
                torch.zeros_like(value) if name == bias else spread * torch.randn(value.shape, generator=generator)
            )
    return frozenset(new)


def pool_by_mean(model: PreTrainedModel, missing: Container[str]) -> None:
    """Have a new head take the mean over tokens, if the model's class can, in place.

    Some classes have a choice, `classifier_pooling` in their configuration, and most bases leave it at the first token.
    A mean needs no training to describe a text, so a head that is fitted in closed form is better on it.

    Args:
        missing: parameters that the files lack. A head for other labels was trained with its own pooling, and keeps it.
    """
    last = last_linear(model, model.config.num_labels)
    if getattr(model.config, "classifier_pooling", None) is None or last is None or last.weight not in missing:
        return
    model.config.classifier_pooling = "mean"
    if hasattr(model, "classifier_pooling"):  # some classes read their configuration once
        model.classifier_pooling = "mean"
