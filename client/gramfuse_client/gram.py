"""Collects Gram matrices: the mean of x xᵀ over the real tokens that enter a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gramfuse_model.linear import KINDS
from gramfuse_model.observation import Hook, observing
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.layout import Group, Layout

Collector = Callable[[nn.Module, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(module, its input, mask of real tokens (batch, length) or None) → rows (tokens, d_in) that the weight multiplies."""

COLLECTORS: dict[type[nn.Module], Collector] = {}
"""The registry, by module type."""


def collects(*types: type[nn.Module]) -> Callable[[Collector], Collector]:
    """Register the collector of these module types."""

    def register(collector: Collector) -> Collector:
        COLLECTORS.update(dict.fromkeys(types, collector))
        return collector

    return register


@collects(nn.Linear, Conv1D)
def rows_of_features(module: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Rows of a layer that multiplies the last dimension of its input.

    The mask applies where the leading dimensions are the mask's, (batch, length, d_in) or flattened to
    (batch·length, d_in). Inputs that hold one row for each example, as a pooled head's do, have no padding.
    """
    if mask is not None and x.dim() > 2 and x.shape[:2] == mask.shape:
        x = x[mask]
    elif mask is not None and x.dim() == 2 and x.shape[0] == mask.numel():
        x = x[mask.reshape(-1)]
    return x.reshape(-1, x.shape[-1])  # (tokens, d_in)


class Gram:
    """The running sum of one group's Gram matrix, in float64, block by block."""

    def __init__(self, group: Group, limit: int) -> None:
        self.group = group
        self.limit = limit
        self.tokens = 0
        self._sums: list[torch.Tensor] | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Add rows (tokens, d_in); those beyond the limit are left out."""
        rows = rows[: self.limit - self.tokens]
        if not rows.shape[0]:
            return
        rows = rows.float()
        self.tokens += rows.shape[0]
        products = []
        for first, count, width in self.group.blocks.parts:
            x = (
                rows[:, first : first + count * width].reshape(-1, count, width).transpose(0, 1)
            )  # (count, tokens, width)
            products.append((x.transpose(1, 2) @ x).cpu().double())  # (count, width, width)
        if self._sums is None:
            self._sums = products
        else:
            for total, product in zip(self._sums, products, strict=True):
                total += product

    def mean(self) -> Any:
        """Return the packed mean, float32 (entries,); zeros if no token was seen."""
        if self._sums is None:
            return torch.zeros(self.group.blocks.entries).numpy()
        packed = self.group.blocks.pack([total.numpy() / self.tokens for total in self._sums])
        return packed.astype("float32")

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.tokens >= self.limit


def collect_grams(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    layout: Layout,
    *,
    limit: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Gram]:
    """Run a model over batches, in evaluation mode and without autograd, and return each group's Gram matrix.

    Args:
        batches: keyword arguments of the model's forward; `attention_mask` (batch, length) marks real tokens,
            `labels` is left out.
        limit: most token rows for one Gram matrix, ≥ 1; collection ends once every group has that many.
        progress: called with the number of batches done.

    Raises:
        ContributionError: if a weight of the layout is not of a registered module in this model, or if modules of
            one group receive different tensors.
    """
    grams = {group.name: Gram(group, limit) for group in layout.groups}
    modules = _modules(model, layout)
    mask: torch.Tensor | None = None
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(group: Group, position: int) -> Hook:
        def receive(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0]
            if position == 0:
                seen.setdefault(group.name, []).append(x)
                grams[group.name].add(COLLECTORS[type(module)](module, x, mask))
            elif all(x.data_ptr() != other.data_ptr() or x.shape != other.shape for other in seen.get(group.name, ())):
                raise ContributionError(
                    f"group {group.name!r}: {group.weights[position].weight!r} receives another tensor than the first "
                    "of its group; the layout was not made from this base model. Make it again with: gramfuse plan lock"
                )

        return receive

    hooks = [
        (modules[weight.weight], hook(group, position))
        for group in layout.groups
        for position, weight in enumerate(group.weights)
    ]
    with observing(model, hooks):
        for number, batch in enumerate(batches, 1):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            attention = inputs.get("attention_mask")
            mask = None if attention is None else attention.bool()
            model(**inputs)
            seen.clear()
            if progress is not None:
                progress(number)
            if grams and all(gram.full for gram in grams.values()):
                break
    return grams


def _modules(model: nn.Module, layout: Layout) -> dict[str, nn.Module]:
    named = dict(model.named_modules())
    modules = {}
    for group, linear in layout.linear():
        module = named.get(linear.weight.rpartition(".")[0])
        if module is None or type(module) not in COLLECTORS:
            raise ContributionError(
                f"tensor {linear.weight!r} of the layout is not the weight of a linear module of this model; "
                "the base model differs from the plan's"
            )
        expected = (linear.d_out, group.d_in) if linear.transposed else (group.d_in, linear.d_out)
        if tuple(module.weight.shape) != expected or KINDS[type(module)].transposed != linear.transposed:
            raise ContributionError(
                f"tensor {linear.weight!r} is {tuple(module.weight.shape)} in a {type(module).__name__} of this model, "
                f"the layout expects {expected}; the base model differs from the plan's"
            )
        modules[linear.weight] = module
    return modules
