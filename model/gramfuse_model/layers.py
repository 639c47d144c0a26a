"""The registry of linear layers. A parameter is linear by the type of its module, never by its number of dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from gramfuse_model.experts import DOWN, GATE_UP, holds_experts


class LinearKind(NamedTuple):
    """How a type of module stores W in y = x W: if `transposed`, its weight is Wᵀ, (d_out, d_in)."""

    d_in: Callable[[nn.Module], int]
    d_out: Callable[[nn.Module], int]
    transposed: bool


LINEAR_KINDS: dict[type[nn.Module], LinearKind] = {}
"""The registry by type. Subclasses must be registered themselves, since they can compute something else."""


def register_layer(
    layer: type[nn.Module],
    *,
    d_in: Callable[[Any], int],
    d_out: Callable[[Any], int],
    transposed: bool,
) -> None:
    """Register a type of module to be merged in closed form; it must compute x W (+ b) from its first input.

    Layouts, Gram matrices, merges and reports use this registry; nothing else is needed. For your own layer:

        register_layer(MyLinear, d_in=lambda m: m.inputs, d_out=lambda m: m.outputs, transposed=True)

    Args:
        layer: a module type whose parameter `weight` has two dimensions; its other parameters are averaged.
        d_in: returns a module's number of input features, the last dimension of its input.
        d_out: returns a module's number of outputs.
        transposed: whether `weight` is Wᵀ, (d_out, d_in), instead of W, (d_in, d_out).

    Raises:
        ValueError: if the type is already registered.
    """
    if layer in LINEAR_KINDS:
        raise ValueError(f"{layer.__qualname__} is already registered")
    LINEAR_KINDS[layer] = LinearKind(d_in, d_out, transposed)


register_layer(nn.Linear, d_in=lambda m: m.in_features, d_out=lambda m: m.out_features, transposed=True)
register_layer(Conv1D, d_in=lambda m: m.nx, d_out=lambda m: m.nf, transposed=False)

EXPERT_KINDS = {
    name: LinearKind(
        lambda m, name=name: m.get_parameter(name).shape[2],  # type: ignore[misc]
        lambda m, name=name: m.get_parameter(name).shape[1],  # type: ignore[misc]
        transposed=True,
    )
    for name in (GATE_UP, DOWN)
}
"""How a module of experts stores each expert's W, by parameter (`gramfuse_model.experts`)."""

ALIKE = {"transformers.models.falcon.modeling_falcon.FalconLinear": nn.Linear}
"""Subclasses that compute the same as a registered type, by full name, so that they need not be imported."""


class LinearModule(NamedTuple):
    """A module whose weight, or whose experts' weights, can be merged in closed form."""

    weight: str
    module: nn.Module
    kind: LinearKind
    experts: int | None = None
    """Number of experts if the weight is (experts, d_out, d_in); None otherwise."""

    @property
    def parameter(self) -> nn.Parameter:
        """The weight."""
        return self.module.get_parameter(self.weight.rpartition(".")[2])

    @property
    def d_in(self) -> int:
        """Number of input features."""
        return self.kind.d_in(self.module)

    @property
    def d_out(self) -> int:
        """Number of output features."""
        return self.kind.d_out(self.module)


def kind_of(module: nn.Module) -> LinearKind | None:
    """Return how a module stores W in y = x W, or None if it is not a registered linear layer."""
    layer = type(module)
    return LINEAR_KINDS.get(ALIKE.get(f"{layer.__module__}.{layer.__qualname__}", layer))


def linear_modules(model: nn.Module) -> Iterator[LinearModule]:
    """Yield the linear modules of a model that do not share their weight.

    Shared weights, such as tied embeddings, are skipped: the closed form for one use does not hold for the other.
    """
    holders = _holders(model)
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None and holders[id(module.weight)] == 1:
            yield LinearModule(f"{name}.weight" if name else "weight", module, kind)


def experts_of(model: nn.Module) -> Iterator[LinearModule]:
    """Yield the weights of experts in fused parameters that no other module shares."""
    holders = _holders(model)
    for name, module in model.named_modules():
        if holds_experts(module):
            for weight, kind in EXPERT_KINDS.items():
                linear = LinearModule(f"{name}.{weight}" if name else weight, module, kind)
                if holders[id(linear.parameter)] == 1:
                    yield linear._replace(experts=len(linear.parameter))


def _holders(model: nn.Module) -> dict[int, int]:
    """Count the modules that hold each parameter, by the parameter's id()."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return holders
