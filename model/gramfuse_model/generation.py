"""How models that answer are asked when they are measured: by settings of ours, whatever their files say.

A base model brings settings for generation (`generation_config.json`): a least length, a first token, tokens that must
not come, several beams. They were made for what it was trained for, and fine-tuning does not change them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Of a model's own settings: where texts begin and end."""


@contextmanager
def answering(model: PreTrainedModel, task: Task, tokenizer: Any) -> Iterator[None]:
    """Have a model generate the likeliest token, one after the other, at most `target-length`, and nothing else.

    Raises:
        ModelError: if the tokenizer does not know the task's `first-token`.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=task.target_length,
        do_sample=False,
        num_beams=1,
        forced_bos_token_id=first_token(tokenizer, task),
        **{key: getattr(own, key) for key in KEPT},
    )
    try:
        yield
    finally:
        model.generation_config = own


def first_token(tokenizer: Any, task: Task) -> int | None:
    """Return the index of the token that all generated texts begin with, or None if the plan asks for none.

    Raises:
        ModelError: if the tokenizer does not know it.
    """
    if task.first_token is None:
        return None
    index: int | None = tokenizer.get_vocab().get(task.first_token)
    if index is None:
        raise ModelError(
            f"first-token {task.first_token!r} is no token of the base model's tokenizer; name one as the tokenizer "
            'writes it, such as "de_DE" or "__de__", or leave the key out'
        )
    return index
