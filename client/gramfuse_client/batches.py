"""Examples as batches of tensors."""

from __future__ import annotations

import copy
import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from gramfuse_client.data import Examples
from gramfuse_client.images import read_image
from gramfuse_model.batch import IGNORED
from gramfuse_model.public_images import mode_of
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.task import Task

Batch = dict[str, torch.Tensor]

ANSWERS = ("labels", "words")
"""What of a batch is no input of a model."""


class Encoded(Dataset[dict[str, Any]]):
    """Examples as a model of a task takes them, unpadded; images are read when they are asked for.

    A row has the tokenizer's or image processor's arrays, and `labels`: an index, a number, a 0.0 or 1.0 for each label
    of the task, NaN where the silo does not annotate it (`multi-label`), or a list with one label for each token
    (`token-classification`: that of a word at the word's first token, IGNORED at others; `sequence-to-sequence`: the
    target's tokens; `causal-lm`: the tokens themselves, and IGNORED at the first, which nothing comes before); or None,
    where the examples have no labels.

    For `token-classification`, a row has `words` too: for each word, whether it has a label among the tokens, and its
    tag. A word has none that `max_length` cuts, or that the tokenizer makes nothing of, as of U+200B.

    Args:
        tokenizer: `gramfuse_model.base.Base.tokenizer`: for images, the image processor.
        task: the silo's own.
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
        image = read_image(given, where, mode_of(self.tokenizer))  # type: ignore[arg-type]  # so are the inputs of this kind
        pixels = self.tokenizer(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.examples.labels[index]}

    def check_learnable(self) -> None:
        """Raise DataError if there is nothing to learn from an example: of a batch of such, the loss is no number."""
        match self.task.task:
            case "causal-lm":
                empty = sum(len(row["input_ids"]) < 2 for row in self.rows or ())
                what = "texts are one token only, so there is no next token to learn"
            case "token-classification":
                empty = sum(not any(seen for seen, _ in row["words"]) for row in self.rows or ())
                what = "examples have no word that the tokenizer makes a token of, so there is no tag to learn"
            case _:
                return
        if empty:
            raise DataError(f"{empty:,} of {len(self):,} {what}; leave them out")

    def lengths(self) -> list[int]:
        """Return the number of tokens of each example; images are all of one size."""
        return [1] * len(self) if self.rows is None else [len(row["input_ids"]) for row in self.rows]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Return rows as one batch: texts padded on the side that the tokenizer has, targets at their end.

        For `sequence-to-sequence`, there is a `decoder_attention_mask` too.
        """
        labels = [row["labels"] for row in rows]
        inputs = [{key: value for key, value in row.items() if key not in ANSWERS} for row in rows]
        if self.rows is None:
            images = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
            return images if labels[0] is None else images | {"labels": torch.tensor(labels)}
        batch: Batch = dict(self.tokenizer.pad(inputs, return_attention_mask=True, return_tensors="pt"))
        if labels[0] is None:
            return batch
        if not isinstance(labels[0], list) or self.task.task == "multi-label":
            return batch | {"labels": torch.tensor(labels)}
        if self.task.task == "sequence-to-sequence":
            filled = pad_sequence([*map(torch.tensor, labels)], batch_first=True, padding_value=IGNORED)
            return batch | {"labels": filled, "decoder_attention_mask": (filled != IGNORED).long()}
        filled = torch.full_like(batch["input_ids"], IGNORED)
        filled[batch["attention_mask"].bool()] = torch.tensor([label for row in labels for label in row])
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
    # A tokenizer makes other tokens of single words than of a text, each in its own way, so it is given a text.
    encoded = tokenizer(
        [" ".join(given) if isinstance(given, tuple) else given for given in examples.inputs],
        None if examples.pairs is None else list(examples.pairs),
        truncation=True,
        max_length=task.max_length,
        return_offsets_mapping=words,
    )
    labels = _labels(examples, encoded, tokenizer, task)
    offsets = encoded.pop("offset_mapping", None)
    rows = [{**{key: encoded[key][i] for key in encoded}, "labels": label} for i, label in enumerate(labels)]
    if offsets is not None and labels[0] is not None:
        for row, places, given, tags in zip(rows, offsets, examples.inputs, examples.labels, strict=True):
            seen = set(_words_of(places, given))  # type: ignore[arg-type]  # so are the inputs of this kind
            row["words"] = [(word in seen, tag) for word, tag in enumerate(tags)]  # type: ignore[arg-type]
    return rows


def _labels(examples: Examples, encoded: Any, tokenizer: Any, task: Task) -> Sequence[Any]:
    if examples.labels[0] is None and task.task != "causal-lm":
        return examples.labels
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
            given = zip(examples.inputs, encoded["offset_mapping"], examples.labels, strict=True)
            return [_aligned(_words_of(offsets, words), tags) for words, offsets, tags in given]  # type: ignore[arg-type]  # so are the inputs of this kind
        case "sequence-to-sequence":
            targets: list[list[int]] = tokenizer(
                text_target=list(examples.labels), truncation=True, max_length=task.target_length
            )["input_ids"]
            return targets
        case "causal-lm":
            return [[IGNORED, *tokens[1:]] for tokens in encoded["input_ids"]]
        case _:
            return examples.labels


def _words_of(offsets: Sequence[tuple[int, int]], words: Sequence[str]) -> list[int | None]:
    """Return which word each token is part of, if any.

    Args:
        offsets: of tokens in the text that the words make with a space between two; of special tokens, empty ones.
    """
    text, ends = " ".join(words), list(accumulate(len(word) + 1 for word in words))
    found: list[int | None] = []
    for start, stop in offsets:
        place = next((n for n in range(start, stop) if not text[n].isspace()), stop - 1)
        found.append(None if start == stop else bisect_right(ends, place + 1))  # a space is the next word's
    return found


def _aligned(words: Sequence[int | None], tags: Any) -> list[int]:
    """Return a word's tag at its first token, and IGNORED everywhere else.

    Args:
        words: which word each token is part of, if any.
    """
    return [
        IGNORED if word is None or word == before else tags[word]
        for before, word in zip([None, *words], words, strict=False)
    ]


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


def inputs_of(batch: Mapping[str, torch.Tensor]) -> Batch:
    """Return what of a batch goes into a model."""
    return {key: value for key, value in batch.items() if key not in ANSWERS}
