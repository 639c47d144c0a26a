"""Sequence-to-sequence: a target text for each text.

| input | label |
|---|---|
| `text`: text | text |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gramfuse_client.data.columns import Input, Reader
from gramfuse_client.data.formats import Row
from gramfuse_client.tasks.registry import TaskAtSilo, Terms, Variant, register
from gramfuse_protocol.contract.task import Task

if TYPE_CHECKING:
    import torch

    from gramfuse_client.data.examples import Examples
    from gramfuse_client.training.outputs import Outputs
    from gramfuse_model.loading.base_model import Base
    from gramfuse_model.probing.batch import Batch


@register
class SequenceToSequenceAtSilo(TaskAtSilo):
    """Sequence-to-sequence. Targets are compared after a round trip through the tokenizer, cut to `target_length`."""

    name = "sequence-to-sequence"
    fisher = ("empirical",)
    label_is_input = True

    def label(self, row: Row, given: Input, reader: Reader, where: str) -> str:
        return reader.text(row, reader.columns.label, where)

    def targets(self, examples: Examples, encoded: Any, tokenizer: Any, task: Task) -> list[list[int]]:
        """Return the targets' tokens."""
        tokens: list[list[int]] = tokenizer(
            text_target=list(examples.labels), truncation=True, max_length=task.target_length
        )["input_ids"]
        return tokens

    def label_tensors(self, batch: Batch, labels: Sequence[Any]) -> Batch:
        """Return `labels`, right-padded, and a `decoder_attention_mask`."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from gramfuse_model.probing.batch import IGNORED

        filled = pad_sequence([*map(torch.tensor, labels)], batch_first=True, padding_value=IGNORED)
        return {"labels": filled, "decoder_attention_mask": (filled != IGNORED).long()}

    def log_likelihoods(self, model: torch.nn.Module, example: Batch, task: Task, variant: Variant) -> Terms:
        """Yield the log-likelihood of all target tokens."""
        from torch.nn.functional import cross_entropy

        from gramfuse_model.probing.batch import IGNORED

        logits = model(**example).logits  # (1, target tokens, vocabulary)
        yield 1.0, -cross_entropy(logits[0], example["labels"][0], ignore_index=IGNORED, reduction="sum")

    def outputs(self, model: Any, batch: Mapping[str, torch.Tensor], task: Task, tokenizer: Any) -> Outputs:
        """Return the targets' logits, and the model's generated texts (`gramfuse_model.generation`)."""
        from gramfuse_client.training.outputs import Outputs
        from gramfuse_model.generation import answering

        logits = model(**batch).logits  # the labels give the decoder its inputs
        with answering(model, task, tokenizer):
            generated = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return Outputs(logits, tuple(tokenizer.batch_decode(generated, skip_special_tokens=True)))

    def facts(self, batch: Mapping[str, torch.Tensor], outputs: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
        from gramfuse_client.training.outputs import next_tokens
        from gramfuse_model.probing.batch import IGNORED

        truth = batch["labels"]
        targets = truth.masked_fill(truth == IGNORED, tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(targets, skip_special_tokens=True)
        return texts, outputs.texts, next_tokens(outputs.logits, truth)

    def describe_labels(self, examples: Examples, task: Task) -> str:
        return "targets are texts"

    def rows_of(self, base: Base, task: Task) -> int:
        """Return the number of tokens, including the target's."""
        return task.max_length + task.target_length
