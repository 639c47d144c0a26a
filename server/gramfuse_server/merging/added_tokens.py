"""Tokens that were added to the merged models' vocabularies: left out, or kept with a tokenizer that has them.

Each model has its own token ids, so tokens are matched by their text.
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
    """Which added tokens a merge keeps, and the files that have them.

    Args:
        files: in the order of addition.
        weights: weight of each file in the merge, by name.
        tokenizer: of the merged model; None for the base's.
        tokens: ids of the kept tokens beyond the base's rows, by text, in the order of ids.
    """

    files: Sequence[StatisticsFile]
    weights: Mapping[str, float]
    tokenizer: PreTrainedTokenizerBase | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def choose(
        files: Sequence[StatisticsFile], weights: Mapping[str, float], base: Base, directory: Path | None
    ) -> Additions:
        """Find the added tokens to keep.

        Args:
            directory: of the merged model's tokenizer; None for the base's.

        Raises:
            ModelError: if the tokenizer cannot be loaded, or is not the base's with tokens added.
            ContributionError: naming the token, if it has an added token that no file has.
        """
        if directory is None:
            return Additions(files, weights)
        tokenizer = load_grown(directory, base)
        tokens = wanted_tokens(tokenizer, base)
        available = {token for file in files for token in file.added}
        unknown = [token for token in tokens if token not in available]
        if unknown:
            raise ContributionError(
                f"--tokenizer {directory}: no file has rows for {listed(unknown)}; the files have "
                f"{listed(sorted(available)) or 'no added token'}"
            )
        return Additions(files, weights, tokenizer, tokens)

    def report(self) -> AddedTokensOfReport:
        """Return the report's entry: each added token, and the models that have it."""
        holders: dict[str, list[str]] = {token: [] for token in self.tokens}
        for file in self.files:
            for token in file.added:
                holders.setdefault(token, []).append(file.name)
        entries = [AddedToken(token=token, silos=tuple(silos)) for token, silos in holders.items()]
        return AddedTokensOfReport(
            kept=tuple(entry for entry in entries if entry.token in self.tokens),
            left_out=tuple(entry for entry in entries if entry.token not in self.tokens),
        )

    def add_to(self, base: Base, owner: StatisticsFile | None = None) -> Base:
        """Add the kept tokens to a merged model, in place, and return it with its tokenizer.

        Args:
            owner: file of the model, if the model keeps its own head.

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
                rows[name] = self._rows(name, shape, self.files if owner is None or shared else (owner,))
            grow(base.model, self.tokens, rows)
        if self.tokenizer.pad_token is not None and self.tokenizer.pad_token in self.tokens:
            for config in (base.model.config, base.model.config.get_text_config()):
                config.pad_token_id = self.tokenizer.pad_token_id
        return replace(base, tokenizer=self.tokenizer)

    def _rows(self, name: str, shape: tuple[int, ...], files: Sequence[StatisticsFile]) -> NDArray[np.float32]:
        """Return the weighted mean over the files of each token's row, float32 (tokens, *shape).

        Args:
            shape: of a row.
        """
        places = {token: place for place, token in enumerate(self.tokens)}
        sums, weights = np.zeros((len(places), *shape)), np.zeros(len(places))
        for file in files:
            rows = file.rows(name)
            sources = [place for place, token in enumerate(file.added) if token in places]
            if rows is None or not sources:
                continue
            if rows.shape[1:] != shape:
                raise ContributionError(
                    f"{file.path}: rows of added tokens in {name!r} have shape {rows.shape[1:]}, expected {shape} "
                    "as in the base model; measure again"
                )
            targets = [places[file.added[place]] for place in sources]
            sums[targets] += self.weights[file.name] * rows[sources].astype(np.float64)
            weights[targets] += self.weights[file.name]
        missing = [token for token, place in places.items() if not weights[place]]
        if missing:
            raise ContributionError(
                f"{', '.join(str(file.path) for file in files)}: no row of {name!r} for the added token "
                f"{quoted(missing[0], 60)}; leave it out of --tokenizer"
            )
        return (sums / weights.reshape(-1, *[1] * len(shape))).astype(np.float32)
