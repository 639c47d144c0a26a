"""The transformers classes and settings for each kind of task (`gramfuse_protocol.tasks`).

A new kind needs an entry in FORMS. This module does not import torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task, TaskName
from gramfuse_protocol.errors import ModelError


class Form(NamedTuple):
    """A kind of task in transformers and on the Hugging Face hub."""

    auto: str
    """Name of the auto class that loads its models."""
    pipeline: str
    """`pipeline_tag` of a model card."""
    problem: str | None = None
    """`problem_type` of a configuration, which selects the model's loss."""
    processor: str = "AutoTokenizer"
    """Name of the auto class that loads the tokenizer or image processor."""
    outputs: int | None = None
    """Number of outputs of the head; None for one output for each label."""
    offsets: bool = False
    """Whether the tokenizer must support character offsets of tokens."""
    classes: tuple[str, ...] = ()
    """Suffixes of model class names from which the kind of a checkpoint is inferred."""


class _Forms(dict[TaskName, Form]):
    def __missing__(self, kind: TaskName) -> Form:
        raise ModelError(
            f"no model class is known for task {kind!r}; the package that registers the task must add it to FORMS"
        )


FORMS = _Forms(
    {
        "classification": Form(
            "AutoModelForSequenceClassification",
            "text-classification",
            "single_label_classification",
            classes=("ForSequenceClassification",),
        ),
        "regression": Form(
            "AutoModelForSequenceClassification",
            "text-classification",
            "regression",
            outputs=1,
            classes=("ForSequenceClassification",),
        ),
        "multi-label": Form(
            "AutoModelForSequenceClassification",
            "text-classification",
            "multi_label_classification",
            classes=("ForSequenceClassification",),
        ),
        "token-classification": Form(
            "AutoModelForTokenClassification",
            "token-classification",
            offsets=True,
            classes=("ForTokenClassification",),
        ),
        "sequence-to-sequence": Form(
            "AutoModelForSeq2SeqLM", "text2text-generation", classes=("ForConditionalGeneration",)
        ),
        "causal-lm": Form("AutoModelForCausalLM", "text-generation", classes=("ForCausalLM", "LMHeadModel")),
        "prompt-completion": Form("AutoModelForCausalLM", "text-generation"),
        "image-classification": Form(
            "AutoModelForImageClassification",
            "image-classification",
            "single_label_classification",
            "AutoImageProcessor",
            classes=("ForImageClassification",),
        ),
    }
)
"""All kinds by name; of kinds with the same class suffixes, the first is the default for a checkpoint."""

BODY = Form("AutoModel", "feature-extraction")
"""A model without a head."""


def merged_form(plan: Plan) -> Form:
    """Return the form of a plan's merged model: only a body if silos keep their own heads."""
    form = FORMS[next(iter(plan.tasks.values())).task]
    return BODY._replace(processor=form.processor) if plan.model.head == "own" else form


def head_settings(task: Task) -> dict[str, Any]:
    """Return the configuration of a task's head, as keyword arguments of `from_pretrained`."""
    settings: dict[str, Any] = {}
    form = FORMS[task.task]
    if form.outputs is not None:
        settings["num_labels"] = form.outputs
    elif task.labels:
        settings["num_labels"] = len(task.labels)
        settings["id2label"] = dict(enumerate(task.labels))
        settings["label2id"] = {label: index for index, label in enumerate(task.labels)}
    if form.problem is not None:
        settings["problem_type"] = form.problem
    return settings


def kind_of_checkpoint(config: Any) -> TaskName | None:
    """Infer the kind of task of a fine-tuned model from its configuration; None if it is unknown."""
    architecture = next(iter(config.architectures or ()), "")
    matches = [kind for kind, form in FORMS.items() if form.classes and architecture.endswith(form.classes)]

    def is_configured(form: Form) -> bool:
        return form.problem == config.problem_type or (form.outputs is not None and form.outputs == config.num_labels)

    return next((kind for kind in reversed(matches) if is_configured(FORMS[kind])), matches[0] if matches else None)
