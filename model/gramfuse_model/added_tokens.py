"""Rows of tokens that were added to a model: told apart from those that it shares with its base, and put into a table.

`resize_token_embeddings` gives a row to each token in every tensor that has such rows: the table of tokens, and the
output layer where it is not tied to it. A table may have rows of no token too, as those that were padded to a round
number of rows; a token that was added since may have taken one of these.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gramfuse_model.buffers import saved_buffers
from gramfuse_model.loading.base_model import Base
from gramfuse_model.loading.same_inputs import new_tokens, other_inputs
from gramfuse_model.loading.vocabulary import check_files_of, token_table
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.statistics.about import AddedTokens


@dataclass(frozen=True)
class Growth:
    """What a model has beyond its base since tokens were added to it.

    Args:
        tokens: those whose rows are not the base's, with their numbers, by number.
        common: rows of the base's table of tokens.
        rows: rows of the model's, no fewer.
        axes: tensors that have rows of tokens, by name, and in which dimension.
    """

    tokens: Mapping[str, int]
    common: int
    rows: int
    axes: Mapping[str, int]

    @property
    def idle(self) -> int:
        """Rows beyond the base's that are no token's."""
        beyond = set(range(self.common, self.rows))
        return len(beyond.difference(self.tokens.values()))

    def shared(self, name: str, mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """Return of a tensor what stands for the base's tokens; where an added token took an idle row, the base's."""
        axis = self.axes.get(name)
        if axis is None:
            return mine
        cut = mine.narrow(axis, 0, self.common)
        taken = [index for index in self.tokens.values() if index < self.common]
        if taken:
            cut = cut.clone().index_copy_(axis, torch.tensor(taken), theirs.index_select(axis, torch.tensor(taken)))
        return cut

    def padded(self, name: str, theirs: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the base with zeros in the rows that the model has beyond it."""
        axis = self.axes.get(name)
        if axis is None:
            return theirs
        shape = list(theirs.shape)
        shape[axis] = self.rows - self.common
        return torch.cat([theirs, theirs.new_zeros(shape)], axis)

    def added(self, model: nn.Module) -> AddedTokens | None:
        """Return the tokens with their rows in a model, if there are any."""
        if not self.tokens:
            return None
        tensors = _tensors(model)
        numbers = torch.tensor(list(self.tokens.values()))
        rows = {name: _rows(tensors[name], axis, numbers) for name, axis in self.axes.items()}
        return AddedTokens(tuple(self.tokens), rows)


def growth_of(tuned: Base, origin: Base) -> Growth | None:
    """Return what a model has beyond its base, or None if it has the same tokens and as many rows.

    Returns:
        With fewer rows than the base, if it has fewer: it is the caller's to refuse.
    """
    mine, theirs = token_table(tuned.model), token_table(origin.model)
    if mine is None or theirs is None:
        return None
    rows, common = mine.num_embeddings, theirs.num_embeddings
    tokens = _beyond(tuned.tokenizer, origin.tokenizer, common, rows)
    if rows == common and not tokens:
        return None
    return Growth(tokens, common, rows, token_axes(origin.model))


def _beyond(mine: Any, theirs: Any, common: int, rows: int) -> Mapping[str, int]:
    """Return the tokens of a table's rows that the base has not, or has no row for."""
    new = new_tokens(mine, theirs)
    found = ((t, n) for t, n in mine.get_vocab().items() if n < rows and (n >= common or t in new))
    return dict(sorted(found, key=lambda entry: (entry[1], entry[0])))


def token_axes(model: PreTrainedModel) -> dict[str, int]:
    """Return a model's parameters and saved buffers that have rows of tokens, by name, and in which dimension.

    They are those that another number of tokens gives another shape, in a model without weights.
    """
    table = token_table(model)
    assert table is not None  # noqa: S101
    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(model.config))
        before = {name: tensor.shape for name, tensor in _tensors(bare).items()}
        bare.resize_token_embeddings(table.num_embeddings + 1, mean_resizing=False)
    axes = {}
    for name, tensor in _tensors(bare).items():
        changed = [axis for axis, (old, new) in enumerate(zip(before[name], tensor.shape, strict=True)) if old != new]
        if changed:
            axes[name] = changed[0]
    return axes


def load_grown(directory: Path, base: Base) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has the tokens of a base model's, under the same numbers, and others beside them.

    Raises:
        ModelError: if there is none, if it is another one, naming the token or the part of it that differs, or if a
            number between its tokens is no token's.
    """
    if not isinstance(base.tokenizer, PreTrainedTokenizerBase):
        raise ModelError("--tokenizer is for models of texts, and the base model takes images")
    if not directory.is_dir():
        raise ModelError(f"--tokenizer {directory}: no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # of files that make no sense, libraries raise what they like
        raise ModelError(f"--tokenizer {directory}: cannot be loaded: {error}") from error
    check_files_of(tokenizer, str(directory))
    other = other_inputs(tokenizer, base.tokenizer)
    if other is not None:
        raise ModelError(
            f"--tokenizer {directory}: is not the base's with tokens added to it ({other}). Load the base's tokenizer, "
            "call its add_tokens, and save it"
        )
    table = token_table(base.model)
    common = 0 if table is None else table.num_embeddings
    new = new_tokens(tokenizer, base.tokenizer)
    rows = max([common, *(index + 1 for index in new.values())])
    gaps = sorted(set(range(common, rows)).difference(tokenizer.get_vocab().values()))
    if gaps:
        raise ModelError(
            f"--tokenizer {directory}: has no token of number {gaps[0]:,}, and tokens beyond it; numbers of added "
            "tokens have no gaps"
        )
    return tokenizer


def wanted_tokens(tokenizer: PreTrainedTokenizerBase, base: Base) -> Mapping[str, int]:
    """Return the tokens of a tokenizer that need rows which a base model has not, with their numbers, by number."""
    table = token_table(base.model)
    common = 0 if table is None else table.num_embeddings
    new = new_tokens(tokenizer, base.tokenizer)
    return _beyond(tokenizer, base.tokenizer, common, max([common, *(index + 1 for index in new.values())]))


def grow(model: PreTrainedModel, tokens: Mapping[str, int], rows: Mapping[str, NDArray[Any]]) -> None:
    """Give a model rows for tokens, in place.

    Args:
        tokens: with their numbers; none between the model's rows and the highest number is missing.
        rows: of each tensor of `token_axes`: (tokens, …), the tokens in their order.
    """
    axes, table = token_axes(model), token_table(model)
    assert table is not None  # noqa: S101
    count = max([table.num_embeddings, *(index + 1 for index in tokens.values())])
    if count > table.num_embeddings:
        model.resize_token_embeddings(count, mean_resizing=False)
    tensors, numbers = _tensors(model), torch.tensor(list(tokens.values()))
    with torch.no_grad():
        for name, axis in axes.items():
            values = torch.from_numpy(np.ascontiguousarray(rows[name])).to(tensors[name].dtype)
            tensors[name].index_copy_(axis, numbers, values.movedim(0, axis))


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | saved_buffers(model)


def _rows(tensor: torch.Tensor, axis: int, numbers: torch.Tensor) -> NDArray[np.float32]:
    values = tensor.detach().cpu().index_select(axis, numbers).movedim(axis, 0)
    return values.float().contiguous().numpy()
