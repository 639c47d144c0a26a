"""Whether a base model that is to predict next tokens does not see them: found by changing what comes later."""

from __future__ import annotations

import torch

from gramfuse_model.loading.base_model import Base
from gramfuse_model.probing.hooks import observing, run
from gramfuse_model.probing.public_text import PUBLIC_TEXT
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError

LONGEST = 64
"""Most tokens of the text that is changed."""

TOLERANCE = 1e-4
"""Share of their own size by which logits may differ and be the same; rounding makes it 1e-6."""


def check_causal(base: Base, task: Task) -> None:
    """Check that a base model's logits do not depend on what comes after, if the task is to predict it.

    Raises:
        ModelError: if they do: training and metrics would be about words that the model is shown.
    """
    if task.task != "causal-lm":
        return
    model = base.model
    settings = {"truncation": True, "max_length": min(LONGEST, task.max_length), "return_tensors": "pt"}
    text = dict(base.tokenizer(" ".join(PUBLIC_TEXT), **settings))
    tokens = text["input_ids"][0].tolist()
    before = max(1, len(tokens) // 2)
    different = list(dict.fromkeys(tokens))
    following = dict(zip(different, [*different[1:], different[0]], strict=True))
    changed = {**text, "input_ids": torch.tensor([[*tokens[:before], *(following[t] for t in tokens[before:])]])}
    with observing(model, []):
        here, there = (run(model, one, "a public text").logits[:, :before].double() for one in (text, changed))
    size = (here - here.mean(dim=-1, keepdim=True)).norm(dim=-1)  # (1, before); a constant changes no probability
    if bool(((there - here).norm(dim=-1) > TOLERANCE * size).any()):
        raise ModelError(
            f"{type(model).__name__} sees the tokens that it is to predict: its logits change with what comes after "
            "them, so it learns to copy, and its accuracy says nothing. Take a decoder for causal-lm; where the class "
            'can be one, "is_decoder": true in its config.json makes it one (XLM: "causal": true)'
        )
