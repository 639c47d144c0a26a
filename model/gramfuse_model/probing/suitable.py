"""Checks that a base model suits a task, before a plan is locked and before data are read."""

from __future__ import annotations

from gramfuse_model.generation import first_token
from gramfuse_model.loading.base_model import Base
from gramfuse_model.probing.causality import check_causal
from gramfuse_model.probing.hooks import observing, run
from gramfuse_model.probing.public_batch import public_batch, trying
from gramfuse_model.probing.rescaled_targets import check_foldable
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError


def check_suitable(base: Base, task: Task) -> None:
    """Check that a base model suits a task.

    Args:
        base: the base model with the task's head.

    Raises:
        ModelError: if its head cannot absorb the task's `centre` and `scale`, its vocabulary lacks the `first-token`,
            it sees the tokens that it should predict, or completions would have no end.
    """
    check_foldable(base, task)
    first_token(base.tokenizer, task)
    check_causal(base, task)
    if task.task == "prompt-completion" and base.tokenizer.eos_token_id is None:
        raise ModelError(
            "the base model's tokenizer has no end-of-text token, so a model could not learn where a completion ends; "
            "set tokenizer.eos_token to one of its tokens, and save it with save_pretrained"
        )


def check_answers(base: Base) -> None:
    """Raise ModelError if an image model outputs no logits, as PP-LCNet does, so it cannot be trained on labels."""
    if not base.takes_images:
        return
    batch = public_batch(base)
    with trying(base, batch), observing(base.model, []):
        if "logits" not in (output := run(base.model, batch)):
            raise ModelError(
                f"a {type(base.model).__name__} outputs {', '.join(output)} but no logits, so gramfuse can neither "
                "train nor evaluate it; use another model. A model that was fine-tuned elsewhere can be merged: "
                "gramfuse measure"
            )
