"""Saves models for transformers, and adapters for PEFT."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from gramfuse_model.adapters.write import fold, write_adapter
from gramfuse_model.loading.base_model import Base
from gramfuse_model.loading.source import hub_id
from gramfuse_protocol.contract.task import TaskName


def save_model(base: Base, directory: Path, model: PreTrainedModel | None = None) -> None:
    """Save a model and its tokenizer or image processor for `from_pretrained`; adapters are folded in, in place.

    Args:
        directory: made if it does not exist.
        model: the part of the base to save; by default all.
    """
    fold(base.model)
    (model or base.model).save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)


def save_adapter(base: Base, origin: str, directory: Path, *, task: TaskName, revision: str | None = None) -> None:
    """Save the adapter of a model for PEFT, with the tokenizer and with the configuration that its base needs.

    Args:
        origin: the base, as a plan or a person names it.
        directory: made if it does not exist.
        task: for PEFT's automatic classes.
        revision: commit of the base, if it is on the hub.
    """
    assert base.adapters is not None  # noqa: S101  # its callers know
    write_adapter(base.model, base.adapters, hub_id(origin), revision, task, directory)
    base.model.config.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)
