"""What transformers calls each kind of task: the model's side of the registry (`gramfuse_protocol.tasks`).

A new kind is one more entry of FORMS. Nothing here loads torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task, TaskKind
from gramfuse_protocol.errors import ModelError


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
    outputs: int | None = None
    """How many outputs the head has; None for one for each label."""
    offsets: bool = False
    """Whether the tokenizer must say which characters a token stands for."""
    classes: tuple[str, ...] = ()
    """What the names of model classes end with that mean this kind, for a checkpoint whose task nobody named."""


class _Forms(dict[TaskKind, Form]):
    def __missing__(self, kind: TaskKind) -> Form:
        raise ModelError(
            f"a model for task {kind!r} is of no known class; whatever adds that kind must add it to FORMS"
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
        "image-classification": Form(
            "AutoModelForImageClassification",
            "image-classification",
            "single_label_classification",
            "AutoImageProcessor",
            classes=("ForImageClassification",),
        ),
    }
)
"""All kinds by name; of those with the same classes, the first is meant unless a configuration says otherwise."""

BODY = Form("AutoModel", "feature-extraction")
"""A model without a head."""


def merged_form(plan: Plan) -> Form:
    """Return what the merged model of a plan is: with own heads, a body only."""
    form = FORMS[next(iter(plan.tasks.values())).task]
    return BODY._replace(processor=form.processor) if plan.model.head == "own" else form


def head_settings(task: Task) -> dict[str, Any]:
    """Return what a configuration must say of the head, as keyword arguments of `from_pretrained`."""
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


def kind_of_checkpoint(config: Any) -> TaskKind | None:
    """Return the kind of task that a model was fine-tuned for, by its configuration; None if it does not say."""
    architecture = next(iter(config.architectures or ()), "")
    fitting = [kind for kind, form in FORMS.items() if form.classes and architecture.endswith(form.classes)]

    def meant(form: Form) -> bool:
        return form.problem == config.problem_type or (form.outputs is not None and form.outputs == config.num_labels)

    return next((kind for kind in reversed(fitting) if meant(FORMS[kind])), fitting[0] if fitting else None)
