"""Encodes examples, and makes batches of tensors."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from gramfuse_client.data.examples import Examples
from gramfuse_client.tasks.registry import at_silo
from gramfuse_model.probing.batch import ANSWERS, IGNORED, Batch
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError


class Encoded(Dataset[dict[str, Any]]):
    """Examples encoded for a model, unpadded. Images are read lazily.

    A row has the arrays of the tokenizer or image processor, and `labels`: the training target in the form of the kind
    of task (`gramfuse_client.tasks`), or None if the examples have no labels. For `token-classification`, a row also
    has `words`: for each word, whether it has a token, and its tag. A word has no token if `max_length` cuts it off, or
    if the tokenizer drops all its characters, such as U+200B.

    Args:
        tokenizer: `gramfuse_model.loading.base_model.Base.tokenizer`; for images, the image processor.
        task: the silo's task.
    """

    def __init__(self, examples: Examples, tokenizer: Any, task: Task) -> None:
        self.examples = examples
        self.tokenizer = tokenizer
        self.task = task
        self.kind = at_silo(task)
        self.rows = self.kind.encode(examples, tokenizer, task)

    def hide_rare(self, least: int) -> Encoded:
        """Take out what may not be in the sums that a head is fitted from (`TaskAtSilo.hide_rare`), and return self."""
        if self.rows is not None:
            self.kind.hide_rare(self.examples, self.rows, least)
        return self

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.rows is not None:
            return self.rows[index]
        return self.kind.encode_one(self.examples, index, self.tokenizer)

    def check_learnable(self) -> None:
        """Raise DataError if an example has nothing to learn: a batch of only such examples has loss NaN."""
        if count := self.kind.unlearnable(self.rows or ()):
            raise DataError(f"{count:,} of {len(self):,} {self.kind.nothing_to_learn}; leave them out")

    def lengths(self) -> list[int]:
        """Return each example's number of tokens; 1 for images, which all have the same size."""
        return [1] * len(self) if self.rows is None else [len(row["input_ids"]) for row in self.rows]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Return rows as one batch: texts padded on the tokenizer's side, targets padded on the right.

        For `sequence-to-sequence`, the batch also has a `decoder_attention_mask`.
        """
        batch = self.kind.inputs([{k: v for k, v in row.items() if k not in ANSWERS} for row in rows], self.tokenizer)
        labels = [row["labels"] for row in rows]
        return batch if labels[0] is None else batch | self.kind.label_tensors(batch, labels)


def pooled(parts: Sequence[Encoded]) -> Encoded:
    """Concatenate the examples of several silos.

    Args:
        parts: of one task, but silos may annotate different labels (`multi-label`).
    """
    pool = copy.copy(parts[0])
    examples = [part.examples for part in parts]
    pairs = [pair for each in examples for pair in each.pairs or ()]
    pool.examples = Examples(
        [item for each in examples for item in each.inputs],
        pairs or None,
        [label for each in examples for label in each.labels],
    )
    pool.rows = None if parts[0].rows is None else [row for part in parts for row in part.rows or ()]
    return pool


def batches(
    encoded: Encoded, size: int, device: torch.device, *, by_length: bool = False, seed: int | None = None
) -> Iterator[Batch]:
    """Yield padded batches, including the targets `labels`, and for `token-classification` `words`.

    `words` is (batch, words, 2), in the form of the rows of `Encoded`, and IGNORED after an example's last word.

    Args:
        size: examples in a batch.
        by_length: sort by length, which saves padding; otherwise keep the order.
        seed: shuffle with this seed, so that the first examples are a random sample; None keeps the order.
    """
    order = batch_order(encoded, by_length=by_length, seed=seed)
    for start in range(0, len(order), size):
        rows = [encoded[i] for i in order[start : start + size]]
        batch = encoded.collate(rows)
        if "words" in rows[0]:
            words = [torch.tensor(row["words"]) for row in rows]  # (words, 2) each
            batch["words"] = pad_sequence(words, batch_first=True, padding_value=IGNORED)
        yield {key: value.to(device) for key, value in batch.items()}


def batch_order(encoded: Encoded, *, by_length: bool = False, seed: int | None = None) -> list[int]:
    """Return the order of examples in batches; arguments as in `batches`."""
    order = list(range(len(encoded)))
    if seed is not None:
        random.Random(seed).shuffle(order)  # noqa: S311  # a sample, not a secret
    if by_length:
        order.sort(key=encoded.lengths().__getitem__)
    return order
