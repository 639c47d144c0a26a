"""Tokens that were added to models that are merged: left out, or kept with a tokenizer that has them.

Each model has them under numbers of its own, so they are matched by what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gramfuse_model.added_tokens import grow, load_grown, token_axes, wanted_tokens
from gramfuse_model.loading.base_model import Base
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.statistics.file import StatisticsFile
from gramfuse_protocol.text import listed, quoted
from gramfuse_server.report.schema import AddedToken, AddedTokensOfReport


@dataclass(frozen=True)
class Additions:
    """Which added tokens a merge keeps, and of which files.

    Args:
        files: in the order in which they are added.
        weights: of each file in the merge, by name.
        tokenizer: that of the merged model; None is the base's.
        tokens: those beyond the base's rows that the merged model has, with their numbers, by number.
    """

    files: Sequence[StatisticsFile]
    weights: Mapping[str, float]
    tokenizer: PreTrainedTokenizerBase | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(
        files: Sequence[StatisticsFile], weights: Mapping[str, float], base: Base, directory: Path | None
    ) -> Additions:
        """Return what a merge keeps.

        Args:
            directory: of the merged model's tokenizer; None if it is the base's.

        Raises:
            ModelError: if it cannot be loaded, or is not the base's with tokens added to it.
            ContributionError: naming the token, if one was added that no file has.
        """
        if directory is None:
            return Additions(files, weights)
        tokenizer = load_grown(directory, base)
        tokens = wanted_tokens(tokenizer, base)
        had = {token for file in files for token in file.added}
        unknown = [token for token in tokens if token not in had]
        if unknown:
            raise ContributionError(
                f"--tokenizer {directory}: no file has {listed(unknown)}, so there are no rows for it; the files "
                f"have {listed(sorted(had)) or 'no added token'}"
            )
        return Additions(files, weights, tokenizer, tokens)

    def told(self) -> AddedTokensOfReport:
        """Return what the report says: each added token, and the models that have it."""
        had: dict[str, list[str]] = {token: [] for token in self.tokens}
        for file in self.files:
            for token in file.added:
                had.setdefault(token, []).append(file.name)
        entries = [AddedToken(token=token, silos=tuple(silos)) for token, silos in had.items()]
        return AddedTokensOfReport(
            kept=tuple(entry for entry in entries if entry.token in self.tokens),
            left_out=tuple(entry for entry in entries if entry.token not in self.tokens),
        )

    def put(self, base: Base, own: StatisticsFile | None = None) -> Base:
        """Give a merged model the tokens that are kept, in place, and return it with its tokenizer.

        Args:
            own: whose model it is, if it keeps what not all models have.

        Raises:
            ContributionError: if no file has the row of a token that the model needs.
        """
        if self.tokenizer is None:
            return base
        if self.tokens:
            rows: dict[str, NDArray[np.float32]] = {}
            tensors = base.model.state_dict()
            for name, axis in token_axes(base.model).items():
                shared = all(name in file.about.base.weights for file in self.files)
                shape = tuple(size for place, size in enumerate(tensors[name].shape) if place != axis)
                rows[name] = self._rows(name, shape, self.files if own is None or shared else (own,))
            grow(base.model, self.tokens, rows)
        if self.tokenizer.pad_token is not None and self.tokenizer.pad_token in self.tokens:
            for config in (base.model.config, base.model.config.get_text_config()):
                config.pad_token_id = self.tokenizer.pad_token_id
        return replace(base, tokenizer=self.tokenizer)

    def _rows(self, name: str, shape: tuple[int, ...], files: Sequence[StatisticsFile]) -> NDArray[np.float32]:
        """Return the weighted mean of the rows that files have of each token, (tokens, …).

        Args:
            shape: of a row.
        """
        places = {token: place for place, token in enumerate(self.tokens)}
        sums, weights = np.zeros((len(places), *shape)), np.zeros(len(places))
        for file in files:
            rows = file.rows(name)
            here = [place for place, token in enumerate(file.added) if token in places]
            if rows is None or not here:
                continue
            if rows.shape[1:] != shape:
                raise ContributionError(
                    f"{file.path}: rows of added tokens in {name!r} are {rows.shape[1:]}, and those of the base model "
                    f"{shape}; measure again"
                )
            there = [places[file.added[place]] for place in here]
            sums[there] += self.weights[file.name] * rows[here].astype(np.float64)
            weights[there] += self.weights[file.name]
        lacking = [token for token, place in places.items() if not weights[place]]
        if lacking:
            raise ContributionError(
                f"{', '.join(str(file.path) for file in files)}: no row of {name!r} for the added token "
                f"{quoted(lacking[0], 60)}; leave it out of --tokenizer"
            )
        return (sums / weights.reshape(-1, *[1] * len(shape))).astype(np.float32)
