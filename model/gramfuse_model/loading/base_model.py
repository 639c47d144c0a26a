"""Loads the base model from which all silos start."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from gramfuse_model.adapters.attach import Attached, attach, is_adapter, plain_name
from gramfuse_model.buffers import saved_buffers
from gramfuse_model.digests import config_digest, processor_digest, tensor_digests, weights_digest
from gramfuse_model.heads import head_parameters
from gramfuse_model.loading.auto_classes import FORMS, head_settings
from gramfuse_model.loading.checkpoint_keys import Keys, check_keys
from gramfuse_model.loading.new_head import pool_by_mean, replace_head_of_others
from gramfuse_model.loading.source import BUNDLED, Source, locate, source_of
from gramfuse_model.loading.vocabulary import check_files_of, check_tokenizer, pad
from gramfuse_model.parameters import freeze
from gramfuse_model.rescaling import unfold
from gramfuse_protocol.canonical import digest
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Pins
from gramfuse_protocol.contract.task import Task, TaskName
from gramfuse_protocol.errors import GramfuseError, ModelError
from gramfuse_protocol.statistics.about import Origin
from gramfuse_protocol.text import one_line

MESSAGE_CHARACTERS = 400
"""Maximum length at which an error quotes a library's message."""


@dataclass(frozen=True)
class Base:
    """A loaded base model with its seeded head, in evaluation mode; frozen parameters do not require gradients.

    Args:
        tokenizer: the tokenizer or image processor.
        pins: its digests and commit, as in a locked plan (`gramfuse_model.digests`).
        shared: names in the model's `state_dict` that are merged: all names, or, if silos keep their own heads, those
            that are outside the head and have the same shape in the models of all tasks.
        fresh: names of the parameters that are not in the base's files, but seeded.
        adapters: the adapters of the model, if the plan trains any.
    """

    model: PreTrainedModel
    tokenizer: Any
    pins: Pins
    shared: frozenset[str]
    fresh: frozenset[str] = frozenset()
    adapters: Attached | None = None

    @property
    def takes_images(self) -> bool:
        """Whether inputs are images instead of texts."""
        return not isinstance(self.tokenizer, PreTrainedTokenizerBase)

    def origin(self, name: str) -> Origin:
        """Return the description of this base model in a statistics file.

        Args:
            name: the name that the user gave. For a directory only the last component is kept, for privacy.
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
    plan: Plan,
    directory: Path | None,
    *,
    silo: str | None = None,
    override: str | None = None,
    whole: bool = False,
    as_saved: bool = False,
) -> Base:
    """Load the base model with a head for a task, seeded by `training.seed`, in float32.

    Args:
        directory: directory of the plan file, to which the plan's paths are relative; None without such a file.
        silo: the silo whose task determines the head; by default the plan's only or first task.
        override: local path of the base model, in place of the plan's; its content must be the same.
        whole: whether it is a fine-tuned model, whose files must include its head.
        as_saved: whether it is the base of a model that others fine-tuned, so that what its head is for does not
            matter (`gramfuse_model.loading.new_head`).

    Raises:
        ModelError: if it cannot be loaded, its files do not match its configuration
            (`gramfuse_model.loading.checkpoint_keys`), a weight is NaN or infinite, or it differs from the locked
            plan's pins.
    """
    task = next(iter(plan.tasks.values())) if silo is None else plan.task_of(silo)
    source = _find(plan, directory, override)
    with _reporting_errors(plan, source, whole=whole):
        model, fresh = _load_model(source.directory, task, plan.training.seed, whole=whole, as_saved=as_saved)
        tokenizer = _load_processor(source.directory, task)
        if FORMS[task.task].offsets and not tokenizer.is_fast:
            raise ModelError(
                f"base {plan.model.base!r} ({source.directory}): its {type(tokenizer).__name__} does not support "
                f"character offsets, which {task.task} needs; save the base model with a tokenizer that has a "
                "tokenizer.json"
            )
        _check_finite(_label(plan, source, whole=whole), model)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            check_tokenizer(model, tokenizer, source.directory)
            pad(model, tokenizer, source.directory)
        shared = _shared(plan, source.directory, model)
        weights = _weights(plan, source.directory, model, task, fresh, shared)
        config, processor = config_digest(model), processor_digest(tokenizer)
        lora = plan.training.lora
        attached = None if lora is None else attach(model, lora, plan.training.seed, fresh)
        if attached is not None:
            shared = frozenset(name for name in model.state_dict() if is_adapter(name) or plain_name(name) in shared)
        pins = Pins(weights, config, processor, source.revision, None if attached is None else attached.digest)
    _check_pins(plan, source, pins)
    freeze(model, plan.training.freeze if plan.training.epochs else ())
    return Base(model.eval(), tokenizer, pins, shared, fresh, attached)


def _label(plan: Plan, source: Source, *, whole: bool = False) -> str:
    return f"{'model' if whole else 'base'} {plan.model.base!r} ({source.directory})"


def _check_finite(label: str, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"{label}: {name!r} has NaN or infinite values; the files are damaged, or training diverged"
            )


def _check_pins(plan: Plan, source: Source, pins: Pins) -> None:
    """Compare a base model with the plan's pins; unset pins are skipped."""
    names = {
        "sha256": "weights",
        "config": "configuration (config.json, and generation_config.json for an encoder-decoder model)",
        "processor": "tokenizer or image processor",
        "adapters": "frozen matrices of its adapters ([training.lora], training.seed)",
    }
    for key, name in names.items():
        actual, locked = getattr(pins, key), getattr(plan.model, key)
        if locked is not None and actual != locked:
            raise ModelError(
                f"base {plan.model.base!r} ({source.directory}): the SHA-256 of its {name} is {actual}, but the plan "
                f"is locked to {locked} (model.{key}); use the files and the versions of torch and transformers with "
                f"which the plan was locked (here torch {torch.__version__}, transformers {transformers.__version__})"
            )


def _weights(
    plan: Plan, directory: str, model: PreTrainedModel, task: Task, fresh: frozenset[str], shared: frozenset[str]
) -> str:
    """Return the digest of all initial weights, except heads that start from a silo's own seed.

    If silos keep their heads, it includes head parameters that are in the files, and body parameters that not all tasks
    share.

    Args:
        fresh: parameters of the model that are not in the files.
    """
    if plan.model.head != "own":
        return weights_digest(model)
    digests = {}
    for name, other in plan.tasks.items():
        if plan.task and other != task:
            its_model, its_fresh = _load_model(directory, other, plan.training.seed)
        else:
            its_model, its_fresh = model, fresh
        digests[name] = weights_digest(its_model, shared | (its_model.state_dict().keys() - its_fresh))
    return digest(digests)


def own_head(plan: Plan, directory: Path | None, silo: str, *, override: str | None = None) -> dict[str, torch.Tensor]:
    """Return the head that a silo starts from under `head` "different" or "own", initialised with its own seed.

    transformers initialises it. A head that is in the base model's files is the same at every silo.

    Args:
        directory, override: see `load_base`.

    Returns:
        The head's parameters by name; none for a model without a head (`gramfuse_model.heads`).

    Raises:
        ModelError: if the base model cannot be loaded.
    """
    seed = int.from_bytes(hashlib.sha256(f"{plan.training.seed} {silo}".encode()).digest()[:4], "big")
    source = _find(plan, directory, override)
    with _reporting_errors(plan, source):
        model, _ = _load_model(source.directory, plan.task_of(silo), seed)
    head = head_parameters(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name in head}


def _load_model(
    directory: str, task: Task, seed: int, *, whole: bool = False, as_saved: bool = False
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Return a task's model and the names of its fresh parameters, which are not in the files but seeded.

    A regression head in the base model's files is converted to rescaled targets (`gramfuse_model.rescaling`).
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
    own = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    check_keys(model, keys, directory, labels=own.num_labels, whole=whole)
    if whole or as_saved:
        if not whole:
            unfold(model, task, keys.fresh)
        return model, keys.fresh
    fresh = keys.fresh | replace_head_of_others(model, own.id2label, task, directory, keys.fresh, seed)
    unfold(model, task, fresh)
    pool_by_mean(model, keys.missing)
    return model, fresh


def _configuration(directory: str, task: Task) -> Any:
    """Load the configuration of a task's model.

    The attention and expert implementations are reset to transformers' defaults: a configuration could name a
    third-party kernel, which would be downloaded and executed.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, **head_settings(task))
    config.problem_type = FORMS[task.task].problem
    config._attn_implementation = config._experts_implementation = None
    return config


def has_class(config: Any, kind: TaskName) -> bool:
    """Return whether transformers has a model class for a kind of task and models with such a configuration."""
    return type(config) in getattr(transformers, FORMS[kind].auto)._model_mapping


def _auto(directory: str, config: Any, task: Task) -> Any:
    """Return the auto class that loads a task's models.

    Raises:
        ModelError: if it does not support this model type.
    """
    auto = getattr(transformers, FORMS[task.task].auto)
    if not has_class(config, task.task):
        raise ModelError(
            f"{directory}: model type {config.model_type!r} does not support {task.task}: transformers' "
            f"{auto.__name__} has no class for it; use a base model of another type, or another task"
        )
    return auto


def _load_processor(directory: str, task: Task) -> Any:
    form = FORMS[task.task]
    # Always resize images with Pillow: torchvision, if installed, computes different pixels.
    backend = {"backend": "pil"} if form.processor == "AutoImageProcessor" else {}
    processor = getattr(transformers, form.processor).from_pretrained(directory, trust_remote_code=False, **backend)
    if isinstance(processor, PreTrainedTokenizerBase):
        check_files_of(processor, directory)
    return processor


def kept_parameters(plan: Plan, directory: Path | None, *, override: str | None = None) -> dict[str, tuple[str, ...]]:
    """Return the parameters and buffers that silos keep because not all tasks share them, by task.

    Weights are not loaded.

    Args:
        directory, override: see `load_base`.

    Raises:
        ModelError: if the base model's configuration cannot be loaded.
    """
    if plan.model.head != "own":
        return dict.fromkeys(plan.tasks, ())
    source = _find(plan, directory, override)
    with _reporting_errors(plan, source):
        models = {name: _without_weights(source.directory, task) for name, task in plan.tasks.items()}
    shared = {name for name, _ in set.intersection(*map(_body, models.values()))}
    return {
        task: tuple(name for name in (*dict(model.named_parameters()), *saved_buffers(model)) if name not in shared)
        for task, model in models.items()
    }


def base_without_weights(plan: Plan, directory: Path | None) -> PreTrainedModel:
    """Return a plan's base on the meta device: names and shapes only. It needs no more files than a `config.json`.

    Args:
        directory: see `load_base`.

    Raises:
        ModelError: if its configuration cannot be loaded.
    """
    where = locate(plan.model.base, directory)
    with _reporting_errors(plan, Source(where, plan.model.revision)):
        return _without_weights(where, next(iter(plan.tasks.values())))


def _shared(plan: Plan, directory: str, model: PreTrainedModel) -> frozenset[str]:
    if plan.model.head != "own":
        return frozenset(model.state_dict())
    others = (_body(_without_weights(directory, task)) for task in plan.tasks.values())
    return frozenset(name for name, _ in _body(model).intersection(*others))


def _without_weights(directory: str, task: Task) -> PreTrainedModel:
    """Return a task's model on the meta device, with names and shapes only."""
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
def _reporting_errors(plan: Plan, source: Source, *, whole: bool = False) -> Iterator[None]:
    """Silence transformers, which warns about new heads, and convert its exceptions to ModelError."""
    with _quiet():
        try:
            yield
        except GramfuseError:
            raise
        except Exception as error:  # libraries raise all kinds of errors for broken files
            damaged = type(error).__name__ == "SafetensorError"
            raise ModelError(
                f"{_label(plan, source, whole=whole)} cannot be loaded: {library_message(error)}"
                + (". A weights file is damaged or truncated: get it again" if damaged else "")
            ) from error


def library_message(error: Exception) -> str:
    """Return a library's error message as one line, shortened to MESSAGE_CHARACTERS."""
    return one_line(" ".join(str(error).split()), MESSAGE_CHARACTERS)


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
