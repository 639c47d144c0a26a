"""Which parameters are linear, decided by module type and never by the number of dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D


class LinearKind(NamedTuple):
    """How a module type stores y = x W: `transposed` means that its weight is Wᵀ, (d_out, d_in)."""

    d_in: Callable[[nn.Module], int]
    d_out: Callable[[nn.Module], int]
    transposed: bool


KINDS: dict[type[nn.Module], LinearKind] = {
    nn.Linear: LinearKind(lambda m: m.in_features, lambda m: m.out_features, transposed=True),  # type: ignore[arg-type, return-value]
    Conv1D: LinearKind(lambda m: m.nx, lambda m: m.nf, transposed=False),  # type: ignore[arg-type, return-value]
}
"""The registry. Subclasses count only if they are registered themselves: they may compute something else."""

ALIKE = {"transformers.models.falcon.modeling_falcon.FalconLinear": nn.Linear}
"""Subclasses that compute what a registered type does, by their full names, so that no model is imported for them."""


class LinearModule(NamedTuple):
    """One module whose weight has a closed form."""

    weight: str
    module: nn.Module
    kind: LinearKind

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
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None and holders[id(module.weight)] == 1:
            yield LinearModule(f"{name}.weight" if name else "weight", module, kind)
