"""The base model that all silos start from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from gramfuse_model.buffers import learned, saved_buffers
from gramfuse_model.digests import config_digest, processor_digest, tensor_digests, weights_digest
from gramfuse_model.heads import head_parameters
from gramfuse_model.loading.auto_classes import FORMS, head_settings
from gramfuse_model.loading.checkpoint_keys import Keys, check_keys
from gramfuse_model.loading.source import BUNDLED, Source, source_of
from gramfuse_model.loading.vocabulary import check_files_of, check_tokenizer, pad
from gramfuse_model.rescaling import unfold
from gramfuse_protocol.arguments import check_argument
from gramfuse_protocol.canonical import digest
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import EMBEDDINGS, Pins
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import GramfuseError, ModelError
from gramfuse_protocol.statistics.about import Origin
from gramfuse_protocol.text import one_line

MOST = 400
"""Characters that are shown of what a library says of files."""


@dataclass(frozen=True)
class Base:
    """A loaded base model with its seeded head, in evaluation mode, frozen parameters marked as such.

    Args:
        tokenizer: or image processor: what makes inputs into tensors.
        pins: what it is, as a plan holds it to it (`gramfuse_model.digests`).
        shared: names in the model's `state_dict` that the models of all silos' tasks have in common. With own heads,
            these are all that stand outside of a head in each of them, with one shape; else all there are.
    """

    model: PreTrainedModel
    tokenizer: Any
    pins: Pins
    shared: frozenset[str]

    @property
    def takes_images(self) -> bool:
        """Whether inputs are images; else they are texts."""
        return not isinstance(self.tokenizer, PreTrainedTokenizerBase)

    def origin(self, name: str) -> Origin:
        """Return what a statistics file says of this base model.

        Args:
            name: as whoever measures calls it. Of a directory only the last part is kept: the rest is nobody's
                business.
        """
        directory = name not in BUNDLED and Path(name).expanduser().is_dir()
        assert self.pins.config and self.pins.processor  # noqa: S101, PT018
        return Origin(
            name=f"./{Path(name).resolve().name}" if directory else name,
            revision=self.pins.revision,
            weights=tensor_digests(self.model),
            config=self.pins.config,
            processor=self.pins.processor,
        )


def load_base(
    plan: Plan, directory: Path | None, *, silo: str | None = None, override: str | None = None, whole: bool = False
) -> Base:
    """Load the base model with a head for a task, seeded by `training.seed`, in float32.

    Args:
        directory: of the plan file, where a relative path in it starts; None where there is no such file.
        silo: whose task the head is for; by default the plan's only or first one.
        override: where this side keeps the base model, if not where the plan says; it must be the same.
        whole: whether it is a fine-tuned model, whose files must have its head too.

    Raises:
        ModelError: if it cannot be loaded, its files are not those of such a model
            (`gramfuse_model.loading.checkpoint_keys`), a weight is NaN or infinite, or it is not what the plan is
            locked to.
    """
    task = next(iter(plan.tasks.values())) if silo is None else plan.task_of(silo)
    source = _find(plan, directory, override)
    with _loading(plan, source, whole=whole):
        model, fresh = _load_model(source.directory, task, plan.training.seed, whole=whole)
        tokenizer = _load_processor(source.directory, task)
        if FORMS[task.task].offsets and not tokenizer.is_fast:
            raise ModelError(
                f"base {plan.model.base!r} ({source.directory}): its {type(tokenizer).__name__} does not say which "
                f"characters a token stands for, and {task.task} needs that; save the base model with a "
                "tokenizer that has a tokenizer.json"
            )
        _check_finite(_called(plan, source, whole=whole), model)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            check_tokenizer(model, tokenizer, source.directory)
            pad(model, tokenizer, source.directory)
        shared = _shared(plan, source.directory, model)
        pins = Pins(
            _weights(plan, source.directory, model, task, fresh, shared),
            config_digest(model),
            processor_digest(tokenizer),
            source.revision,
        )
    _check_pins(plan, source, pins)
    freeze(model, plan.training.freeze)
    return Base(model.eval(), tokenizer, pins, shared)


def _called(plan: Plan, source: Source, *, whole: bool = False) -> str:
    return f"{'model' if whole else 'base'} {plan.model.base!r} ({source.directory})"


def _check_finite(called: str, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"{called}: {name!r} holds values that are NaN or infinite; the files are damaged, or what was trained "
                "diverged"
            )


def _check_pins(plan: Plan, source: Source, pins: Pins) -> None:
    """Compare a base model with what a plan is locked to; what is not locked is not compared."""
    what = {
        "sha256": "weights",
        "config": "configuration (config.json, and for a model that answers generation_config.json)",
        "processor": "tokenizer or image processor",
    }
    for key, name in what.items():
        here, locked = getattr(pins, key), getattr(plan.model, key)
        if locked is not None and here != locked:
            raise ModelError(
                f"base {plan.model.base!r} ({source.directory}): the SHA-256 of its {name} is {here}, the plan is "
                f"locked to {locked} (model.{key}); use the same files, torch and transformers as whoever locked the "
                f"plan (here torch {torch.__version__}, transformers {transformers.__version__})"
            )


def _weights(
    plan: Plan, directory: str, model: PreTrainedModel, task: Task, fresh: frozenset[str], shared: frozenset[str]
) -> str:
    """Return the digest of all weights that training starts from, but for heads that start from a silo's own seed.

    Where silos keep their heads, what the files bring of a head, or of a body beyond what all tasks share, is in it.

    Args:
        fresh: parameters of the model that are not in the files.
    """
    if plan.model.head != "own":
        return weights_digest(model)
    found = {}
    for name, other in plan.tasks.items():
        if plan.task and other != task:
            its_model, its_fresh = _load_model(directory, other, plan.training.seed)
        else:
            its_model, its_fresh = model, fresh
        found[name] = weights_digest(its_model, shared | (its_model.state_dict().keys() - its_fresh))
    return digest(found)


def own_head(plan: Plan, directory: Path | None, silo: str, *, override: str | None = None) -> dict[str, torch.Tensor]:
    """Return the head that a silo starts from under `head` "different" or "own": of a seed that only it has.

    It is what transformers makes of the seed. A head that the base model brings along is the same everywhere.

    Args:
        directory, override: as `load_base` has them.

    Returns:
        The head's parameters by name; none for a model without a head (`gramfuse_model.heads`).

    Raises:
        ModelError: if the base model cannot be loaded.
    """
    seed = int.from_bytes(hashlib.sha256(f"{plan.training.seed} {silo}".encode()).digest()[:4], "big")
    source = _find(plan, directory, override)
    with _loading(plan, source):
        model, _ = _load_model(source.directory, plan.task_of(silo), seed)
    head = head_parameters(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name in head}


def _load_model(
    directory: str, task: Task, seed: int, *, whole: bool = False
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Return a task's model, and the names of the parameters that its files do not have, which come of the seed.

    A base model's own head for a regression gives what the task's models learn (`gramfuse_model.rescaling`).
    """
    config = _configuration(directory, task)
    auto = _auto(directory, config, task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, loaded = auto.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    keys = Keys.of(loaded)
    labels = AutoConfig.from_pretrained(directory, trust_remote_code=False).num_labels
    check_keys(model, keys, directory, labels=labels, whole=whole)
    if not whole:
        unfold(model, task, keys.fresh)
    return model, keys.fresh


def _configuration(directory: str, task: Task) -> Any:
    """Return the configuration of a task's model.

    How attention and experts are computed is left to transformers: a configuration could name a kernel of somebody's,
    which would be downloaded and run.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, **head_settings(task))
    config.problem_type = FORMS[task.task].problem
    config._attn_implementation = config._experts_implementation = None
    return config


def _auto(directory: str, config: Any, task: Task) -> Any:
    """Return the class that loads a task's models.

    Raises:
        ModelError: if it knows no model of this type.
    """
    auto = getattr(transformers, FORMS[task.task].auto)
    if type(config) not in auto._model_mapping:
        raise ModelError(
            f"{directory}: a model of type {config.model_type!r} is not for {task.task}: transformers' {auto.__name__} "
            "has no class for it; take a base model of another type, or another task"
        )
    return auto


def _load_processor(directory: str, task: Task) -> Any:
    form = FORMS[task.task]
    # Pictures are resized by Pillow everywhere: torchvision, where it is installed, gives other pixels.
    backend = {"backend": "pil"} if form.processor == "AutoImageProcessor" else {}
    processor = getattr(transformers, form.processor).from_pretrained(directory, trust_remote_code=False, **backend)
    if isinstance(processor, PreTrainedTokenizerBase):
        check_files_of(processor, directory)
    return processor


def kept_parameters(plan: Plan, directory: Path | None, *, override: str | None = None) -> dict[str, tuple[str, ...]]:
    """Return by task the parameters and buffers that a silo keeps, since not all silos have them in common.

    Weights are not loaded for it.

    Args:
        directory, override: as `load_base` has them.

    Raises:
        ModelError: if the base model's configuration cannot be loaded.
    """
    if plan.model.head != "own":
        return dict.fromkeys(plan.tasks, ())
    source = _find(plan, directory, override)
    with _loading(plan, source):
        models = {name: _bare(source.directory, task) for name, task in plan.tasks.items()}
    shared = {name for name, _ in set.intersection(*map(_body, models.values()))}
    return {
        task: tuple(name for name in (*dict(model.named_parameters()), *saved_buffers(model)) if name not in shared)
        for task, model in models.items()
    }


def _shared(plan: Plan, directory: str, model: PreTrainedModel) -> frozenset[str]:
    if plan.model.head != "own":
        return frozenset(model.state_dict())
    others = (_body(_bare(directory, task)) for task in plan.tasks.values())
    return frozenset(name for name, _ in _body(model).intersection(*others))


def _bare(directory: str, task: Task) -> PreTrainedModel:
    """Return a task's model without its weights: names and shapes only."""
    config = _configuration(directory, task)
    with torch.device("meta"):
        model: PreTrainedModel = _auto(directory, config, task).from_config(config, trust_remote_code=False)
    return model


def _body(model: PreTrainedModel) -> set[tuple[str, torch.Size]]:
    head = head_parameters(model)
    return {(name, tensor.shape) for name, tensor in model.state_dict().items() if name not in head}


def _find(plan: Plan, directory: Path | None, override: str | None) -> Source:
    with _quiet():
        return source_of(plan, directory, override)


@contextmanager
def _loading(plan: Plan, source: Source, *, whole: bool = False) -> Iterator[None]:
    """Load quietly, since that a head is new is what we asked for; what goes wrong becomes a ModelError."""
    with _quiet():
        try:
            yield
        except GramfuseError:
            raise
        except Exception as error:  # of files that make no sense, libraries raise what they like
            damaged = type(error).__name__ == "SafetensorError"
            raise ModelError(
                f"{_called(plan, source, whole=whole)} cannot be loaded: {said(error)}"
                + (". A file of its weights is damaged, or was cut off: get it again" if damaged else "")
            ) from error


def said(error: Exception) -> str:
    """Return what a library says of files that it cannot load, without the lists that it may add."""
    return one_line(" ".join(str(error).split()), MOST)


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


def trainable(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Return copies of all that training may change (`gramfuse_model.buffers.learned`), by name.

    Example:
        >>> gramfuse.trainable(base)["classifier.bias"]
        array([0., 0.], dtype=float32)

    They are float32 on the CPU, whatever dtype the model has.

    Raises:
        ModelError: if the model is no torch module.
    """
    check_argument("trainable: model", model, nn.Module, "a torch.nn.Module", ModelError)
    return {name: tensor.detach().cpu().float().numpy().copy() for name, tensor in learned(model).items()}


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
