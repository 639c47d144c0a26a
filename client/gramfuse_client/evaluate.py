"""Measures a model on a silo's held-out examples: exactly, or for a sum that leaves with noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from gramfuse_client.afresh import Afresh
from gramfuse_client.batches import Encoded, batches, inputs_of
from gramfuse_model.answering import answering
from gramfuse_model.batch import IGNORED
from gramfuse_protocol.held_out import LOSS, Vector, size
from gramfuse_protocol.metrics import Sums, sums_shape
from gramfuse_protocol.task import Task
from gramfuse_protocol.tasks.registry import kind_of
from gramfuse_protocol.tasks.scores import Tokens
from gramfuse_protocol.tasks.token_classification import OUTSIDE


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

    Texts are generated as `gramfuse_model.answering` says.
    """
    with torch.no_grad():
        if task.task != "sequence-to-sequence":
            return Outputs(model(**inputs_of(batch)).logits)
        logits = model(**batch).logits  # the labels give the decoder its inputs
        with answering(model, task, tokenizer):
            generated = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return Outputs(logits, tuple(tokenizer.batch_decode(generated, skip_special_tokens=True)))


def count(batch: Mapping[str, torch.Tensor], found: Outputs, task: Task, tokenizer: Any) -> Sums:
    """Return the sums of one batch (`gramfuse_protocol.metrics`), exactly.

    Labels that the silo does not annotate are neither predicted nor counted. Of `token-classification`, all words
    count: of one without a token, or behind `max_length`, a model says nothing, which is O. A target text is compared
    as the tokenizer gives it back, `target_length` tokens long.

    Args:
        batch: `labels` included, and `words` (`gramfuse_client.batches.batches`).
        found: of a model, or of several together.
    """
    return kind_of(task).sums(task, *_facts(batch, found, task, tokenizer))


def rows(batch: Mapping[str, torch.Tensor], found: Outputs, task: Task, tokenizer: Any) -> Vector:
    """Return the sum of the rows of one batch (`gramfuse_protocol.held_out`): bounded, whatever the model says.

    Arguments as `count` has them, and otherwise counted as there.
    """
    return kind_of(task).rows(task, *_facts(batch, found, task, tokenizer))


def evaluate(model: Any, batches: Iterable[Mapping[str, torch.Tensor]], task: Task, tokenizer: Any) -> Sums:
    """Return the held-out sums of a model (`gramfuse_protocol.metrics`), exactly.

    Args:
        batches: as `gramfuse_client.batches.batches` yields them, `labels` included.
        task: the silo's own.
        tokenizer: what the batches were made with.
    """
    return _total(model, batches, task, tokenizer, count, np.zeros(sums_shape(task), np.float64))


def evaluate_for_sum(model: Any, encoded: Encoded, device: torch.device, task: Task, tokenizer: Any) -> Vector:
    """Return the sum of a model's rows (`gramfuse_protocol.held_out`), for a sum that leaves with noise.

    Examples are measured one by one, so that what a model says of one cannot depend on another: in a batch it could,
    since a model with crafted weights sees the padding. What the model kept of one is gone before the next.

    Args:
        encoded: held-out examples.
        device: where the model is.
        task, tokenizer: as `evaluate` has them.
    """
    return _total(model, _each_afresh(model, batches(encoded, 1, device)), task, tokenizer, rows, np.zeros(size(task)))


def _each_afresh(model: Any, given: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[Mapping[str, torch.Tensor]]:
    before = Afresh(model)
    for batch in given:
        before.restore()
        yield batch


def _total(
    model: Any,
    given: Iterable[Mapping[str, torch.Tensor]],
    task: Task,
    tokenizer: Any,
    counted: Callable[[Mapping[str, torch.Tensor], Outputs, Task, Any], NDArray[np.float64]],
    total: NDArray[np.float64],
) -> NDArray[np.float64]:
    model.eval()
    for batch in given:
        total += counted(batch, outputs(model, batch, task, tokenizer), task, tokenizer)
    return total


def _facts(batch: Mapping[str, torch.Tensor], found: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
    """Return truth and prediction of each example, as what counts a task's examples takes them."""
    truth, logits = batch["labels"].cpu(), found.logits.float().cpu()
    match task.task:
        case "classification" | "image-classification":
            own = torch.tensor(task.annotated)
            return truth.numpy(), own[logits[:, own].argmax(dim=-1)].numpy()
        case "regression":  # on the targets' own scale
            return tuple((task.centre + task.scale * of.double()).numpy() for of in (truth, logits.squeeze(-1)))
        case "multi-label":
            return truth.bool().numpy(), (torch.sigmoid(logits) >= task.threshold).numpy()
        case "token-classification":
            return _tags(batch["words"].cpu(), truth, logits.argmax(dim=-1), task)
        case "sequence-to-sequence":
            targets = truth.masked_fill(truth == IGNORED, tokenizer.pad_token_id)
            texts = tokenizer.batch_decode(targets, skip_special_tokens=True)
            return texts, found.texts, _next_tokens(logits, truth)
        case "causal-lm":
            return (_next_tokens(logits[:, :-1], truth[:, 1:]),)
        case _:
            raise AssertionError


def _tags(
    words: torch.Tensor, truth: torch.Tensor, predicted: torch.Tensor, task: Task
) -> tuple[list[list[str]], list[list[str]]]:
    """Return the tags of each example's words: the true ones, and those that are predicted.

    Args:
        words: (batch, words, 2), whether a word has a token, and its tag.
        truth, predicted: (batch, positions), of tokens; the truth is IGNORED but at the first token of each word.
    """
    tags: tuple[list[list[str]], list[list[str]]] = [], []
    for row, true, said in zip(words, truth, predicted, strict=True):
        of_tokens = iter(said[true != IGNORED].tolist())
        real = row[row[:, 1] != IGNORED].tolist()
        tags[0].append([task.labels[tag] for _, tag in real])
        tags[1].append([task.labels[next(of_tokens)] if seen else OUTSIDE for seen, _ in real])
    return tags


def _next_tokens(logits: torch.Tensor, truth: torch.Tensor) -> Tokens:
    """Return what a model said of each token that was to be predicted, by example."""
    found = []
    for said, true in zip(logits, truth, strict=True):
        real = true != IGNORED
        losses = cross_entropy(said[real].double(), true[real], reduction="none")
        clipped = losses.nan_to_num(nan=LOSS).clamp(0.0, LOSS)
        right = said[real].argmax(dim=-1) == true[real]
        found.append([float(of.sum()) for of in (real, losses, clipped, right)])
    return Tokens(*np.array(found, np.float64).T)
