"""Attaches adapters to a base model, and finds them in it.

PEFT puts them in: a target becomes a module with the original `base_layer`, and `lora_A` and `lora_B` beside it. Both
are linear layers, so layouts, Gram matrices and merges treat `lora_B` like any other trained weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from gramfuse_model.adapters.frozen_matrix import derive_frozen, frozen_digest
from gramfuse_model.heads import head_parameters
from gramfuse_model.layers import linear_modules
from gramfuse_protocol.contract.plan_sections import ALL_LINEAR, Lora
from gramfuse_protocol.errors import ContributionError, ModelError
from gramfuse_protocol.text import quoted

NAME = "default"
"""PEFT's name for a model's only adapter."""

EXAMPLES = 3
"""Number of modules that an error names."""


class Attached(NamedTuple):
    """The adapters of a model.

    Args:
        config: PEFT's configuration, as in `adapter_config.json`.
        saved: names of the modules that are trained whole, outermost only, in the model's order.
        digest: of all A (`gramfuse_model.adapters.frozen_matrix.frozen_digest`).
    """

    config: LoraConfig
    saved: tuple[str, ...]
    digest: str


def attach(model: PreTrainedModel, lora: Lora, seed: int, fresh: Collection[str]) -> Attached:
    """Attach adapters to a model, in place; afterwards only B and the modules to save require gradients.

    Args:
        lora: the plan's settings.
        seed: from which each A is derived.
        fresh: names of parameters that are not in the base's files; their modules are trained whole.

    Raises:
        ModelError: if a target does not exist or is not a linear layer, or if the rank exceeds a target's inputs.
    """
    saved = _saved(model, lora, fresh)
    targets = _targets(model, lora, saved)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # type: ignore[arg-type]
        use_rslora=lora.rslora,
        target_modules=sorted(targets),
        modules_to_save=list(saved) or None,
        init_lora_weights=False,
    )
    injected = replace(config, modules_to_save=None)  # else PEFT would rename these modules
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(injected, model, NAME)
    config.target_modules = sorted(injected.target_modules or ())  # shortened to common endings
    config.fan_in_fan_out = injected.fan_in_fan_out  # true for transformers' Conv1D
    adapters = dict(adapters_of(model))
    if adapters.keys() != targets:
        raise ModelError(
            f"training.lora.targets: PEFT gave an adapter to {len(adapters)} modules instead of {len(targets)}, for "
            f"example {sorted(adapters.keys() ^ targets)[0]!r}"
        )
    with torch.no_grad():
        for name, layer in adapters.items():
            matrix = derive_frozen(seed, name, lora.rank, layer.in_features, lora.init)
            layer.lora_A[NAME].weight.copy_(matrix)
            layer.lora_B[NAME].weight.zero_()
    freeze_all_but(model, saved)
    return Attached(config, saved, frozen_digest(frozen_matrices(model)))


def is_adapter(name: str) -> bool:
    """Return whether a tensor of a model is an adapter's A or B."""
    return name.endswith((f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"))


def plain_name(name: str) -> str:
    """Return the name that a tensor of a model with adapters has in the model without them."""
    return name.replace(".base_layer.", ".")


def freeze_all_but(model: nn.Module, saved: Collection[str]) -> None:
    """Let only B of each adapter, and the modules that are trained whole, require gradients."""
    prefixes = tuple(f"{name}." for name in saved)
    trained = f".lora_B.{NAME}.weight"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(trained) or name.startswith(prefixes))


def adapters_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules with an adapter, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def check_trained(model: nn.Module, attached: Attached) -> None:
    """Check that training left every A as it was, and moved at least one B.

    Raises:
        ContributionError: otherwise. PEFT with some devices has lost updates, or unfrozen A.
    """
    if frozen_digest(frozen_matrices(model)) != attached.digest:
        raise ContributionError(
            "training changed a matrix A of an adapter, which must stay the same at all silos; nothing was sent. Check "
            "the versions of peft and accelerate"
        )
    if not any(layer.lora_B[NAME].weight.any() for _, layer in adapters_of(model)):
        raise ContributionError(
            "training did not change any adapter: every B is still zero; nothing was sent. Check the versions of peft "
            "and accelerate, and 'training.learning-rate' in the plan"
        )


def frozen_matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return A of each adapter by the name of its module."""
    return {name: layer.lora_A[NAME].weight.detach() for name, layer in adapters_of(model)}


def _saved(model: PreTrainedModel, lora: Lora, fresh: Collection[str]) -> tuple[str, ...]:
    """Return the modules to train whole: those of the head and of fresh parameters, and the plan's; outermost only."""
    modules = [name for name, module in model.named_modules() if name]
    wanted = set()
    for ending in lora.modules_to_save:
        matches = [name for name in modules if name == ending or name.endswith(f".{ending}")]
        if not matches:
            raise ModelError(
                f"training.lora.modules-to-save: no module of the base model is named {quoted(ending)}; there are, for "
                f"example, {', '.join(map(repr, modules[-EXAMPLES:]))}"
            )
        wanted.update(matches)
    body = model.base_model
    heads = [name for name, module in model.named_children() if module is not body] if body is not model else []
    new = {*head_parameters(model), *fresh}
    for parameter in new:
        module = next((name for name in heads if parameter.startswith(f"{name}.")), parameter.rpartition(".")[0])
        if not module:
            raise ModelError(
                f"training.lora: parameter {parameter!r} is new and in no module, so an adapter cannot save it"
            )
        wanted.add(module)
    return tuple(
        name for name in modules if name in wanted and not any(name.startswith(f"{outer}.") for outer in wanted)
    )


def _targets(model: PreTrainedModel, lora: Lora, saved: Collection[str]) -> set[str]:
    linear = {one.weight.removesuffix(".weight"): one for one in linear_modules(model)}
    if lora.targets == (ALL_LINEAR,):
        output = model.get_output_embeddings()
        targets = {name for name, one in linear.items() if one.module is not output}
    else:
        targets = _named(model, lora.targets)
    whole = tuple(f"{name}." for name in saved)
    targets = {name for name in targets if not f"{name}.".startswith(whole)}
    other = next((name for name in sorted(targets) if name not in linear), None)
    if other is not None:
        raise ModelError(
            f"training.lora.targets: {other!r} is a {type(model.get_submodule(other)).__name__}, or shares its weight "
            "with another module; only linear layers with a weight of their own get an adapter"
        )
    for name in sorted(targets):
        if linear[name].d_in < lora.rank:
            raise ModelError(
                f"training.lora.rank: {lora.rank} is more than the {linear[name].d_in} inputs of {name!r}; use a "
                "smaller rank"
            )
    if not targets:
        raise ModelError(
            f"training.lora.targets: no linear layer of the base model is left for an adapter; {', '.join(saved)} are "
            "trained whole"
        )
    return targets


def _named(model: nn.Module, endings: Collection[str]) -> set[str]:
    """Return the modules whose names, or the ends of whose names, PEFT would match."""
    modules = [name for name, _ in model.named_modules() if name]
    targets = set()
    for ending in endings:
        config = LoraConfig(target_modules=[ending])
        matches = {name for name in modules if check_target_module_exists(config, name) is True}
        if not matches:
            linear = [one.weight.removesuffix(".weight") for one in linear_modules(model)]
            raise ModelError(
                f"training.lora.targets: no module of the base model is named {quoted(ending)}; its linear layers are, "
                f"for example, {', '.join(map(repr, linear[:EXAMPLES]))}"
            )
        targets |= matches
    return targets
