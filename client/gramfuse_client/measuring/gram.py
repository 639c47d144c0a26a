"""Collects Gram matrices: the mean of x xᵀ over the real tokens that enter a linear layer.

An expert's Gram matrix is also a mean over all real tokens, with zero for tokens that are not routed to it. So the
weight of an expert at a silo is proportional to how much the silo uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from gramfuse_model.experts import received
from gramfuse_model.heads import is_encoder_decoder
from gramfuse_model.layers import LinearModule, experts_of, linear_modules
from gramfuse_model.probing.batch import inputs_of, masks_of
from gramfuse_model.probing.hooks import Hook, observing, rows_of
from gramfuse_protocol.contract.layout import Group, Layout, RowKind
from gramfuse_protocol.errors import ContributionError


class Gram:
    """The running sum of one group's Gram matrix, in float64, block by block.

    Attributes:
        tokens: number of rows added, not counting tables.
    """

    def __init__(self, group: Group, limit: int) -> None:
        self.group = group
        self.limit = limit
        self.tokens = 0
        self._sums: list[torch.Tensor] | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Add rows (tokens, d_in); ignore rows beyond the limit."""
        rows = rows[: self.limit - self.tokens]
        self.tokens += rows.shape[0]
        self._add((rows,), 1.0)

    def add_routed(
        self,
        rows: torch.Tensor,
        choices: torch.Tensor,
        by_expert: Callable[[torch.Tensor, torch.Tensor], Iterator[torch.Tensor]],
    ) -> None:
        """Add rows (tokens, hidden) that enter a module of experts; ignore rows beyond the limit.

        Args:
            choices: indices of each row's experts, (tokens, top_k).
            by_expert: given rows and choices, yields each expert's inputs, (routed tokens, d_in).
        """
        room = self.limit - self.tokens
        rows, choices = rows[:room], choices[:room]
        self.tokens += rows.shape[0]
        self._add(by_expert(rows, choices), 1.0)

    def add_table(self, rows: torch.Tensor, tokens: int) -> None:
        """Add rows (any, d_in) that all examples of a batch share; together they weigh as much as its tokens."""
        if tokens:
            self._add((rows,), tokens / rows.shape[0])

    def _add(self, by_expert: Iterable[torch.Tensor], weight: float) -> None:
        blocks = self.group.blocks
        if self._sums is None:
            self._sums = [torch.zeros(count, width, width, dtype=torch.float64) for _, count, width in blocks.parts]
        totals = iter(self._sums)
        for rows in by_expert:
            for first, count, width in blocks.each:
                total = next(totals)
                if rows.shape[0]:
                    x = rows[:, first : first + count * width].float()
                    x = x.reshape(-1, count, width).transpose(0, 1)  # (count, tokens, width)
                    total += weight * (x.transpose(1, 2) @ x).cpu().double()

    def mean(self) -> Any:
        """Return the packed mean, float32 (entries,); zeros without tokens."""
        if self._sums is None or not self.tokens:
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
    """Run a model over batches, in evaluation mode and without autograd, and return each group's Gram matrix by name.

    If a module is called several times in one forward pass, as ALBERT's layers are, its Gram matrix is the sum over all
    calls. One call may take a table that all examples share: DeBERTa's relative positions go through the query and key
    projections too. Each attention score uses one token and one position, so the table weighs as much as the tokens of
    the same pass. If it were counted once per batch, its weight would depend on the batch size.

    Args:
        batches: keyword arguments of the model's forward. `attention_mask` (batch, length) marks real tokens, given as
            `input_ids` or as `inputs_embeds`, or real audio samples. `labels` is ignored, except for an encoder-decoder
            model, where it is the target: (batch, length), −100 where padded.
        limit: maximum token rows for one Gram matrix, ≥ 1. Collection ends once every group has that many, so batches
            must be in random order.
        progress: called with the number of batches done.

    Raises:
        ContributionError: if a weight of the layout does not belong to a registered module of this model, modules of
            one group receive different tensors, or a module is called more often than when the layout was made.
        ModelError: if no input of a batch has the shape of its `attention_mask`.
    """
    watchers = [_Watcher(group, limit) for group in layout.groups]
    modules = _modules(model, layout)
    hooks = [
        (modules[weight.weight].module, watcher.hook(position))
        for watcher in watchers
        for position, weight in enumerate(watcher.group.weights)
    ]
    with observing(model, hooks):
        for number, batch in enumerate(batches, 1):
            inputs, masks = _run(model, batch)
            for watcher in watchers:
                watcher.begin(masks)
            model(**inputs)
            for watcher in watchers:
                watcher.end()
            if progress is not None:
                progress(number)
            if watchers and all(watcher.gram.full for watcher in watchers):
                break
    return {watcher.group.name: watcher.gram for watcher in watchers}


def _run(
    model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a batch's inputs for the model, and the known masks of its real input and target tokens."""
    inputs = inputs_of(batch)
    if is_encoder_decoder(model) and "decoder_input_ids" not in batch:
        if "labels" not in batch:
            raise ContributionError("a batch has no targets ('labels'), but the model's decoder needs them")
        inputs["labels"] = batch["labels"]
    return inputs, masks_of(model, batch)


class _Watcher:
    """Records the inputs of one group's modules during a forward pass."""

    def __init__(self, group: Group, limit: int) -> None:
        self.group = group
        self.gram = Gram(group, limit)
        self._only_tables = set(group.rows) == {"table"}

    def begin(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Prepare for one forward pass."""
        self._masks = masks
        self._calls = [0] * len(self.group.weights)
        self._seen: list[torch.Tensor] = []  # by call; kept alive, since a data pointer can be reused after that
        self._tables: list[torch.Tensor] = []
        self._before = self.gram.tokens

    def hook(self, position: int) -> Hook:
        """Return the hook for one of the group's modules."""

        def receive(module: nn.Module, x: torch.Tensor, others: tuple[Any, ...]) -> None:
            call, weight = self._calls[position], self.group.weights[position].weight
            self._calls[position] += 1
            if call == len(self.group.rows):
                raise ContributionError(
                    f"group {self.group.name!r}: {weight!r} is called more often than when the layout was made; make "
                    "the layout again with: gramfuse plan lock"
                )
            if call == len(self._seen):
                self._seen.append(x)
                self._take(weight, module, (x, *others), self.group.rows[call])
            elif x.data_ptr() != self._seen[call].data_ptr() or x.shape != self._seen[call].shape:
                raise ContributionError(
                    f"group {self.group.name!r}: {weight!r} receives another tensor than the first weight of its "
                    "group, so the layout was not made from this base model; make it again with: gramfuse plan lock"
                )

        return receive

    def _take(self, weight: str, module: nn.Module, inputs: tuple[Any, ...], kind: RowKind) -> None:
        mask = self._masks.get("input" if kind == "turned" else kind)
        try:
            rows = rows_of(inputs[0], kind, mask)
            if self.group.experts:
                choices = rows_of(inputs[1], kind, mask)
                parameter = weight.rpartition(".")[2]
                self.gram.add_routed(rows, choices, lambda rows, choices: received(module, parameter, rows, choices))
                return
        except ValueError as error:
            raise ContributionError(
                f"group {self.group.name!r}: the input of {weight!r} does not have the kind of rows that the layout "
                f"expects ({kind}): {error}. The layout was not made from this base model; make it again with: "
                "gramfuse plan lock"
            ) from None
        if kind == "table" and not self._only_tables:
            self._tables.append(rows)
        else:
            self.gram.add(rows)

    def end(self) -> None:
        """Add the tables, whose weight is known only after the forward pass, and release its tensors."""
        for table in self._tables:
            self.gram.add_table(table, self.gram.tokens - self._before)
        self._seen, self._tables = [], []


def _modules(model: nn.Module, layout: Layout) -> dict[str, LinearModule]:
    """Return the model's modules by weight name, for all weights of the layout with a Gram matrix."""
    by_weight = {linear.weight: linear for linear in (*linear_modules(model), *experts_of(model))}
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    modules = {}
    for _, linear in layout.linear():
        module = by_weight.get(linear.weight)
        if module is None:
            raise ContributionError(
                f"tensor {linear.weight!r} of the layout is not the weight of a linear module of this model; "
                "the base model differs from the plan's"
            )
        shape, expected = tuple(module.parameter.shape), shapes[linear.weight]
        if shape != expected or module.kind.transposed != linear.transposed:
            raise ContributionError(
                f"tensor {linear.weight!r} is {shape} in a {type(module.module).__name__} of this model, "
                f"but the layout expects {expected}; the base model differs from the plan's"
            )
        modules[linear.weight] = module
    return modules
