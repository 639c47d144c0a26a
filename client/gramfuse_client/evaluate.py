"""Measures a model on a silo's held-out examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from gramfuse_client.batches import IGNORED
from gramfuse_protocol.metrics import (
    Sums,
    classification_sums,
    entity_sums,
    generation_sums,
    language_sums,
    multi_label_sums,
    regression_sums,
    sums_shape,
)
from gramfuse_protocol.task import Task


class Outputs(NamedTuple):
    """What a model says of a batch.

    Args:
        logits: (batch, outputs), or (batch, positions, outputs) where there is one output for each position.
        texts: what it generates, for `sequence-to-sequence`; else empty.
    """

    logits: torch.Tensor
    texts: tuple[str, ...] = ()


def outputs(model: Any, batch: Mapping[str, torch.Tensor], task: Task, tokenizer: Any) -> Outputs:
    """Run a model on a batch, without autograd; it must be in evaluation mode.

    Texts are generated greedily, of `target_length` tokens at most.
    """
    with torch.no_grad():
        if task.task != "sequence-to-sequence":
            return Outputs(model(**{key: value for key, value in batch.items() if key != "labels"}).logits)
        logits = model(**batch).logits  # the labels give the decoder its inputs
        generated = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=task.target_length,
            do_sample=False,
            num_beams=1,
        )
        return Outputs(logits, tuple(tokenizer.batch_decode(generated, skip_special_tokens=True)))


def count(batch: Mapping[str, torch.Tensor], found: Outputs, task: Task, tokenizer: Any) -> Sums:
    """Return the sums of one batch (`gramfuse_protocol.metrics`).

    Labels that the silo does not annotate are neither predicted nor counted. Of `token-classification`, the words count
    that `max_length` leaves; a target text is compared as the tokenizer gives it back, `target_length` tokens long.

    Args:
        batch: `labels` included.
        found: of a model, or of several together.
    """
    truth, logits = batch["labels"].cpu(), found.logits.float().cpu()
    match task.task:
        case "classification" | "image-classification":
            own = torch.tensor(task.annotated)
            predicted = own[logits[:, own].argmax(dim=-1)]
            return classification_sums(truth.numpy(), predicted.numpy(), len(task.labels))
        case "regression":
            return regression_sums(truth.numpy(), logits.squeeze(-1).numpy())
        case "multi-label":
            likely = torch.sigmoid(logits) >= task.threshold
            return multi_label_sums(truth.bool().numpy(), likely.numpy(), task.annotated)
        case "token-classification":
            return entity_sums(_tags(truth, truth, task), _tags(logits.argmax(dim=-1), truth, task), task.entities)
        case "sequence-to-sequence":
            targets = truth.masked_fill(truth == IGNORED, tokenizer.pad_token_id)
            texts = tokenizer.batch_decode(targets, skip_special_tokens=True)
            tokens, nll, _ = _next_tokens(logits, truth)
            return generation_sums(texts, found.texts, tokens, nll)
        case "causal-lm":
            return language_sums(len(truth), *_next_tokens(logits[:, :-1], truth[:, 1:]))


def evaluate(model: Any, batches: Iterable[Mapping[str, torch.Tensor]], task: Task, tokenizer: Any) -> Sums:
    """Return the held-out sums of a model (`gramfuse_protocol.metrics`).

    Args:
        batches: as `gramfuse_client.batches.batches` yields them, `labels` included.
        task: the silo's own.
        tokenizer: what the batches were made with.
    """
    model.eval()
    total = np.zeros(sums_shape(task), np.float64)
    for batch in batches:
        total += count(batch, outputs(model, batch, task, tokenizer), task, tokenizer)
    return total


def _tags(indices: torch.Tensor, truth: torch.Tensor, task: Task) -> list[list[str]]:
    """Return the tags of each example's words, which are where the truth is not IGNORED."""
    return [
        [task.labels[index] for index in row[true != IGNORED].tolist()]
        for row, true in zip(indices, truth, strict=True)
    ]


def _next_tokens(logits: torch.Tensor, truth: torch.Tensor) -> tuple[int, float, int]:
    """Return how many tokens were to be predicted, their negative log-likelihood, and how many were predicted right."""
    real = truth != IGNORED
    nll = cross_entropy(logits[real].double(), truth[real], reduction="sum")
    return int(real.sum()), float(nll), int((logits[real].argmax(dim=-1) == truth[real]).sum())
