"""Causal language modelling: predict the next token at every position of a text.

| input | label |
|---|---|
| `text`: text | none |

The targets are the tokens themselves, with IGNORED at the first, which nothing precedes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gramfuse_client.data.columns import Input, Reader, Target
from gramfuse_client.data.formats import Row
from gramfuse_client.tasks.registry import TaskAtSilo, Terms, Variant, register
from gramfuse_protocol.contract.task import Task

if TYPE_CHECKING:
    import torch

    from gramfuse_client.data.examples import Examples
    from gramfuse_client.training.outputs import Outputs
    from gramfuse_model.probing.batch import Batch


@register
class CausalLMAtSilo(TaskAtSilo):
    """Causal language modelling."""

    name = "causal-lm"
    fisher = ("empirical",)
    learns_inputs = True
    nothing_to_learn = "texts have only one token, so there is no next token to learn"

    def label(self, row: Row, given: Input, reader: Reader, where: str) -> Target:
        return None

    def targets(self, examples: Examples, encoded: Any, tokenizer: Any, task: Task) -> list[list[int]]:
        from gramfuse_model.probing.batch import IGNORED

        return [[IGNORED, *tokens[1:]] for tokens in encoded["input_ids"]]

    def unlearnable(self, rows: Sequence[Mapping[str, Any]]) -> int:
        return sum(len(row["input_ids"]) < 2 for row in rows)

    def label_tensors(self, batch: Batch, labels: Sequence[Any]) -> Batch:
        from gramfuse_client.training.outputs import at_tokens

        return at_tokens(batch, labels)

    def log_likelihoods(self, model: torch.nn.Module, example: Batch, task: Task, variant: Variant) -> Terms:
        """Yield the log-likelihood of all tokens but the first."""
        from torch.nn.functional import cross_entropy

        from gramfuse_model.probing.batch import IGNORED, inputs_of

        logits, following = model(**inputs_of(example)).logits[0, :-1], example["labels"][0, 1:]
        yield 1.0, -cross_entropy(logits, following, ignore_index=IGNORED, reduction="sum")

    def facts(self, batch: Mapping[str, torch.Tensor], outputs: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
        from gramfuse_client.training.outputs import next_tokens

        return (next_tokens(outputs.logits[:, :-1], batch["labels"][:, 1:]),)

    def describe_labels(self, examples: Examples, task: Task) -> str:
        return f"{sum(len(text) for text in examples.inputs if isinstance(text, str)):,} characters"
