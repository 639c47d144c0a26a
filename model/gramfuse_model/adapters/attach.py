"""Attaches adapters to a base model, and finds them in it.

PEFT puts them in: a target becomes a module with the original `base_layer`, and `lora_A` and `lora_B` beside it. Both
are linear layers, so layouts, Gram matrices and merges treat `lora_B` like any other trained weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from gramfuse_model.layers import LinearModule, linear_modules
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
    """Attach a plan's adapters to a model, in place; afterwards only B and the modules to save require gradients.

    Args:
        lora: the plan's settings.
        seed: from which each A is derived.
        fresh: names of parameters that are not in the base's files; their modules are trained whole.

    Raises:
        ModelError: if a target does not exist or is not a linear layer, if the rank exceeds a target's inputs, or if a
            module to save does not exist or shares a parameter with another.
    """
    saved = modules_to_save(model, lora, fresh)
    targets = targets_of(model, lora, saved)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # type: ignore[arg-type]
        use_rslora=lora.rslora,
    )
    return _inject(
        model,
        {name: derive_frozen(seed, name, lora.rank, one.d_in, lora.init) for name, one in targets.items()},
        saved,
        config,
    )


def attach_matrices(model: PreTrainedModel, matrices: Mapping[str, torch.Tensor], saved: Sequence[str]) -> Attached:
    """Attach adapters with given matrices and scale 1 to a model, in place; each B starts at zero.

    Args:
        matrices: A, (rank, d_in), by the name of its module.
        saved: names of the modules that are trained whole.

    Raises:
        ModelError: if a module does not exist, is not a linear layer with a weight of its own, or has other inputs.
    """
    linear = {one.weight.removesuffix(".weight"): one for one in linear_modules(model)}
    for name, matrix in matrices.items():
        inputs = linear[name].d_in if name in linear else None
        if inputs != matrix.shape[1]:
            found = "no linear layer with a weight of its own" if inputs is None else f"one with {inputs} inputs"
            raise ModelError(
                f"the adapter has a matrix for {matrix.shape[1]} inputs of {name!r}, where the base model has {found}; "
                "--base must be the model that the adapter was trained on"
            )
    ranks = {name: len(matrix) for name, matrix in sorted(matrices.items())}
    common = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(r=common, lora_alpha=common, rank_pattern=others, alpha_pattern=others)
    return _inject(model, matrices, saved, config)


def _inject(
    model: PreTrainedModel, matrices: Mapping[str, torch.Tensor], saved: Sequence[str], config: LoraConfig
) -> Attached:
    config.target_modules = sorted(matrices)
    config.modules_to_save = list(saved) or None
    config.init_lora_weights = False
    injected = replace(config, modules_to_save=None)  # else PEFT would rename these modules
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(injected, model, NAME)
    config.target_modules = sorted(injected.target_modules or ())  # shortened to common endings
    config.fan_in_fan_out = injected.fan_in_fan_out  # true for transformers' Conv1D
    adapters = dict(adapters_of(model))
    if adapters.keys() != matrices.keys():
        raise ModelError(
            f"PEFT gave an adapter to {len(adapters)} modules instead of {len(matrices)}, for example "
            f"{sorted(adapters.keys() ^ matrices.keys())[0]!r}; name the targets in full"
        )
    with torch.no_grad():
        for name, layer in adapters.items():
            layer.lora_A[NAME].weight.copy_(matrices[name])
            layer.lora_B[NAME].weight.zero_()
    freeze_all_but(model, saved)
    return Attached(config, tuple(saved), frozen_digest(frozen_matrices(model)))


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


def modules_to_save(model: PreTrainedModel, lora: Lora, fresh: Collection[str]) -> tuple[str, ...]:
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
    saved = tuple(
        name for name in modules if name in wanted and not any(name.startswith(f"{outer}.") for outer in wanted)
    )
    _check_untied(model, saved)
    return saved


def _check_untied(model: nn.Module, saved: Sequence[str]) -> None:
    """Raise ModelError if a module to train whole shares a parameter with another: PEFT would not load it back so."""
    whole = tuple(f"{name}." for name in saved)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for same in names.values():
        inside = [name for name in same if name.startswith(whole)]
        if inside and len(inside) < len(same):
            other = next(name for name in same if name not in inside)
            raise ModelError(
                f"training.lora.modules-to-save: {inside[0]!r} is the same parameter as {other!r}; PEFT would train "
                "and save only one of them; leave its module out"
            )


def targets_of(model: PreTrainedModel, lora: Lora, saved: Collection[str]) -> dict[str, LinearModule]:
    """Return the linear layers that get an adapter, by the names of their modules."""
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
    return {name: linear[name] for name in linear if name in targets}


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
