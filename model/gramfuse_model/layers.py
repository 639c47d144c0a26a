"""Which parameters are linear, decided by what kind of module holds them and never by the number of dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from gramfuse_model.experts import DOWN, GATE_UP, holds_experts


class LinearKind(NamedTuple):
    """How a module type stores y = x W: `transposed` means that its weight is Wᵀ, (d_out, d_in)."""

    d_in: Callable[[nn.Module], int]
    d_out: Callable[[nn.Module], int]
    transposed: bool


KINDS: dict[type[nn.Module], LinearKind] = {}
"""The registry, by type. Subclasses count only if they are registered themselves: they may compute something else."""


def register_layer(
    layer: type[nn.Module],
    *,
    d_in: Callable[[Any], int],
    d_out: Callable[[Any], int],
    transposed: bool,
) -> None:
    """Have a type of module merged in closed form: one that computes x W (+ b) of its first input.

    Layouts, Gram matrices, merges and reports take it from here; nothing else is needed. Of a layer of your own:

        register_layer(MyLinear, d_in=lambda m: m.inputs, d_out=lambda m: m.outputs, transposed=True)

    Args:
        layer: its parameter `weight` has two dimensions; others, such as `bias`, are averaged.
        d_in: returns the number of input features of a module; they are the last dimension of its input.
        d_out: returns the number of its outputs.
        transposed: whether `weight` is Wᵀ, (d_out, d_in), and not W.

    Raises:
        ValueError: if the type is registered already.
    """
    if layer in KINDS:
        raise ValueError(f"{layer.__qualname__} is registered already")
    KINDS[layer] = LinearKind(d_in, d_out, transposed)


register_layer(nn.Linear, d_in=lambda m: m.in_features, d_out=lambda m: m.out_features, transposed=True)
register_layer(Conv1D, d_in=lambda m: m.nx, d_out=lambda m: m.nf, transposed=False)

OF_EXPERTS = {
    name: LinearKind(
        lambda m, name=name: m.get_parameter(name).shape[2],  # type: ignore[misc]
        lambda m, name=name: m.get_parameter(name).shape[1],  # type: ignore[misc]
        transposed=True,
    )
    for name in (GATE_UP, DOWN)
}
"""What each expert of a module computes with its part of a parameter (`gramfuse_model.experts`)."""

ALIKE = {"transformers.models.falcon.modeling_falcon.FalconLinear": nn.Linear}
"""Subclasses that compute what a registered type does, by their full names, so that no model is imported for them."""


class LinearModule(NamedTuple):
    """One module whose weight, or that of each of its experts, has a closed form."""

    weight: str
    module: nn.Module
    kind: LinearKind
    experts: int | None = None
    """How many experts the weight is of, if it is of experts: (experts, d_out, d_in)."""

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
    """Return how a module stores y = x W, or None if it is not known to be linear."""
    own = type(module)
    return KINDS.get(ALIKE.get(f"{own.__module__}.{own.__qualname__}", own))


def linear_modules(model: nn.Module) -> Iterator[LinearModule]:
    """Yield the linear modules of a model whose weight is theirs alone.

    A weight that another module holds too (tied embeddings, say) is left out: the closed form of one use
    would not be that of the other.
    """
    holders = _holders(model)
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None and holders[id(module.weight)] == 1:
            yield LinearModule(f"{name}.weight" if name else "weight", module, kind)


def experts_of(model: nn.Module) -> Iterator[LinearModule]:
    """Yield the weights of experts that are held as fused parameters, if these are their module's alone."""
    holders = _holders(model)
    for name, module in model.named_modules():
        if holds_experts(module):
            for weight, kind in OF_EXPERTS.items():
                linear = LinearModule(f"{name}.{weight}" if name else weight, module, kind)
                if holders[id(linear.parameter)] == 1:
                    yield linear._replace(experts=len(linear.parameter))


def _holders(model: nn.Module) -> dict[int, int]:
    """Return how many modules hold a parameter, by its identity."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return holders
