"""What a statistics file says of itself, beside its tensors."""

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
    TENSORS,
    VALUES,
    Many,
    Title,
)
from gramfuse_protocol.contract.layout import ITEM_BYTES, Block, Layout, Positive, Shape
from gramfuse_protocol.contract.plan_sections import BaseName, Commit, Name, Sha256
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.documents import Section
from gramfuse_protocol.text import Word, quoted

TOKEN = 4096
"""Most characters of an added token, as the document has it."""


class Origin(Section):
    """The base model that differences are taken from.

    Example:
        >>> digests = gramfuse.config_digest(base), gramfuse.processor_digest(tokenizer)
        >>> weights = gramfuse.tensor_digests(base)
        >>> gramfuse.Origin(name="./bert", weights=weights, config=digests[0], processor=digests[1]).revision is None
        True

    Args:
        name: hub id, bundled name, or `./<last part>` of a directory.
        revision: commit of the hub repository that it was loaded from; None if it was a directory.
        weights: SHA-256 of each parameter and persistent buffer, as
            `gramfuse_model.digests.tensor_digests` has them.
        config: `gramfuse_model.digests.config_digest`.
        processor: `gramfuse_model.digests.processor_digest` of its tokenizer or image processor.
    """

    name: BaseName
    revision: Commit | None = None
    weights: Annotated[Mapping[Word, Sha256], Field(min_length=1, max_length=2 * TENSORS)]
    config: Sha256
    processor: Sha256


def escaped(token: str) -> str:
    """Return a token as JSON has it in ASCII, without the quotes."""
    return json.dumps(token)[1:-1]


def _is_escaped(text: str) -> str:
    token = json.loads(f'"{text}"')
    if not token or escaped(token) != text or any("\ud800" <= character <= "\udfff" for character in token):
        raise ValueError(f"{quoted(text)} is no token as JSON has it in ASCII")
    return text


class Added(Section):
    """Tokens that were added to a model, and the shapes of their rows.

    Example:
        >>> gramfuse.Added(tokens=("<ticket>",), rows={"bert.embeddings.word_embeddings.weight": (1, 8)}).tokens
        ('<ticket>',)

    Args:
        tokens: as JSON has them in ASCII, without the quotes: a token may be a line's end.
        rows: of each tensor that has rows for tokens; its first dimension is the tokens.
    """

    tokens: Annotated[
        Many[Annotated[str, Field(max_length=TOKEN), AfterValidator(_is_escaped)]],
        Field(min_length=1, max_length=VALUES),
    ]
    rows: Annotated[Mapping[Word, Shape], Field(min_length=1, max_length=TENSORS)]

    @model_validator(mode="after")
    def _one_row_for_each_token(self) -> Added:
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError("an added token comes twice")
        odd = next((name for name, shape in self.rows.items() if shape[:1] != (len(self.tokens),)), None)
        if odd is not None:
            raise ValueError(f"{odd!r} has not one row for each of {len(self.tokens):,} added tokens")
        return self


@dataclass(frozen=True)
class AddedTokens:
    """Tokens that a model has and its base has not.

    Example:
        >>> rows = {"bert.embeddings.word_embeddings.weight": np.zeros((2, 8), np.float32)}
        >>> gramfuse.AddedTokens(tokens=("<ticket>", "<name>"), rows=rows).tokens
        ('<ticket>', '<name>')

    Args:
        tokens: different ones.
        rows: their values, not differences, by parameter or buffer: float32, (tokens, …) with the dimension of tokens
            first.
    """

    tokens: tuple[str, ...]
    rows: Mapping[str, NDArray[np.float32]]


class About(Section):
    """What a statistics file says beside its tensors.

    Example:
        >>> gramfuse.read_statistics("hospital.safetensors").about.task.labels
        ('no', 'yes')

    Args:
        name: of the silo or model.
        base: what differences are taken from.
        task: what the model was fine-tuned for.
        layout: of the tensors.
        examples: training examples, ≥ 1.
        tokens: token rows by group.
        head: names of the parameters that belong to the task and not to the body, whether they are merged or not.
        own: shapes of the parameters that are the silo's own and are not merged.
        added: tokens that the model has beside those of the base; None if there are none.
        plan: text of the plan that the silo followed; empty if there is none.
        made_by: version of gramfuse.
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
    plan: Annotated[str, Field(max_length=PLAN_CHARACTERS)] = ""
    made_by: Title

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All tensors of the file, in its order: by the bytes of their names."""
        own = (Block(own_block(name), shape) for name, shape in self.own.items())
        added = (Block(added_block(name), shape) for name, shape in (self.added.rows if self.added else {}).items())
        return tuple(sorted((*self.layout.blocks, *own, *added), key=lambda block: block.name.encode()))

    @cached_property
    def places(self) -> Mapping[str, tuple[int, Block]]:
        """Where each tensor begins, in bytes after the header, and its block; by its name."""
        begins = accumulate((ITEM_BYTES * block.entries for block in self.blocks), initial=0)
        return {block.name: (begin, block) for begin, block in zip(begins, self.blocks, strict=False)}


def own_block(parameter: str) -> str:
    """Name of the tensor that holds a parameter that is not merged."""
    return f"own:{parameter}"


def added_block(parameter: str) -> str:
    """Name of the tensor that holds the rows of added tokens that a parameter has."""
    return f"added:{parameter}"
