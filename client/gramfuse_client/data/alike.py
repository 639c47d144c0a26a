"""Which examples count as the same where different ones are counted."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from gramfuse_protocol.contract.task import Task

if TYPE_CHECKING:
    from gramfuse_client.data.examples import Examples


def normalised(text: str) -> str:
    """Return a text with case folded and white space collapsed."""
    return " ".join(text.casefold().split())


def alike(examples: Examples, task: Task, tokenizer: Any = None) -> list[Hashable]:
    """Return a key for each example; examples with equal keys count as one.

    Texts are alike if they differ only in case and white space, or, with a tokenizer, only in what `max-length` cuts
    off. An image is the SHA-256 of its file.

    Args:
        task: has `max-length`.
        tokenizer: of the base; None where it is not at hand.
    """
    keys = [(text if isinstance(text, str) else " ".join(text), pair) for text, pair in examples.input_keys]
    texts, pairs = [normalised(text) for text, _ in keys], [normalised(pair or "") for _, pair in keys]
    if tokenizer is None or not all(isinstance(each, str) for each in examples.inputs[:1]) or not texts:
        return list(zip(texts, pairs, strict=True))
    settings = {"truncation": True, "max_length": task.max_length}
    encoded = tokenizer(texts, None if examples.pairs is None else pairs, **settings)
    return [tuple(tokens) for tokens in encoded["input_ids"]]
