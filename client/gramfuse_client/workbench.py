"""What a silo does with its data and the model: the part that needs torch.

Flower starts a new process for every message, and only three of the phases come here; the others need not load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from gramfuse_client.batches import Encoded, batches
from gramfuse_client.data import Examples, load
from gramfuse_client.evaluate import evaluate
from gramfuse_client.finetune import choose_device, finetune
from gramfuse_client.silo import Silo
from gramfuse_client.state import State
from gramfuse_client.statistics import collect_statistics
from gramfuse_model.base import Base, load_base, trainable
from gramfuse_model.tracing import plan_layout
from gramfuse_protocol.layout import Layout, delta_block
from gramfuse_protocol.metrics import Sums
from gramfuse_protocol.plan import Plan
from gramfuse_protocol.statistics import Statistics

EVALUATION_BATCH = 64


class Workbench:
    """One silo's data and base model, under one plan."""

    def __init__(self, silo: Silo, plan: Plan) -> None:
        self.silo = silo
        self.plan = plan
        if silo.file.threads:
            torch.set_num_threads(silo.file.threads)

    def check_layout(self, given: Layout) -> Layout:
        """Return the layout that came with the plan, if it is what the base model as it is here gives.

        Raises:
            ModelError: if the base model cannot be loaded or is another one, or the layout is.
        """
        return plan_layout(self.plan, self._base(), given)

    def measure(self, layout: Layout, examples: Examples, state: State) -> Statistics:
        """Fine-tune the base model on the silo's examples and measure it."""
        return train(self.silo, self.plan, layout, self._base(), examples, state)

    def evaluate(self, layout: Layout, arrays: Mapping[str, NDArray[Any]]) -> Sums:
        """Return the held-out sums of the base model with differences added (`delta:<parameter>`, float32)."""
        base = self._base()
        parameters = dict(base.model.named_parameters())
        with torch.no_grad():
            for tensor in layout.tensors:
                parameters[tensor.name] += torch.from_numpy(arrays[delta_block(tensor.name)].copy())
        _, held_out = load(self.silo, self.plan.model)
        device = choose_device(self.silo.file.device)
        encoded = Encoded(held_out, base.tokenizer, self.plan.model.max_length)
        return evaluate(
            base.model.to(device),
            batches(encoded, base.tokenizer, EVALUATION_BATCH, device, by_length=True),
            len(self.plan.model.labels),
        )

    def _base(self) -> Base:
        return load_base(self.plan, self.silo.directory, override=self.silo.file.base)


def train(
    silo: Silo, plan: Plan, layout: Layout, base: Base, examples: Examples, state: State | None = None
) -> Statistics:
    """Fine-tune the base model on a silo's examples, in place, and measure it.

    Args:
        state: where progress is noted, if anywhere.
    """
    device = choose_device(silo.file.device)
    encoded = Encoded(examples, base.tokenizer, plan.model.max_length)
    before = trainable(base.model)
    finetune(
        base.model,
        encoded,
        base.tokenizer,
        plan.training,
        device,
        progress=None if state is None else lambda done, total: state.progress("train", done, total),
    )
    size = plan.training.batch_size
    return collect_statistics(
        base.model,
        batches(encoded, base.tokenizer, size, device),
        layout,
        base=before,
        examples=len(examples),
        limit=plan.merge.tokens,
        progress=None if state is None else lambda done: state.progress("measure", done, -(-len(encoded) // size)),
    )
