"""Classification: one label for each text.

| input | label |
|---|---|
| `text` (and `text-pair`): text | a label of the plan: text, or a whole number |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gramfuse_client.data.columns import Input, Reader
from gramfuse_client.data.formats import Row
from gramfuse_client.tasks.registry import Loss, TaskAtSilo, Terms, Variant, register
from gramfuse_client.tasks.words import list_label_counts
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.tasks.classification import Answers

if TYPE_CHECKING:
    import torch

    from gramfuse_client.data.examples import Examples
    from gramfuse_client.training.outputs import Outputs
    from gramfuse_model.probing.batch import Batch


@register
class ClassificationAtSilo(TaskAtSilo):
    """Classification. Labels that a silo does not annotate are neither predicted nor counted."""

    name = "classification"
    fisher = ("hard", "soft", "empirical")

    def label(self, row: Row, given: Input, reader: Reader, where: str) -> int:
        return reader.index(reader.value(row, reader.columns.label, where), where)

    def common(self, examples: Examples, task: Task, least: int, keys: Sequence[Hashable]) -> list[int]:
        """Return the indices of the examples whose label at least so many different inputs have."""
        counts = Counter(label for _, label in {*zip(keys, examples.labels, strict=True)})
        return [index for index, label in enumerate(examples.labels) if counts[label] >= least]

    def loss(self, task: Task) -> Loss | None:
        """Return the cross-entropy of the softmax over the silo's own labels; None if it annotates all labels."""
        import torch

        if not task.masked:
            return None
        annotated = torch.tensor(task.annotated)
        position = torch.full((len(task.labels),), -1)
        position[annotated] = torch.arange(len(annotated))

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            columns = annotated.to(labels.device)
            return torch.nn.functional.cross_entropy(outputs.logits[:, columns], position.to(labels.device)[labels])

        return loss

    def log_likelihoods(self, model: torch.nn.Module, example: Batch, task: Task, variant: Variant) -> Terms:
        """Yield the log-probabilities of labels, with softmax over the annotated ones."""
        from gramfuse_model.probing.batch import inputs_of

        logits, label = model(**inputs_of(example)).logits[0], int(example["labels"])
        likelihoods = logits[list(task.annotated)].log_softmax(dim=0)
        match variant:
            case "empirical":
                yield 1.0, likelihoods[task.annotated.index(label)]
            case "hard":
                yield 1.0, likelihoods[int(likelihoods.argmax())]
            case "soft":
                for likelihood in likelihoods:
                    yield float(likelihood.detach().exp()), likelihood

    def facts(self, batch: Mapping[str, torch.Tensor], outputs: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
        import torch

        annotated = torch.tensor(task.annotated)
        truth, logits = batch["labels"], outputs.logits[:, annotated].double()
        likelihoods = logits.log_softmax(dim=-1)
        column = torch.full((len(task.labels),), 0)
        column[annotated] = torch.arange(len(annotated))
        loss = -likelihoods.gather(1, column[truth][:, None])[:, 0]
        best = logits.argmax(dim=-1)
        confidence = likelihoods.gather(1, best[:, None])[:, 0].exp()
        return (Answers(truth.numpy(), annotated[best].numpy(), loss.numpy(), confidence.numpy()),)

    def describe_labels(self, examples: Examples, task: Task) -> str:
        return list_label_counts(task, Counter(task.labels[i] for i in examples.labels if isinstance(i, int)))
