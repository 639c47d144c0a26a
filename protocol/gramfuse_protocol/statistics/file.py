"""Statistics as a file: for silos without a network, and for whoever publishes a fine-tuned model.

It is a safetensors file whose bytes follow from what it says: docs/statistics-format.md has them one by one. A reader
makes the header anew and compares, so a file that was cut, edited or put together otherwise is refused as a whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationError, model_validator

from gramfuse_protocol.bounds import (
    FEATURES,
    HEADER_CHARACTERS,
    LAYOUT_CHARACTERS,
    PLAN_CHARACTERS,
    TENSORS,
    VALUES,
    Many,
    Title,
    check_keys,
    parse_json,
)
from gramfuse_protocol.contract.layout import ITEM_BYTES, Block, Layout, Positive, Shape
from gramfuse_protocol.contract.plan import BaseName, Commit, Name, Sha256
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.documents import Section
from gramfuse_protocol.errors import ContributionError, RunDirectoryError, disk_is_full
from gramfuse_protocol.files import replacing
from gramfuse_protocol.statistics.contribution import Contribution, check_counts
from gramfuse_protocol.text import Word, one_line, quoted

HEADER_LIMIT = 2 * (LAYOUT_CHARACTERS + PLAN_CHARACTERS + HEADER_CHARACTERS)
"""Most bytes of a header, and of the document in it: a layout, a plan, and two lines for each tensor."""

TOKEN = 4096
"""Most characters of an added token, as the document has it."""

CHUNK = 2**20
"""Elements that are read at a time."""


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


def _escaped(token: str) -> str:
    """Return a token as JSON has it in ASCII, without the quotes."""
    return json.dumps(token)[1:-1]


def _is_escaped(text: str) -> str:
    token = json.loads(f'"{text}"')
    if not token or _escaped(token) != text or any("\ud800" <= character <= "\udfff" for character in token):
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


@dataclass(frozen=True)
class StatisticsFile:
    """A statistics file that was checked: a `gramfuse_protocol.statistics.contribution.Contribution`.

    Example:
        >>> file = gramfuse.read_statistics("hospital.safetensors")
        >>> file.name, file.examples, file.block("delta:classifier.weight").shape
        ('hospital', 2, (2, 8))

    Args:
        path: of the file.
        about: what it says beside its tensors.
        start: byte at which its data begin.
        sha256: what it says its digest is, and is.
    """

    path: Path
    about: About
    start: int
    sha256: str

    @property
    def name(self) -> str:
        """Of the silo or model."""
        return self.about.name

    @property
    def examples(self) -> int:
        """Training examples."""
        return self.about.examples

    @property
    def tokens(self) -> Mapping[str, int]:
        """Token rows by group."""
        return self.about.tokens

    def block(self, name: str) -> NDArray[np.float32]:
        """Read one tensor, float32 in its shape.

        Raises:
            ContributionError: if the file is shorter than it was when it was checked.
        """
        begin, block = self.about.places[name]
        values = np.fromfile(self.path, "<f4", block.entries, offset=self.start + begin)
        if values.size != block.entries:
            raise ContributionError(f"{self.path}: tensor {name!r} is cut off; the file changed while in use")
        return values.reshape(block.shape)

    def own(self) -> dict[str, NDArray[np.float32]]:
        """Read the parameters that are not merged, by name."""
        return {name: self.block(own_block(name)) for name in self.about.own}

    @cached_property
    def added(self) -> tuple[str, ...]:
        """Tokens that the model has and its base has not."""
        return tuple(json.loads(f'"{text}"') for text in self.about.added.tokens) if self.about.added else ()

    def rows(self, parameter: str) -> NDArray[np.float32] | None:
        """Read the rows of added tokens that a parameter or buffer has, float32 (tokens, …); None if it has none."""
        there = self.about.added is not None and parameter in self.about.added.rows
        return self.block(added_block(parameter)) if there else None


def own_block(parameter: str) -> str:
    """Name of the tensor that holds a parameter that is not merged."""
    return f"own:{parameter}"


def added_block(parameter: str) -> str:
    """Name of the tensor that holds the rows of added tokens that a parameter has."""
    return f"added:{parameter}"


def write_statistics(
    path: Path | str,
    statistics: Contribution,
    *,
    name: str,
    base: Origin,
    task: Task,
    layout: Layout,
    head: Iterable[str] = (),
    own: Mapping[str, NDArray[Any]] | None = None,
    added: AddedTokens | None = None,
    plan: str = "",
) -> str:
    """Write a statistics file, which only its owner can read. It is there whole or not at all.

    Example:
        >>> digest = gramfuse.write_statistics(
        ...     "hospital.safetensors",
        ...     gramfuse.collect_statistics(tuned, [batch], layout, base=start, examples=2),
        ...     name="hospital",
        ...     base=gramfuse.Origin(
        ...         name="./bert",
        ...         weights=gramfuse.tensor_digests(base),
        ...         config=gramfuse.config_digest(base),
        ...         processor=gramfuse.processor_digest(tokenizer),
        ...     ),
        ...     task=gramfuse.Task(task="classification", labels=("no", "yes")),
        ...     layout=layout,
        ... )
        >>> digest == gramfuse.read_statistics("hospital.safetensors").sha256
        True

    Args:
        path: must not exist.
        statistics: as `gramfuse_client.collect_statistics` returns them.
        own: parameters that are not merged, float32, by name.
        added: tokens beside those of the base, with their rows, if there are any.
        name, base, task, layout, head, plan: as `About` has them.

    Returns:
        The file's digest.

    Raises:
        ContributionError: naming the tensor, if one does not fit the layout or is not finite.
        RunDirectoryError: if the file exists already, or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise RunDirectoryError(f"{path} exists already; choose another name, or remove it")
    check_counts(layout, statistics.examples, statistics.tokens, str(path))
    about = About(
        name=name,
        base=base,
        task=task,
        layout=layout,
        examples=statistics.examples,
        tokens=statistics.tokens,
        head=tuple(sorted(head)),
        own={parameter: array.shape for parameter, array in (own or {}).items()},
        added=_described(path, added),
        plan=plan,
        made_by=importlib.metadata.version("gramfuse"),
    )
    kept = {own_block(parameter): array for parameter, array in (own or {}).items()}
    kept |= {added_block(parameter): array for parameter, array in (added.rows if added else {}).items()}
    text = about.model_dump_json(by_alias=True)
    hasher = hashlib.sha256(text.encode())
    for array in _tensors(path, about, statistics, kept):
        hasher.update(array.data)
    sha256 = hasher.hexdigest()
    header = _header(text, sha256, about.blocks)
    try:
        with replacing(path, private=True) as temporary, temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in _tensors(path, about, statistics, kept):
                file.write(array.data)
    except OSError as error:
        what = "no space left on the disk; make room" if disk_is_full(error) else str(error)
        raise RunDirectoryError(f"{path}: cannot be written: {what}") from None
    return sha256


def _tensors(
    path: Path, about: About, statistics: Contribution, kept: Mapping[str, NDArray[Any]]
) -> Iterator[NDArray[np.float32]]:
    """Yield a file's tensors in its order, each checked.

    Args:
        kept: those that are not statistics, by block.

    Raises:
        ContributionError: naming the tensor, if one does not fit the layout or is not finite.
    """
    for block in about.blocks:
        array = kept[block.name] if block.name in kept else statistics.block(block.name)
        if array.dtype != np.float32 or array.shape != block.shape:
            raise ContributionError(
                f"{path}: tensor {block.name!r} is {array.dtype} {array.shape}, expected float32 {block.shape}"
            )
        _check_finite(path, block, array.size - int(np.count_nonzero(np.isfinite(array))))
        yield np.ascontiguousarray(array, "<f4")


def _described(path: Path, added: AddedTokens | None) -> Added | None:
    if added is None:
        return None
    shapes = {parameter: array.shape for parameter, array in added.rows.items()}
    try:
        return Added(tokens=tuple(map(_escaped, added.tokens)), rows=shapes)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise ContributionError(f"{path}: added tokens cannot be written: {one_line(problem['msg'], 1000)}") from None


def read_statistics(path: Path | str) -> StatisticsFile:
    """Read a statistics file and check all of it, but for what it was measured on.

    Example:
        >>> gramfuse.read_statistics("hospital.safetensors").examples
        2

    Raises:
        ContributionError: naming the file, and the tensor where there is one, if it is not exactly what
            `write_statistics` makes.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ContributionError(
                    f"{path}: is no statistics file, or was cut off: its header would have {length:,} bytes, of "
                    f"{size:,} in all"
                )
            header = file.read(length)
            text, sha256 = _metadata(path, header)
            about = _about(path, text)
            _check_header(path, header, text, sha256, about.blocks)
            start = 8 + length
            expected = start + sum(ITEM_BYTES * block.entries for block in about.blocks)
            if size != expected:
                raise ContributionError(
                    f"{path}: has {size:,} bytes, expected {expected:,}: "
                    + ("it was cut off; copy it again" if size < expected else "something was added at its end")
                )
            check_counts(about.layout, about.examples, about.tokens, str(path))
            hasher = hashlib.sha256(text.encode())
            unsound = []
            for block in about.blocks:
                bad = 0
                for first in range(0, block.entries, CHUNK):
                    values = np.fromfile(file, "<f4", min(CHUNK, block.entries - first))
                    hasher.update(values.data)
                    bad += values.size - int(np.count_nonzero(np.isfinite(values)))
                unsound.append((block, bad))
    except OSError as error:
        raise ContributionError(f"{path}: cannot be read: {error.strerror or error}") from None
    if hasher.hexdigest() != sha256:
        raise ContributionError(
            f"{path}: was changed after it was written: its SHA-256 is not the one that it says; copy it again, or "
            "measure again"
        )
    for block, bad in unsound:
        _check_finite(path, block, bad)
    return StatisticsFile(path, about, start, sha256)


def _header(text: str, sha256: str, blocks: tuple[Block, ...]) -> bytes:
    """Return the one header that these tensors have, padded with spaces to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"gramfuse": text, "sha256": sha256}}
    start = 0
    for block in blocks:
        stop = start + ITEM_BYTES * block.entries
        header[block.name] = {"dtype": "F32", "shape": list(block.shape), "data_offsets": [start, stop]}
        start = stop
    written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return written + b" " * (-len(written) % 8)


def _metadata(path: Path, header: bytes) -> tuple[str, str]:
    """Return the document and the digest that a header holds."""
    try:
        metadata = parse_json(header, HEADER_LIMIT, FEATURES)["__metadata__"]
        text, sha256 = metadata["gramfuse"], metadata["sha256"]
    except (ValueError, KeyError, TypeError):
        text = sha256 = None
    if not isinstance(text, str) or not isinstance(sha256, str) or any("\ud800" <= c <= "\udfff" for c in text):
        raise ContributionError(
            f"{path}: is no statistics file: its header holds no document of gramfuse; make one with: gramfuse measure"
        )
    return text, sha256


def _about(path: Path, text: str) -> About:
    try:
        document = parse_json(text, HEADER_LIMIT, FEATURES)
        version = document.get("version", 1) if isinstance(document, dict) else 1
        if type(version) is not int or version != 1:
            raise ContributionError(
                f"{path}: is of version {repr(version)[:50]} of the format, and this gramfuse reads version 1; "
                "use the gramfuse that wrote it, or measure again"
            )
        check_keys(document, About)
        return About.model_validate_json(text, by_alias=True, by_name=False)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        key = quoted(".".join(map(str, problem["loc"])) or "the document")
        raise ContributionError(
            f"{path}: its document does not hold together: {key}: {one_line(problem['msg'], 1000)}"
        ) from None
    except ValueError as error:
        raise ContributionError(f"{path}: its document does not hold together: {one_line(str(error), 1000)}") from None


def _check_header(path: Path, header: bytes, text: str, sha256: str, blocks: tuple[Block, ...]) -> None:
    expected = _header(text, sha256, blocks)
    if header == expected:
        return
    there, wanted = json.loads(header), json.loads(expected)
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise ContributionError(
                f"{path}: tensor {quoted(name)} is {_told(there.get(name))}, the layout in the file expects "
                f"{_told(wanted.get(name))}; measure again"
            )
    raise ContributionError(f"{path}: its header is not as gramfuse writes it; measure again, and edit nothing")


def _told(entry: Any) -> str:
    return "not there" if entry is None else json.dumps(entry)[:200]


def _check_finite(path: Path, block: Block, bad: int) -> None:
    if bad:
        raise ContributionError(
            f"{path}: tensor {block.name!r} holds {bad} values that are NaN or infinite out of {block.entries}; "
            "training diverged there"
        )
