"""The diagonal of a model's Fisher information: the mean over examples of squared gradients of the log-likelihood.

Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, equation 3: each example's
gradient is squared before anything is averaged, which the square of a batch's mean gradient is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from gramfuse_client.batches import Batch, inputs_of
from gramfuse_model.batch import IGNORED
from gramfuse_protocol.errors import ContributionError, PlanError
from gramfuse_protocol.task import Task

Variant = Literal["hard", "soft", "empirical"]
"""Of which label the likelihood is taken: the one that the model finds most likely, all of them, weighed by how likely
the model finds them, or the true one."""

VARIANTS: dict[str, tuple[Variant, ...]] = {
    "classification": ("hard", "soft", "empirical"),
    "image-classification": ("hard", "soft", "empirical"),
    "multi-label": ("hard", "soft", "empirical"),
    "token-classification": ("hard", "empirical"),
    "regression": ("empirical",),
    "sequence-to-sequence": ("empirical",),
    "causal-lm": ("empirical",),
}
"""What each kind of task can have. The expectation over all labellings of a text takes too many gradients."""


def choose_variant(task: Task, variant: Variant | None) -> Variant:
    """Return the variant that is asked for, or by default the first that the task can have.

    Raises:
        PlanError: if the task cannot have it.
    """
    possible = VARIANTS[task.task]
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
        terms = list(_log_likelihoods(model, example, task, variant))
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


def _log_likelihoods(
    model: nn.Module, example: Batch, task: Task, variant: Variant
) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield (weight, log-likelihood): the weighted squares of their gradients add up to the example's Fisher."""
    labels = example["labels"]
    if task.task == "sequence-to-sequence":
        logits = model(**example).logits  # (1, target tokens, vocabulary)
        yield 1.0, -functional.cross_entropy(logits[0], labels[0], ignore_index=IGNORED, reduction="sum")
        return
    logits = model(**inputs_of(example)).logits
    match task.task:
        case "regression":  # a Gaussian of variance 1
            yield 1.0, -0.5 * (logits.reshape(()) - labels.reshape(())).square()
        case "causal-lm":
            shifted, following = logits[0, :-1], labels[0, 1:]
            yield 1.0, -functional.cross_entropy(shifted, following, ignore_index=IGNORED, reduction="sum")
        case "token-classification":
            tags = (
                labels[0]
                if variant == "empirical"
                else torch.where(labels[0] == IGNORED, IGNORED, logits[0].argmax(-1))
            )
            yield 1.0, -functional.cross_entropy(logits[0], tags, ignore_index=IGNORED, reduction="sum")
        case "multi-label":
            yield from _of_label_set(logits[0], labels[0], task, variant)
        case _:
            yield from _of_label(logits[0], int(labels), task, variant)


def _of_label(logits: torch.Tensor, label: int, task: Task, variant: Variant) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield the log-probabilities of one label of several, softmax over those that are annotated."""
    likelihoods = logits[list(task.annotated)].log_softmax(dim=0)
    match variant:
        case "empirical":
            yield 1.0, likelihoods[task.annotated.index(label)]
        case "hard":
            yield 1.0, likelihoods[int(likelihoods.argmax())]
        case "soft":
            for likelihood in likelihoods:
                yield float(likelihood.detach().exp()), likelihood


def _of_label_set(
    logits: torch.Tensor, labels: torch.Tensor, task: Task, variant: Variant
) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield the log-likelihood of a set of independent labels.

    For `soft`, the expectation over all sets is a sum over labels, since ∂ log p(y)/∂z = y − σ(z) has the mean 0 and
    the variance σ(z)(1 − σ(z)): Σ σ(1 − σ) (∂z/∂θ)².
    """
    own = list(task.annotated)
    z = logits[own]
    if variant == "soft":
        for one in z:
            p = float(one.detach().sigmoid())
            yield p * (1 - p), one
        return
    y = labels[own].to(z.dtype) if variant == "empirical" else (z.detach().sigmoid() >= task.threshold).to(z.dtype)
    yield 1.0, -functional.binary_cross_entropy_with_logits(z, y, reduction="sum")
