"""The metadata of a statistics file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from gramfuse_protocol.bounds import (
    PLAN_CHARACTERS,
    SILOS,
    TENSORS,
    VALUES,
    Many,
    Title,
)
from gramfuse_protocol.contract.form import Block
from gramfuse_protocol.contract.layout import ITEM_BYTES, Layout, Positive, Shape
from gramfuse_protocol.contract.plan_sections import BaseName, Commit, Name, Sha256
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.documents import Section
from gramfuse_protocol.text import Word, quoted

TOKEN_CHARACTERS = 4096
"""Maximum length of an added token in its escaped form."""


class Origin(Section):
    """The base model from which differences are taken.

    Example:
        >>> digests = gramfuse.config_digest(base), gramfuse.processor_digest(tokenizer)
        >>> weights = gramfuse.tensor_digests(base)
        >>> gramfuse.Origin(name="./bert", weights=weights, config=digests[0], processor=digests[1]).revision is None
        True

    Args:
        name: hub id, bundled name, or `./<last component>` of a directory.
        revision: commit of the hub repository; None for a directory.
        weights: SHA-256 of each parameter and persistent buffer (`gramfuse.tensor_digests`).
        config: SHA-256 of its configuration (`gramfuse.config_digest`).
        processor: SHA-256 of its tokenizer or image processor (`gramfuse.processor_digest`).
    """

    name: BaseName
    revision: Commit | None = None
    weights: Annotated[Mapping[Word, Sha256], Field(min_length=1, max_length=2 * TENSORS)]
    config: Sha256
    processor: Sha256


def escaped(token: str) -> str:
    """Return a token escaped as in ASCII JSON, without the quotes."""
    return json.dumps(token)[1:-1]


def _is_escaped(text: str) -> str:
    token = json.loads(f'"{text}"')
    if not token or escaped(token) != text or any("\ud800" <= character <= "\udfff" for character in token):
        raise ValueError(f"{quoted(text)} is not a token escaped as in ASCII JSON")
    return text


class Added(Section):
    """The tokens that were added to a model, and the shapes of their rows.

    Example:
        >>> gramfuse.Added(tokens=("<ticket>",), rows={"bert.embeddings.word_embeddings.weight": (1, 8)}).tokens
        ('<ticket>',)

    Args:
        tokens: `escaped`, since a token can contain a newline.
        rows: shape of the added rows of each tensor with token rows, tokens in the first dimension.
    """

    tokens: Annotated[
        Many[Annotated[str, Field(max_length=TOKEN_CHARACTERS), AfterValidator(_is_escaped)]],
        Field(min_length=1, max_length=VALUES),
    ]
    rows: Annotated[Mapping[Word, Shape], Field(min_length=1, max_length=TENSORS)]

    @model_validator(mode="after")
    def _one_row_for_each_token(self) -> Added:
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError("an added token occurs twice")
        wrong = next((name for name, shape in self.rows.items() if shape[:1] != (len(self.tokens),)), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} does not have one row for each of the {len(self.tokens):,} added tokens")
        return self


@dataclass(frozen=True)
class AddedTokens:
    """The tokens that a model has and its base does not.

    Example:
        >>> rows = {"bert.embeddings.word_embeddings.weight": np.zeros((2, 8), np.float32)}
        >>> gramfuse.AddedTokens(tokens=("<ticket>", "<name>"), rows=rows).tokens
        ('<ticket>', '<name>')

    Args:
        tokens: distinct tokens.
        rows: their values (not differences) by parameter or buffer, float32 (tokens, …).
    """

    tokens: tuple[str, ...]
    rows: Mapping[str, NDArray[np.float32]]


class AdapterOfFile(Section):
    """The part of an adapter that its statistics do not change: where it sits, and its matrices A.

    Example:
        >>> gramfuse.AdapterOfFile(frozen={"bert.encoder.layer.0.output.dense": (8, 24)}, saved=("classifier",)).saved
        ('classifier',)

    Args:
        frozen: shape of A, (rank, d_in), by the name of its module. The product of B and A is scaled by 1.
        saved: names of the modules that were trained whole.
        adapters: number of different adapters whose A are stacked; 1 if it is the adapter's own A.
    """

    frozen: Annotated[
        Mapping[Word, Annotated[Shape, Field(min_length=2, max_length=2)]], Field(min_length=1, max_length=TENSORS)
    ]
    saved: Annotated[Many[Word], Field(max_length=TENSORS)] = ()
    adapters: Annotated[int, Field(ge=1, le=SILOS)] = 1


@dataclass(frozen=True)
class FrozenOfAdapter:
    """The values of an `AdapterOfFile`.

    Example:
        >>> matrices = {"bert.encoder.layer.0.output.dense": np.zeros((8, 24), np.float32)}
        >>> gramfuse.FrozenOfAdapter(matrices=matrices, saved=("classifier",)).adapters
        1

    Args:
        matrices: A by the name of its module, float32 (rank, d_in).
        saved, adapters: as there.
    """

    matrices: Mapping[str, NDArray[np.float32]]
    saved: tuple[str, ...] = ()
    adapters: int = 1

    @property
    def about(self) -> AdapterOfFile:
        """Its description."""
        shapes = {module: matrix.shape for module, matrix in self.matrices.items()}
        return AdapterOfFile(frozen=shapes, saved=self.saved, adapters=self.adapters)


class About(Section):
    """The metadata of a statistics file.

    Example:
        >>> gramfuse.read_statistics("hospital.safetensors").about.task.labels
        ('no', 'yes')

    Args:
        name: name of the silo or model.
        base: the base model from which differences are taken.
        task: the task for which the model was fine-tuned.
        layout: layout of the statistics.
        examples: training examples, ≥ 1.
        tokens: token rows by group.
        head: names of the parameters outside the body, whether merged or not.
        own: shapes of the silo's own parameters, which are not merged.
        added: tokens that the base does not have; None if there are none.
        adapter: what an adapter leaves as it is; None for a whole model, and under a plan, which determines it.
        plan: text of the plan that the silo followed; empty without a plan.
        made_by: version of gramfuse that wrote the file.
    """

    documents = frozenset({"plan"})

    version: Literal[1] = 1
    name: Name
    base: Origin
    task: Task
    layout: Layout
    examples: Positive
    tokens: Annotated[Mapping[Word, Annotated[int, Field(ge=0, le=2**53 - 1)]], Field(max_length=TENSORS)]
    head: Annotated[Many[Word], Field(max_length=TENSORS)] = ()
    own: Annotated[Mapping[Word, Shape], Field(max_length=TENSORS)] = {}
    added: Added | None = None
    adapter: AdapterOfFile | None = None
    plan: Annotated[str, Field(max_length=PLAN_CHARACTERS)] = ""
    made_by: Title

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All tensors of the file, sorted by the bytes of their names, as in the file."""
        kept = (Block(own_block(name), shape) for name, shape in self.own.items())
        added = (Block(added_block(name), shape) for name, shape in (self.added.rows if self.added else {}).items())
        frozen = (
            Block(frozen_block(name), shape) for name, shape in (self.adapter.frozen if self.adapter else {}).items()
        )
        every = (*self.layout.blocks, *kept, *added, *frozen)
        return tuple(sorted(every, key=lambda block: block.name.encode()))

    @cached_property
    def places(self) -> Mapping[str, tuple[int, Block]]:
        """Offset of each tensor, in bytes after the header, and its block, by name."""
        begins = accumulate((ITEM_BYTES * block.entries for block in self.blocks), initial=0)
        return {block.name: (begin, block) for begin, block in zip(begins, self.blocks, strict=False)}


def own_block(parameter: str) -> str:
    """Return the name of the tensor with a parameter that is not merged."""
    return f"own:{parameter}"


def added_block(parameter: str) -> str:
    """Return the name of the tensor with a parameter's rows of added tokens."""
    return f"added:{parameter}"


def frozen_block(module: str) -> str:
    """Return the name of the tensor with a module's matrix A."""
    return f"frozen:{module}"
