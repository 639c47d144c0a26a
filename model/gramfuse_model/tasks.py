"""What transformers calls each kind of task. Nothing here loads torch."""

from __future__ import annotations

from typing import Any, NamedTuple

from gramfuse_protocol.plan import Plan
from gramfuse_protocol.task import Kind, Task


class Form(NamedTuple):
    """One kind of task in transformers and on the Hugging Face hub."""

    auto: str
    """The class whose `from_pretrained` loads its models."""
    pipeline: str
    """`pipeline_tag` of a model card."""
    problem: str | None = None
    """`problem_type` of a configuration: which loss the model computes."""
    processor: str = "AutoTokenizer"
    """The class whose `from_pretrained` loads what makes inputs into tensors."""


FORMS: dict[Kind, Form] = {
    "classification": Form("AutoModelForSequenceClassification", "text-classification", "single_label_classification"),
    "regression": Form("AutoModelForSequenceClassification", "text-classification", "regression"),
    "multi-label": Form("AutoModelForSequenceClassification", "text-classification", "multi_label_classification"),
    "token-classification": Form("AutoModelForTokenClassification", "token-classification"),
    "sequence-to-sequence": Form("AutoModelForSeq2SeqLM", "text2text-generation"),
    "causal-lm": Form("AutoModelForCausalLM", "text-generation"),
    "image-classification": Form(
        "AutoModelForImageClassification",
        "image-classification",
        "single_label_classification",
        "AutoImageProcessor",
    ),
}

BODY = Form("AutoModel", "feature-extraction")
"""A model without a head."""


def merged_form(plan: Plan) -> Form:
    """Return what the merged model of a plan is: with own heads, a body only."""
    form = FORMS[next(iter(plan.tasks.values())).task]
    return BODY._replace(processor=form.processor) if plan.model.head == "own" else form


def head_settings(task: Task) -> dict[str, Any]:
    """Return what a configuration must say of the head, as keyword arguments of `from_pretrained`."""
    settings: dict[str, Any] = {}
    if task.task == "regression":
        settings["num_labels"] = 1
    elif task.labels:
        settings["num_labels"] = len(task.labels)
        settings["id2label"] = dict(enumerate(task.labels))
        settings["label2id"] = {label: index for index, label in enumerate(task.labels)}
    if FORMS[task.task].problem is not None:
        settings["problem_type"] = FORMS[task.task].problem
    return settings
