"""Examples as batches of tensors."""

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
from gramfuse_client.training.outputs import ANSWERS, Batch
from gramfuse_model.probing.batch import IGNORED
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError


class Encoded(Dataset[dict[str, Any]]):
    """Examples as a model of a task takes them, unpadded; images are read when they are asked for.

    A row has the tokenizer's or image processor's arrays, and `labels`: what is to be learned, as the kind of task has
    it (`gramfuse_client.tasks`), or None, where the examples have no labels. For `token-classification`, a row has
    `words` too: for each word, whether it has a label among the tokens, and its tag. A word has none that `max_length`
    cuts, or that the tokenizer makes nothing of, as of U+200B.

    Args:
        tokenizer: `gramfuse_model.loading.base_model.Base.tokenizer`: for images, the image processor.
        task: the silo's own.
    """

    def __init__(self, examples: Examples, tokenizer: Any, task: Task) -> None:
        self.examples = examples
        self.tokenizer = tokenizer
        self.task = task
        self.kind = at_silo(task)
        self.rows = self.kind.encode(examples, tokenizer, task)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.rows is not None:
            return self.rows[index]
        return self.kind.encode_one(self.examples, index, self.tokenizer)

    def check_learnable(self) -> None:
        """Raise DataError if there is nothing to learn from an example: of a batch of such, the loss is no number."""
        if empty := self.kind.unlearnable(self.rows or ()):
            what = self.kind.nothing_to_learn
            raise DataError(f"{empty:,} of {len(self):,} {what}; leave them out")

    def lengths(self) -> list[int]:
        """Return the number of tokens of each example; images are all of one size."""
        return [1] * len(self) if self.rows is None else [len(row["input_ids"]) for row in self.rows]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Return rows as one batch: texts padded on the side that the tokenizer has, targets at their end.

        For `sequence-to-sequence`, there is a `decoder_attention_mask` too.
        """
        batch = self.kind.inputs([{k: v for k, v in row.items() if k not in ANSWERS} for row in rows], self.tokenizer)
        labels = [row["labels"] for row in rows]
        return batch if labels[0] is None else batch | self.kind.label_tensors(batch, labels)


def pooled(parts: Sequence[Encoded]) -> Encoded:
    """Return the examples of several silos together, one silo after the other; all have one task, but for labels that
    one of them does not annotate (`multi-label`).
    """
    whole = copy.copy(parts[0])
    examples = [part.examples for part in parts]
    pairs = [pair for each in examples for pair in each.pairs or ()]
    whole.examples = Examples(
        [given for each in examples for given in each.inputs],
        pairs or None,
        [label for each in examples for label in each.labels],
    )
    whole.rows = None if parts[0].rows is None else [row for part in parts for row in part.rows or ()]
    return whole


def batches(
    encoded: Encoded, size: int, device: torch.device, *, by_length: bool = False, seed: int | None = None
) -> Iterator[Batch]:
    """Yield padded batches, with what is to be predicted: `labels`, and for `token-classification` `words`.

    `words` is (batch, words, 2), IGNORED behind an example's last word: as rows of `Encoded` have it.

    Args:
        by_length: sort by length, which saves padding; otherwise in the order of the examples.
        seed: draw an order by it, so that the first examples stand for all.
    """
    order = drawn(len(encoded), seed)
    if by_length:
        order.sort(key=encoded.lengths().__getitem__)
    for start in range(0, len(order), size):
        rows = [encoded[i] for i in order[start : start + size]]
        batch = encoded.collate(rows)
        if "words" in rows[0]:
            words = [torch.tensor(row["words"]) for row in rows]  # (words, 2) each
            batch["words"] = pad_sequence(words, batch_first=True, padding_value=IGNORED)
        yield {key: value.to(device) for key, value in batch.items()}


def drawn(count: int, seed: int | None) -> list[int]:
    """Return the order in which so many examples are in batches that are not sorted by length."""
    order = list(range(count))
    if seed is not None:
        random.Random(seed).shuffle(order)  # noqa: S311  # a sample, not a secret
    return order
