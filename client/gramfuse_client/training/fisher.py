"""The diagonal of a model's Fisher information: the mean over examples of squared gradients of the log-likelihood.

Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, equation 3. Each example's
gradient is squared before averaging; squaring a batch's mean gradient would give something else.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from gramfuse_client.tasks.registry import Variant, at_silo
from gramfuse_model.probing.batch import Batch
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ContributionError, PlanError


def choose_variant(task: Task, variant: Variant | None) -> Variant:
    """Return a variant of Fisher information that the task supports; by default its usual one.

    Raises:
        PlanError: if the task does not support the variant.
    """
    supported = at_silo(task).fisher
    if variant is None:
        return supported[0]
    if variant not in supported:
        raise PlanError(
            f"task {task.task!r} does not support fisher:{variant}, only {' and '.join(supported)}; "
            f"compare with fisher:{supported[0]}"
        )
    return variant


def fisher_diagonal(
    model: nn.Module, examples: Iterable[Batch], task: Task, variant: Variant
) -> dict[str, torch.Tensor]:
    """Return the diagonal Fisher information of every trainable parameter.

    Args:
        model: set to evaluation mode, and left in it.
        examples: batches of one example each, including `labels`; at least one.
        task: the silo's task. The likelihood leaves out labels that the silo does not annotate.

    Returns:
        By parameter name, values ≥ 0 in the parameter's shape, float32 on the CPU; zero without a gradient.

    Raises:
        ContributionError: naming the parameter, if a value is NaN or infinite.
    """
    model.eval()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    for example in examples:
        count += 1
        terms = list(at_silo(task).log_likelihoods(model, example, task, variant))
        for number, (weight, log_likelihood) in enumerate(terms, 1):
            gradients = torch.autograd.grad(
                log_likelihood, list(parameters.values()), retain_graph=number < len(terms), allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[name] += weight * gradient.square()
    for name, values in sums.items():
        if not torch.isfinite(values).all():
            raise ContributionError(
                f"the Fisher information of {name!r} is NaN or infinite, so training diverged; lower "
                "training.learning-rate, or check the silo's data"
            )
    return {name: (values / count).cpu() for name, values in sums.items()}
