"""Added tokens: find the rows of tokens that a model has beyond its base, and add such rows to a model.

`resize_token_embeddings` adds a row for each token to every tensor with token rows: the embedding table, and the output
layer if it is not tied to the table. A table can also have spare rows without a token, for instance if it was padded to
a round number of rows; a token that was added later may use one of them.
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
    """The token rows that a model has beyond its base.

    Args:
        tokens: the added tokens and their ids, sorted by id.
        common: number of rows in the base's embedding table.
        rows: number of rows in the model's embedding table, ≥ `common`.
        axes: the tensors with token rows, by name, and the dimension of their tokens.
    """

    tokens: Mapping[str, int]
    common: int
    rows: int
    axes: Mapping[str, int]

    @property
    def idle(self) -> int:
        """Number of rows beyond the base's that belong to no token."""
        beyond = set(range(self.common, self.rows))
        return len(beyond.difference(self.tokens.values()))

    def shared(self, name: str, mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """Return a tensor's rows for the base's tokens; spare rows used by an added token are the base's."""
        axis = self.axes.get(name)
        if axis is None:
            return mine
        rows = mine.narrow(axis, 0, self.common)
        used = [index for index in self.tokens.values() if index < self.common]
        if used:
            rows = rows.clone().index_copy_(axis, torch.tensor(used), theirs.index_select(axis, torch.tensor(used)))
        return rows

    def padded(self, name: str, theirs: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the base, extended with zero rows to the model's size."""
        axis = self.axes.get(name)
        if axis is None:
            return theirs
        shape = list(theirs.shape)
        shape[axis] = self.rows - self.common
        return torch.cat([theirs, theirs.new_zeros(shape)], axis)

    def added(self, model: nn.Module) -> AddedTokens | None:
        """Return the added tokens with their rows in a model; None if there are none."""
        if not self.tokens:
            return None
        tensors = _tensors(model)
        ids = torch.tensor(list(self.tokens.values()))
        rows = {name: _rows(tensors[name], axis, ids) for name, axis in self.axes.items()}
        return AddedTokens(tuple(self.tokens), rows)


def growth_of(tuned: Base, origin: Base) -> Growth | None:
    """Return the token rows that a model has beyond its base; None if tokens and number of rows are the same.

    Returns:
        May have fewer rows than the base; the caller must refuse that.
    """
    mine, theirs = token_table(tuned.model), token_table(origin.model)
    if mine is None or theirs is None:
        return None
    rows, common = mine.num_embeddings, theirs.num_embeddings
    tokens = _added_tokens(tuned.tokenizer, origin.tokenizer, common, rows)
    if rows == common and not tokens:
        return None
    return Growth(tokens, common, rows, token_axes(origin.model))


def _added_tokens(mine: Any, theirs: Any, common: int, rows: int) -> Mapping[str, int]:
    """Return the tokens with rows in a table that the base does not have, or has no row for."""
    new = new_tokens(mine, theirs)
    added = ((t, n) for t, n in mine.get_vocab().items() if n < rows and (n >= common or t in new))
    return dict(sorted(added, key=lambda entry: (entry[1], entry[0])))


def token_axes(model: PreTrainedModel) -> dict[str, int]:
    """Return a model's parameters and saved buffers with token rows, by name, and the dimension of their tokens.

    These are the tensors whose shape changes with the number of tokens, in a copy of the model on the meta device.
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
    """Load a tokenizer that extends a base model's: it has the same tokens with the same ids, and others.

    Raises:
        ModelError: if there is no tokenizer, if it does not extend the base's (names the first difference), or if its
            token ids have a gap.
    """
    if not isinstance(base.tokenizer, PreTrainedTokenizerBase):
        raise ModelError("--tokenizer is for text models, but the base model takes images")
    if not directory.is_dir():
        raise ModelError(f"--tokenizer {directory}: no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # libraries raise all kinds of errors for broken files
        raise ModelError(f"--tokenizer {directory}: cannot be loaded: {error}") from error
    check_files_of(tokenizer, str(directory))
    other = other_inputs(tokenizer, base.tokenizer)
    if other is not None:
        raise ModelError(
            f"--tokenizer {directory}: does not extend the base's tokenizer ({other}); load the base's tokenizer, call "
            "its add_tokens, and save it"
        )
    table = token_table(base.model)
    common = 0 if table is None else table.num_embeddings
    new = new_tokens(tokenizer, base.tokenizer)
    rows = max([common, *(index + 1 for index in new.values())])
    gaps = sorted(set(range(common, rows)).difference(tokenizer.get_vocab().values()))
    if gaps:
        raise ModelError(
            f"--tokenizer {directory}: has no token with id {gaps[0]:,}, but tokens with larger ids; the ids of added "
            "tokens must have no gaps"
        )
    return tokenizer


def wanted_tokens(tokenizer: PreTrainedTokenizerBase, base: Base) -> Mapping[str, int]:
    """Return the tokens of a tokenizer for which a base model has no rows, with their ids, sorted by id."""
    table = token_table(base.model)
    common = 0 if table is None else table.num_embeddings
    new = new_tokens(tokenizer, base.tokenizer)
    return _added_tokens(tokenizer, base.tokenizer, common, max([common, *(index + 1 for index in new.values())]))


def grow(model: PreTrainedModel, tokens: Mapping[str, int], rows: Mapping[str, NDArray[Any]]) -> None:
    """Add rows for tokens to a model, in place.

    Args:
        tokens: the tokens and their ids, without gaps beyond the model's rows.
        rows: the rows for each tensor in `token_axes`, (tokens, …), in the order of `tokens`.
    """
    axes, table = token_axes(model), token_table(model)
    assert table is not None  # noqa: S101
    count = max([table.num_embeddings, *(index + 1 for index in tokens.values())])
    if count > table.num_embeddings:
        model.resize_token_embeddings(count, mean_resizing=False)
    tensors, ids = _tensors(model), torch.tensor(list(tokens.values()))
    with torch.no_grad():
        for name, axis in axes.items():
            values = torch.from_numpy(np.ascontiguousarray(rows[name])).to(tensors[name].dtype)
            tensors[name].index_copy_(axis, ids, values.movedim(0, axis))


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | saved_buffers(model)


def _rows(tensor: torch.Tensor, axis: int, ids: torch.Tensor) -> NDArray[np.float32]:
    values = tensor.detach().cpu().index_select(axis, ids).movedim(axis, 0)
    return values.float().contiguous().numpy()
