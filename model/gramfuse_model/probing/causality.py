"""Checks that a causal language model cannot see the tokens it predicts, by changing later tokens."""

from __future__ import annotations

import torch

from gramfuse_model.loading.auto_classes import FORMS
from gramfuse_model.loading.base_model import Base
from gramfuse_model.probing.hooks import observing, run
from gramfuse_model.probing.public_text import PUBLIC_TEXT
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError

LONGEST = 64
"""Maximum number of tokens of the test text."""

TOLERANCE = 1e-4
"""Relative difference below which logits count as equal; rounding causes 1e-6."""


def check_causal(base: Base, task: Task) -> None:
    """Check that a base model's logits do not depend on later tokens, if the task is for a causal language model.

    Raises:
        ModelError: if they do: the model would learn to copy, and metrics would be meaningless.
    """
    if FORMS[task.task].auto != FORMS["causal-lm"].auto:
        return
    model = base.model
    settings = {"truncation": True, "max_length": min(LONGEST, task.max_length), "return_tensors": "pt"}
    text = dict(base.tokenizer(" ".join(PUBLIC_TEXT), **settings))
    tokens = text["input_ids"][0].tolist()
    before = max(1, len(tokens) // 2)
    distinct = list(dict.fromkeys(tokens))
    replacement = dict(zip(distinct, [*distinct[1:], distinct[0]], strict=True))
    changed = {**text, "input_ids": torch.tensor([[*tokens[:before], *(replacement[t] for t in tokens[before:])]])}
    with observing(model, []):
        original, other = (run(model, x, "a public text").logits[:, :before].double() for x in (text, changed))
    size = (original - original.mean(dim=-1, keepdim=True)).norm(dim=-1)  # (1, before); constants change nothing
    if bool(((other - original).norm(dim=-1) > TOLERANCE * size).any()):
        raise ModelError(
            f"{type(model).__name__} sees the tokens that it should predict: its logits depend on later tokens, so it "
            "would learn to copy, and its accuracy would be meaningless. Use a decoder for {task.task}; some classes "
            'become one with "is_decoder": true in config.json (XLM: "causal": true)'
        )
