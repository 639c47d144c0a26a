"""The diagonal of a model's Fisher information: the mean over examples of squared gradients of the log-likelihood.

Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, equation 3: each example's
gradient is squared before anything is averaged, which the square of a batch's mean gradient is not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from gramfuse_client.tasks.registry import Variant, at_silo
from gramfuse_client.training.outputs import Batch
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ContributionError, PlanError


def choose_variant(task: Task, variant: Variant | None) -> Variant:
    """Return the variant that is asked for, or by default the first that the task can have.

    Raises:
        PlanError: if the task cannot have it.
    """
    possible = at_silo(task).fisher
    if variant is None:
        return possible[0]
    if variant not in possible:
        raise PlanError(
            f"fisher:{variant} is not for task {task.task!r}, which can have {' and '.join(possible)}; "
            f"compare with fisher:{possible[0]}"
        )
    return variant


def fisher_diagonal(
    model: nn.Module, examples: Iterable[Batch], task: Task, variant: Variant
) -> dict[str, torch.Tensor]:
    """Return the diagonal Fisher information of every parameter that is trained.

    Args:
        model: in whatever mode; it is in evaluation mode meanwhile and afterwards.
        examples: batches of one example each, `labels` included; at least one.
        task: the silo's own; labels that it does not annotate are left out of the likelihood.

    Returns:
        By parameter name, ≥ 0, in the parameter's shape: float32 on the CPU, zero for what has no gradient.

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
                f"Fisher information of {name!r} is NaN or infinite; training diverged there: lower "
                "training.learning-rate or look at the silo's data"
            )
    return {name: (values / count).cpu() for name, values in sums.items()}
