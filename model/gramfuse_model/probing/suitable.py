"""Whether a base model can do what a task asks of it: found out before a plan is locked, and before data are read."""

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
    """Raise ModelError if a base model's head cannot take a task's `centre` and `scale`, it has no `first-token`, or it
    sees the tokens that it is to predict.

    Args:
        base: with the task's head.
    """
    check_foldable(base, task)
    first_token(base.tokenizer, task)
    check_causal(base, task)


def check_answers(base: Base) -> None:
    """Raise ModelError if a base model of images gives no logits, as PP-LCNet does: it can be trained on no label."""
    if not base.takes_images:
        return
    batch = public_batch(base)
    with trying(base, batch), observing(base.model, []):
        if "logits" not in (found := run(base.model, batch)):
            raise ModelError(
                f"a {type(base.model).__name__} gives {', '.join(found)} and no logits, so gramfuse can neither "
                "train it nor say how good it is; take another model. One that was fine-tuned elsewhere can be merged: "
                "gramfuse measure"
            )
