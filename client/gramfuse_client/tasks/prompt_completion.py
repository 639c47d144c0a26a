"""Prompt and completion: a causal language model continues a text, and learns the continuation only.

| input | label |
|---|---|
| `text`: the prompt | the completion, a text |

A row is the prompt, a line end, the completion and the end-of-text token. The parts are tokenised one by one, so that
the prompt has the same tokens when the model generates. A prompt is cut to `max-length` − `target-length` tokens, and a
completion to `target-length`, with its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gramfuse_client.data.columns import Input, Reader
from gramfuse_client.data.formats import Row
from gramfuse_client.tasks.causal_lm import CausalLMAtSilo
from gramfuse_client.tasks.registry import register
from gramfuse_protocol.contract.task import Task

if TYPE_CHECKING:
    import torch

    from gramfuse_client.data.examples import Examples
    from gramfuse_client.training.outputs import Outputs

SEPARATOR = "\n"
"""Between a prompt and its completion."""


@register
class PromptCompletionAtSilo(CausalLMAtSilo):
    """Prompt and completion. Completions are compared after a round trip through the tokenizer."""

    name = "prompt-completion"
    learns_inputs = False
    label_is_input = True

    def label(self, row: Row, given: Input, reader: Reader, where: str) -> str:
        return reader.text(row, reader.columns.label, where)

    def encode(self, examples: Examples, tokenizer: Any, task: Task) -> list[dict[str, Any]]:
        from gramfuse_model.probing.batch import IGNORED

        room = task.max_length - task.target_length
        between = tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        prompts = tokenizer(list(examples.inputs), truncation=True, max_length=max(1, room - len(between)))["input_ids"]
        completions = tokenizer(
            list(examples.labels),
            add_special_tokens=False,
            truncation=True,
            max_length=max(1, task.target_length - len(end)),
        )["input_ids"]
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            first = [*(prompt[:-1] if end and prompt[-1:] == end else prompt), *between][:room]
            second = [*completion, *end]
            tokens = [*first, *second]
            labels = [*[IGNORED] * len(first), *second]
            rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels})
        return rows

    def unlearnable(self, rows: Sequence[Mapping[str, Any]]) -> int:
        return 0

    def outputs(self, model: Any, batch: Mapping[str, torch.Tensor], task: Task, tokenizer: Any) -> Outputs:
        """Return the logits of whole rows, and the completions that the model generates from the prompts alone."""
        from gramfuse_client.training.outputs import Outputs
        from gramfuse_model.generation import answering
        from gramfuse_model.probing.batch import IGNORED, inputs_of

        logits = model(**inputs_of(batch)).logits
        texts = []
        with answering(model, task, tokenizer):
            for tokens, mask, labels in zip(
                batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True
            ):
                prompt = tokens[mask & (labels == IGNORED)].unsqueeze(0)
                generated = model.generate(input_ids=prompt, attention_mask=prompt.new_ones(prompt.shape))
                texts.append(tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True))
        return Outputs(logits, tuple(texts))

    def facts(self, batch: Mapping[str, torch.Tensor], outputs: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
        from gramfuse_client.training.outputs import next_tokens
        from gramfuse_model.probing.batch import IGNORED

        truth = batch["labels"]
        texts = [tokenizer.decode(row[row != IGNORED], skip_special_tokens=True) for row in truth]
        return texts, outputs.texts, next_tokens(outputs.logits[:, :-1], truth[:, 1:])

    def describe_labels(self, examples: Examples, task: Task) -> str:
        return "completions are texts"
