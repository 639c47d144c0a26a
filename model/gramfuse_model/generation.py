"""Text generation in evaluation: with fixed settings, whatever the base model's files say.

A base model's generation settings (`generation_config.json`) can set a minimum length, a forced first token, suppressed
tokens or several beams. They suit its original task, and fine-tuning does not change them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""The model's own settings that are kept: special tokens where texts begin and end."""


@contextmanager
def answering(model: PreTrainedModel, task: Task, tokenizer: Any) -> Iterator[None]:
    """Make a model decode greedily, at most `target-length` tokens; its own settings are restored on exit.

    Raises:
        ModelError: if the task's `first-token` is not in the vocabulary.
    """
    original = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=task.target_length,
        do_sample=False,
        num_beams=1,
        forced_bos_token_id=first_token(tokenizer, task),
        **{key: getattr(original, key) for key in KEPT},
    )
    try:
        yield
    finally:
        model.generation_config = original


def first_token(tokenizer: Any, task: Task) -> int | None:
    """Return the id of the forced first token of all generated texts; None if the plan names none.

    Raises:
        ModelError: if it is not in the vocabulary.
    """
    if task.first_token is None:
        return None
    index: int | None = tokenizer.get_vocab().get(task.first_token)
    if index is None:
        raise ModelError(
            f"first-token {task.first_token!r} is not in the vocabulary of the base model's tokenizer; write it as the "
            'tokenizer does, for example "de_DE" or "__de__", or omit the key'
        )
    return index
