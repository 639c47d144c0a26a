"""Examples as batches of tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from gramfuse_client.data import Examples, open_image
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.task import Task

Batch = dict[str, torch.Tensor]

IGNORED = -100
"""The label of a position of which nothing is to be predicted, as transformers' losses have it."""


class Encoded(Dataset[dict[str, Any]]):
    """Examples as a model of a task takes them, unpadded; images are read when they are asked for.

    A row has the tokenizer's or image processor's arrays, and `labels`: an index, a number, a 0.0 or 1.0 for each label
    of the task, NaN where the silo does not annotate it (`multi-label`), or a list with one label for each token
    (`token-classification`: that of a word at the word's first token, IGNORED at others; `sequence-to-sequence`: the
    target's tokens; `causal-lm`: the tokens themselves).

    Args:
        tokenizer: `gramfuse_model.base.Base.tokenizer`: for images, the image processor.
        task: the silo's own.

    Raises:
        DataError: if a text is too short for a causal language model to learn from.
    """

    def __init__(self, examples: Examples, tokenizer: Any, task: Task) -> None:
        self.examples = examples
        self.tokenizer = tokenizer
        self.task = task
        self.rows = None if task.task == "image-classification" else _tokenized(examples, tokenizer, task)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.rows is not None:
            return self.rows[index]
        given = self.examples.inputs[index]
        where = "an image" if isinstance(given, bytes) else str(given)
        with open_image(given, where) as image:  # type: ignore[arg-type]  # so are the inputs of this kind
            pixels = self.tokenizer(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.examples.labels[index]}

    def lengths(self) -> list[int]:
        """Return the number of tokens of each example; images are all of one size."""
        return [1] * len(self) if self.rows is None else [len(row["input_ids"]) for row in self.rows]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Return rows as one batch, texts padded at their end.

        For `sequence-to-sequence`, there is a `decoder_attention_mask` too, and texts and targets are never padded to
        the same length: by its shape it can be told which of the two a mask belongs to.
        """
        labels = [row["labels"] for row in rows]
        inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
        if self.rows is None:
            return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": torch.tensor(labels)}
        padded = self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt")
        batch: Batch = dict(padded)
        if not isinstance(labels[0], list) or self.task.task == "multi-label":
            return batch | {"labels": torch.tensor(labels)}
        width = batch["input_ids"].shape[1]
        if self.task.task == "sequence-to-sequence":
            longest = max(map(len, labels))
            width = longest + 1 if longest == width else longest
        filled = torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in labels])
        if self.task.task == "sequence-to-sequence":
            batch["decoder_attention_mask"] = (filled != IGNORED).long()
        return batch | {"labels": filled}


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


def _tokenized(examples: Examples, tokenizer: Any, task: Task) -> list[dict[str, Any]]:
    words = task.task == "token-classification"
    encoded = tokenizer(
        [list(given) if isinstance(given, tuple) else given for given in examples.inputs],
        None if examples.pairs is None else list(examples.pairs),
        truncation=True,
        max_length=task.max_length,
        **({"is_split_into_words": True} if words else {}),
    )
    labels = _labels(examples, encoded, tokenizer, task)
    return [{**{key: encoded[key][i] for key in encoded}, "labels": label} for i, label in enumerate(labels)]


def _labels(examples: Examples, encoded: Any, tokenizer: Any, task: Task) -> Sequence[Any]:
    match task.task:
        case "multi-label":
            own = set(task.annotated)
            return [
                [float(label in applying) if label in own else math.nan for label in range(len(task.labels))]  # type: ignore[operator]
                for applying in examples.labels
            ]
        case "regression":
            return [(target - task.centre) / task.scale for target in examples.labels]  # type: ignore[operator]
        case "token-classification":
            return [_aligned(encoded.word_ids(i), tags) for i, tags in enumerate(examples.labels)]
        case "sequence-to-sequence":
            targets: list[list[int]] = tokenizer(
                text_target=list(examples.labels), truncation=True, max_length=task.target_length
            )["input_ids"]
            return targets
        case "causal-lm":
            short = sum(len(tokens) < 2 for tokens in encoded["input_ids"])
            if short:
                raise DataError(
                    f"{short:,} of {len(examples):,} texts are one token only, so there is no next token to learn; "
                    "leave them out"
                )
            return [list(tokens) for tokens in encoded["input_ids"]]
        case _:
            return examples.labels


def _aligned(words: Sequence[int | None], tags: Any) -> list[int]:
    """Return a word's tag at its first token, and IGNORED everywhere else.

    Args:
        words: which word each token is part of, if any.
    """
    return [
        IGNORED if word is None or word == before else tags[word]
        for before, word in zip([None, *words], words, strict=False)
    ]


def batches(encoded: Encoded, size: int, device: torch.device, *, by_length: bool = False) -> Iterator[Batch]:
    """Yield padded batches, `labels` included.

    Args:
        by_length: sort by length, which saves padding; otherwise in the order of the examples.
    """
    order = list(range(len(encoded)))
    if by_length:
        order.sort(key=encoded.lengths().__getitem__)
    for start in range(0, len(order), size):
        batch = encoded.collate([encoded[i] for i in order[start : start + size]])
        yield {key: value.to(device) for key, value in batch.items()}
