"""Reads an adapter that PEFT saved: its matrices, and the modules that were trained whole."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from gramfuse_model.adapters.attach import NAME, adapters_of
from gramfuse_model.adapters.frozen_matrix import frozen_digest
from gramfuse_model.adapters.write import PREFIX, TASK_TYPES, WEIGHTS
from gramfuse_model.loading.auto_classes import FORMS
from gramfuse_protocol.contract.task import TaskName
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.text import one_line, quoted

CONFIG = "adapter_config.json"

WHOLE = ("model.safetensors", "model.safetensors.index.json")
"""Weights of a whole model. What an adapter beside them is for, nobody can know."""

OTHER_KINDS = {
    "use_dora": "DoRA rescales the base's own weights",
    "lora_bias": "its adapters have biases",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "trainable_token_indices": "it trains rows of the token table",
    "layer_replication": "it repeats layers",
    "target_parameters": "it adapts parameters that are not layers",
    "alora_invocation_tokens": "it adapts some of the tokens only",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it changes the base's own weights",
    "monteclora_config": "it draws its weights",
    "megatron_config": "it is for Megatron",
}
"""Keys of `adapter_config.json` that make an adapter of another kind, with what they mean."""

IN_TRAINING = {"velora_config", "eva_config", "lora_ga_config", "corda_config", "loftq_config", "ensure_weight_tying"}
"""Keys that affect training only."""

BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations after which the base's own weights are others."""


class Adapter(NamedTuple):
    """An adapter's matrices and whole modules, on the CPU, float32.

    Args:
        frozen: A, (rank, d_in), by the name of its module.
        trained: s · B, (d_out, rank), by the name of its module.
        whole: values of the parameters that were trained whole, by name.
        saved: names of the modules with these parameters.
    """

    frozen: Mapping[str, torch.Tensor]
    trained: Mapping[str, torch.Tensor]
    whole: Mapping[str, torch.Tensor]
    saved: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of all A."""
        return frozen_digest(self.frozen)


def is_adapter_directory(directory: Path) -> bool:
    """Return whether a directory has an adapter, and no model beside it."""
    return (directory / CONFIG).exists() and not any((directory / name).exists() for name in WHOLE)


def kind_of_adapter(directory: Path) -> TaskName | None:
    """Return the kind of task that an adapter's configuration names; None if it names none."""
    named = _configuration(directory).get("task_type")
    auto = next((auto for auto, of_peft in TASK_TYPES.items() if of_peft.value == named), None)
    return next((kind for kind, form in FORMS.items() if form.auto == auto), None)


def rows_of_head(directory: Path, weight: str) -> int | None:
    """Return the number of outputs of a head that an adapter has; None if it has none.

    Args:
        weight: name of the weight of the head's last layer.
    """
    with _opened(directory) as file:
        return file.get_slice(PREFIX + weight).get_shape()[0] if PREFIX + weight in file.keys() else None  # noqa: SIM118


def read_adapter(model: PreTrainedModel, directory: Path) -> Adapter:
    """Read an adapter with PEFT, which decides what its patterns and names mean.

    Args:
        model: the base that it was trained on; it is changed, and of no use afterwards.

    Raises:
        ModelError: if it is an adapter of another kind, was trained on another base, or cannot be loaded.
    """
    content = _configuration(directory)
    _check(directory, content)
    adapted = _loaded(model, directory, content)
    frozen, trained = {}, {}
    for name, layer in adapters_of(adapted):
        if type(layer.get_base_layer()).__name__ not in ("Linear", "Conv1D"):
            raise ModelError(
                f"{directory}: adapts {name!r}, a {type(layer.get_base_layer()).__name__}; gramfuse merges adapters of "
                "linear layers only"
            )
        frozen[name] = layer.lora_A[NAME].weight.detach().float()
        trained[name] = layer.scaling[NAME] * layer.lora_B[NAME].weight.detach().float()
    if not frozen:
        raise ModelError(f"{directory}: the adapter adapts no linear layer of the base")
    whole, saved = {}, []
    for name, module in adapted.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved.append(name)
            for inner, value in module.modules_to_save[NAME].state_dict().items():
                whole[f"{name}.{inner}"] = value.detach().float()
    odd = next((name for name, value in {**trained, **whole}.items() if not torch.isfinite(value).all()), None)
    if odd is not None:
        raise ModelError(f"{directory}: {odd!r} has NaN or infinite values; training diverged")
    return Adapter(frozen, trained, whole, tuple(saved))


def _loaded(model: PreTrainedModel, directory: Path, content: Mapping[str, Any]) -> nn.Module:
    """Return a model with an adapter that has the values of the file, and no others."""
    known = {field.name for field in fields(LoraConfig)}
    with _opened(directory) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = LoraConfig(**{key: value for key, value in content.items() if key in known})
            adapted = get_peft_model(model, config)
            expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            odd = next(iter(sorted(expected.keys() ^ tensors.keys())), None)
            if odd is None:
                set_peft_model_state_dict(adapted, tensors)
        except Exception as error:  # PEFT raises all kinds of errors for files that do not fit
            raise ModelError(
                f"{directory}: the adapter does not fit the base: {one_line(str(error), 300)}; --base must be the "
                "model that it was trained on"
            ) from error
    if odd is not None:
        where = "is missing" if odd in expected else "has no place in the base"
        raise ModelError(
            f"{directory}: the adapter does not fit the base: {quoted(odd, 200)} {where}; --base must be the model "
            "that it was trained on"
        )
    return adapted.get_base_model()


def _configuration(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {one_line(str(error), 300)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is not the configuration of an adapter")
    return content


def _check(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError unless an adapter is what gramfuse merges."""
    path = directory / CONFIG
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{path}: is of type {quoted(str(config.get('peft_type')), 40)}; gramfuse merges adapters of type LORA"
        )
    for key, meaning in OTHER_KINDS.items():
        if config.get(key):
            raise ModelError(f"{path}: {key} is set: {meaning}, so RegMean on B would not be exact")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{path}: bias is {config['bias']!r}; only adapters that leave biases alone are merged")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(BASE_CHANGED):
        raise ModelError(
            f"{path}: init_lora_weights is {init!r}, which changed the base's own weights. Save the adapter as an "
            "ordinary one, with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    known = {field.name for field in fields(LoraConfig)}
    other = next((key for key, value in config.items() if key not in known | IN_TRAINING and value), None)
    if other is not None:
        raise ModelError(f"{path}: {other!r} is not known to the installed version of PEFT; update PEFT")


def _opened(directory: Path) -> Any:
    """Open an adapter's weights; raise ModelError without safetensors."""
    path = directory / WEIGHTS
    if not path.is_file():
        raise ModelError(
            f"{directory}: has no {WEIGHTS}; save the adapter with PEFT's save_pretrained, which writes safetensors"
        )
    try:
        return safe_open(path, "pt")
    except Exception as error:  # noqa: BLE001  # safetensors has an error of its own
        raise ModelError(f"{path}: is damaged or truncated: {one_line(str(error), 300)}") from None


def stacked(own: Adapter, others: Iterable[Mapping[str, torch.Tensor]]) -> Adapter:
    """Return an adapter over the rows of several A: the same adapter, with zeros in B for the rows of others.

    Every silo that stacks the same A gets the same rows, in the order of the digests of the adapters.

    Args:
        others: A of other adapters, by module; an A that occurs twice counts once.
    """
    by_digest = {frozen_digest(one): one for one in (own.frozen, *others)}
    order = sorted(by_digest)
    frozen, trained = {}, {}
    for name in sorted(set().union(*by_digest.values())):
        parts = [(digest, by_digest[digest][name]) for digest in order if name in by_digest[digest]]
        frozen[name] = torch.cat([matrix for _, matrix in parts])
        outputs = len(own.trained[name]) if name in own.trained else 0
        columns = [
            own.trained[name] if digest == own.digest else torch.zeros(outputs, len(matrix)) for digest, matrix in parts
        ]
        if name in own.trained:
            trained[name] = torch.cat(columns, dim=1)
    return Adapter(frozen, trained, own.whole, own.saved)
