"""Token classification: a tag for each word of a text.

| input | label |
|---|---|
| `text`: a list of words, or words between white space | a list of tags, or tags between spaces, one for each word |

A word's tag is learned at its first token; other tokens have the label IGNORED.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from typing import TYPE_CHECKING, Any

from gramfuse_client.data.columns import Input, Reader, check_characters, unpacked
from gramfuse_client.data.formats import Row
from gramfuse_client.tasks.registry import TaskAtSilo, Terms, Variant, register
from gramfuse_client.tasks.words import list_counts
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.secure_sum.scales import MOST_WEIGHED
from gramfuse_protocol.tasks.token_classification import OUTSIDE, entities
from gramfuse_protocol.text import quoted

if TYPE_CHECKING:
    import torch

    from gramfuse_client.data.examples import Examples
    from gramfuse_client.training.outputs import Outputs
    from gramfuse_model.probing.batch import Batch

PRINTED = re.compile(r"\s*\[\s*['\"].*\]\s*", re.DOTALL)
"""Matches a list of texts as printed by Python or numpy."""


@register
class TokenClassificationAtSilo(TaskAtSilo):
    """Token classification.

    All words count; a word without a token, or cut off by `max_length`, is predicted as O.
    """

    name = "token-classification"
    fisher = ("hard", "empirical")
    nothing_to_learn = "examples have no word with a token, so there is no tag to learn"

    def input(self, row: Row, reader: Reader, where: str) -> tuple[str, ...]:
        """Return the words of a text."""
        column = reader.columns.text
        value = reader.value(row, column, where)
        words = unpacked(value)
        if isinstance(words, str):
            if PRINTED.fullmatch(words):
                raise DataError(
                    f"{where}: column {column!r} holds a list in Python's notation: {quoted(value)}; write a JSON "
                    'list, ["a", "b"], or words between spaces'
                )
            words = words.split()
        if not isinstance(words, list) or not words:
            raise DataError(
                f"{where}: column {column!r} must hold a list of words, or words between spaces, found {quoted(value)}"
            )
        for position, word in enumerate(words, 1):
            if not isinstance(word, str) or not word.strip():
                raise DataError(f"{where}: column {column!r}: word {position} must be text, found {quoted(word)}")
            check_characters(word, column, where)
        return tuple(words)

    def label(self, row: Row, given: Input, reader: Reader, where: str) -> tuple[int, ...]:
        """Return the index of each word's tag. For metrics, an I-X without a preceding B-X begins an entity."""
        assert isinstance(given, tuple)  # noqa: S101
        column = reader.columns.label
        value = reader.value(row, column, where)
        tags = unpacked(value)
        if isinstance(tags, str):
            tags = tags.split()
        if not isinstance(tags, list) or len(tags) != len(given):
            count = f"{len(tags)}" if isinstance(tags, list) else quoted(value)
            raise DataError(
                f"{where}: column {column!r} must hold one tag for each of the {len(given)} words, found {count}"
            )
        return tuple(reader.index(tag, where) for tag in tags)

    def encode(self, examples: Examples, tokenizer: Any, task: Task) -> list[dict[str, Any]]:
        """Return a row for each example, with `words` if there are labels.

        Tokenizers encode single words differently from running text, so each example is encoded as one text.
        """
        inputs: Sequence[Any] = examples.inputs
        labels: Sequence[Any] = examples.labels
        texts = [" ".join(words) for words in inputs]
        encoded = tokenizer(texts, None, truncation=True, max_length=task.max_length, return_offsets_mapping=True)
        places = [
            _words_of(offsets, words) for offsets, words in zip(encoded.pop("offset_mapping"), inputs, strict=True)
        ]
        rows = [{**{key: encoded[key][i] for key in encoded}, "labels": None} for i in range(len(texts))]
        if labels[0] is not None:
            for row, tokens, tags in zip(rows, places, labels, strict=True):
                row["labels"], seen = _aligned(tokens, tags), set(tokens)
                row["words"] = [(word in seen, tag) for word, tag in enumerate(tags)]
        return rows

    def common(self, examples: Examples, task: Task, least: int, keys: Sequence[Hashable]) -> list[int]:
        """Return the indices of all examples, or of every second, third, …, if a secure sum cannot add up all words."""
        lengths = [len(words) for words in examples.inputs if isinstance(words, tuple)]
        step = next(n for n in count(1) if sum(lengths[::n]) <= MOST_WEIGHED or n == len(lengths))
        return list(range(0, len(examples), step))

    def hide_rare(self, examples: Examples, rows: Sequence[dict[str, Any]], least: int) -> None:
        """Ignore the words of tags that fewer than so many different words have, not counting words without a token."""
        from gramfuse_model.probing.batch import IGNORED

        different = set()
        for words, row in zip(examples.inputs, rows, strict=True):
            assert isinstance(words, tuple)  # noqa: S101
            seen = zip(words, row["words"], strict=True)
            different |= {(word.casefold(), tag) for word, (has_token, tag) in seen if has_token}
        counts = Counter(tag for _, tag in different)
        for row in rows:
            row["labels"] = [IGNORED if counts[tag] < least else tag for tag in row["labels"]]

    def unlearnable(self, rows: Sequence[Mapping[str, Any]]) -> int:
        return sum(not any(seen for seen, _ in row["words"]) for row in rows)

    def label_tensors(self, batch: Batch, labels: Sequence[Any]) -> Batch:
        from gramfuse_client.training.outputs import at_tokens

        return at_tokens(batch, labels)

    def log_likelihoods(self, model: torch.nn.Module, example: Batch, task: Task, variant: Variant) -> Terms:
        """Yield the log-likelihood of all words' tags."""
        from torch import where
        from torch.nn.functional import cross_entropy

        from gramfuse_model.probing.batch import IGNORED, inputs_of

        logits, labels = model(**inputs_of(example)).logits[0], example["labels"][0]
        tags = labels if variant == "empirical" else where(labels == IGNORED, IGNORED, logits.argmax(-1))
        yield 1.0, -cross_entropy(logits, tags, ignore_index=IGNORED, reduction="sum")

    def facts(self, batch: Mapping[str, torch.Tensor], outputs: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
        return _tags_of(batch["words"], batch["labels"], outputs.logits.argmax(dim=-1), task)

    def describe_labels(self, examples: Examples, task: Task) -> str:
        """Describe how many entities there are of each type."""
        counts = Counter(kind for tags in _tag_names(examples, task) for kind, _, _ in entities(tags))
        return list_counts({kind: counts[kind] for kind in task.entities}, "types of entities")


def _tag_names(examples: Examples, task: Task) -> Iterator[list[str]]:
    """Yield each example's tags by name."""
    for tags in examples.labels:
        assert isinstance(tags, tuple)  # noqa: S101
        yield [task.labels[index] for index in tags]


def _words_of(offsets: Sequence[tuple[int, int]], words: Sequence[str]) -> list[int | None]:
    """Return the index of each token's word; None for special tokens.

    Args:
        offsets: start and end of each token in the words joined by spaces; empty for special tokens.
    """
    text, ends = " ".join(words), list(accumulate(len(word) + 1 for word in words))
    indices: list[int | None] = []
    for start, stop in offsets:
        place = next((n for n in range(start, stop) if not text[n].isspace()), stop - 1)
        indices.append(None if start == stop else bisect_right(ends, place + 1))  # a space belongs to the next word
    return indices


def _aligned(words: Sequence[int | None], tags: Any) -> list[int]:
    """Return a label for each token: its word's tag at the first token of a word, IGNORED elsewhere.

    Args:
        words: the index of each token's word, or None.
    """
    from gramfuse_model.probing.batch import IGNORED

    return [
        IGNORED if word is None or word == before else tags[word]
        for before, word in zip([None, *words], words, strict=False)
    ]


def _tags_of(
    words: torch.Tensor, truth: torch.Tensor, predicted: torch.Tensor, task: Task
) -> tuple[list[list[str]], list[list[str]]]:
    """Return the true and the predicted tags of each example's words.

    Args:
        words: (batch, words, 2): whether a word has a token, and its tag.
        truth, predicted: (batch, positions), by token; truth is IGNORED except at the first token of each word.
    """
    from gramfuse_model.probing.batch import IGNORED

    tags: tuple[list[list[str]], list[list[str]]] = [], []
    for row, true, indices in zip(words, truth, predicted, strict=True):
        at_first_tokens = iter(indices[true != IGNORED].tolist())
        real = row[row[:, 1] != IGNORED].tolist()
        tags[0].append([task.labels[tag] for _, tag in real])
        tags[1].append([task.labels[next(at_first_tokens)] if has_token else OUTSIDE for has_token, _ in real])
    return tags
