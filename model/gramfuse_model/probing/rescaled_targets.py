"""Checks that a base model can be trained on rescaled targets (`gramfuse_model.rescaling`)."""

from __future__ import annotations

import torch

from gramfuse_model.heads import last_linear
from gramfuse_model.loading.base_model import Base
from gramfuse_model.probing.public_batch import public_batch
from gramfuse_model.rescaling import fold, rescaled
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError

TOLERANCE = 1e-3
"""Tolerance of a folded model's outputs, relative to the scale."""


def check_foldable(base: Base, task: Task) -> None:
    """Fold a base model's head, check that its outputs are rescaled accordingly, and restore the head.

    Raises:
        ModelError: as `fold`, and if the outputs are not rescaled accordingly.
    """
    if not rescaled(task):
        return
    model = base.model
    batch = {key: value.to(model.device) for key, value in public_batch(base).items()}
    last = last_linear(model, 1)
    kept = {} if last is None else {name: value.clone() for name, value in last.module.state_dict().items()}
    with torch.no_grad():
        before = model(**batch).logits
        try:
            fold(model, task)
            after = model(**batch).logits
        finally:
            if last is not None:
                last.module.load_state_dict(kept)
    off = ((after.double() - task.centre) / task.scale - before).abs().max()
    rounding = TOLERANCE * max(1.0, abs(task.centre) / task.scale)
    if not off <= rounding:
        raise ModelError(
            f"the output of {type(model).__name__} is not linear in its last layer, which therefore cannot absorb "
            "'centre' and 'scale'; use centre = 0 and scale = 1, with targets of about that size, or another base model"
        )
