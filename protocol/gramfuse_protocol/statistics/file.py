"""Statistics files, for silos without a network and for publishers of fine-tuned models.

A statistics file is a safetensors file whose bytes are determined by its content; docs/statistics-format.md specifies
them. A reader recomputes the header and compares, so a truncated, edited or differently assembled file is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from gramfuse_protocol.arguments import check_argument, check_contribution, check_path
from gramfuse_protocol.bounds import (
    FEATURES,
    HEADER_CHARACTERS,
    LAYOUT_CHARACTERS,
    PLAN_CHARACTERS,
    check_keys,
    parse_json,
)
from gramfuse_protocol.contract.form import Block
from gramfuse_protocol.contract.layout import ITEM_BYTES, Layout
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ContributionError, RunDirectoryError, disk_is_full
from gramfuse_protocol.files import replacing
from gramfuse_protocol.statistics.about import (
    About,
    Added,
    AddedTokens,
    Origin,
    added_block,
    escaped,
    own_block,
)
from gramfuse_protocol.statistics.contribution import Contribution, check_counts
from gramfuse_protocol.text import one_line, quoted

HEADER_LIMIT = 2 * (LAYOUT_CHARACTERS + PLAN_CHARACTERS + HEADER_CHARACTERS)
"""Maximum number of bytes of a header: a layout, a plan, and two lines for each tensor."""

CHUNK = 2**20
"""Number of elements that are read at a time."""


@dataclass(frozen=True)
class StatisticsFile:
    """A checked statistics file; `gramfuse.merge` takes it like a `gramfuse.Statistics`.

    Example:
        >>> file = gramfuse.read_statistics("hospital.safetensors")
        >>> file.name, file.examples, file.block("delta:classifier.weight").shape
        ('hospital', 2, (2, 8))

    Args:
        path: path of the file.
        about: its metadata.
        start: offset of the tensor data in bytes.
        sha256: its verified digest.
    """

    path: Path
    about: About
    start: int
    sha256: str

    @property
    def name(self) -> str:
        """Name of the silo or model."""
        return self.about.name

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return self.about.examples

    @property
    def tokens(self) -> Mapping[str, int]:
        """Number of token rows by group."""
        return self.about.tokens

    def block(self, name: str) -> NDArray[np.float32]:
        """Read one tensor, float32.

        Raises:
            ContributionError: if the file was truncated after it was checked.
        """
        begin, block = self.about.places[name]
        values = np.fromfile(self.path, "<f4", block.entries, offset=self.start + begin)
        if values.size != block.entries:
            raise ContributionError(f"{self.path}: tensor {name!r} is truncated; the file changed while in use")
        return values.reshape(block.shape)

    def own(self) -> dict[str, NDArray[np.float32]]:
        """Read the parameters that are not merged, by name."""
        return {name: self.block(own_block(name)) for name in self.about.own}

    @cached_property
    def added(self) -> tuple[str, ...]:
        """The tokens that the model has and its base does not."""
        return tuple(json.loads(f'"{text}"') for text in self.about.added.tokens) if self.about.added else ()

    def rows(self, parameter: str) -> NDArray[np.float32] | None:
        """Read a parameter's or buffer's rows of added tokens, float32 (tokens, …); None if it has none."""
        has_rows = self.about.added is not None and parameter in self.about.added.rows
        return self.block(added_block(parameter)) if has_rows else None


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
    """Write a statistics file atomically; only its owner can read it.

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
        statistics: the result of `gramfuse.collect_statistics`.
        own: parameters that are not merged, float32, by name.
        added: tokens that the base does not have, with their rows.
        name, base, task, layout, head, plan: see `About`.

    Returns:
        The file's digest.

    Raises:
        ContributionError: if an argument has the wrong type, or a tensor does not fit the layout or is not finite;
            names the argument or tensor.
        RunDirectoryError: if the file exists already, or cannot be written.
    """
    check_path("write_statistics: path", path)
    for key, value, kind in (("base", base, Origin), ("task", task, Task), ("layout", layout, Layout)):
        check_argument(f"write_statistics: {key}", value, kind, f"a gramfuse.{kind.__name__}", ContributionError)
    check_contribution("write_statistics: statistics", statistics)
    path, own = Path(path), own or {}
    if path.exists():
        raise RunDirectoryError(f"{path} exists already; choose another name or remove it")
    check_counts(layout, statistics.examples, statistics.tokens, str(path))
    about = About(
        name=name,
        base=base,
        task=task,
        layout=layout,
        examples=statistics.examples,
        tokens=statistics.tokens,
        head=tuple(sorted(head)),
        own={parameter: array.shape for parameter, array in own.items()},
        added=_added(path, added),
        plan=plan,
        made_by=importlib.metadata.version("gramfuse"),
    )
    kept = {own_block(parameter): array for parameter, array in own.items()}
    kept |= {added_block(parameter): array for parameter, array in (added.rows if added else {}).items()}
    return _write(path, about, lambda: _tensors(path, about, statistics, kept))


def _write(path: Path, about: About, tensors: Callable[[], Iterator[NDArray[np.float32]]]) -> str:
    """Write a file and return its digest.

    Args:
        tensors: yields the tensors in the file's order; called twice, for the digest and for the file.
    """
    text = about.model_dump_json(by_alias=True)
    hasher = hashlib.sha256(text.encode())
    for array in tensors():
        hasher.update(array.data)
    sha256 = hasher.hexdigest()
    header = _header(text, sha256, about.blocks)
    try:
        with replacing(path, private=True) as temporary, temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in tensors():
                file.write(array.data)
    except OSError as error:
        reason = "no space left on the disk; make room" if disk_is_full(error) else str(error)
        raise RunDirectoryError(f"{path}: cannot be written: {reason}") from None
    return sha256


def _tensors(
    path: Path, about: About, statistics: Contribution, kept: Mapping[str, NDArray[Any]]
) -> Iterator[NDArray[np.float32]]:
    """Yield and check a file's tensors, in the file's order.

    Args:
        kept: tensors that are not statistics, by block name.

    Raises:
        ContributionError: if a tensor does not fit the layout or is not finite.
    """
    for block in about.blocks:
        array = kept[block.name] if block.name in kept else statistics.block(block.name)
        if array.dtype != np.float32 or array.shape != block.shape:
            raise ContributionError(
                f"{path}: tensor {block.name!r} is {array.dtype} {array.shape}, expected float32 {block.shape}"
            )
        _check_finite(path, block, array.size - int(np.count_nonzero(np.isfinite(array))))
        yield np.ascontiguousarray(array, "<f4")


def _added(path: Path, added: AddedTokens | None) -> Added | None:
    if added is None:
        return None
    shapes = {parameter: array.shape for parameter, array in added.rows.items()}
    try:
        return Added(tokens=tuple(map(escaped, added.tokens)), rows=shapes)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise ContributionError(f"{path}: added tokens cannot be written: {one_line(problem['msg'], 1000)}") from None


def read_statistics(path: Path | str) -> StatisticsFile:
    """Read and check a statistics file; only the measured values themselves cannot be verified.

    Example:
        >>> gramfuse.read_statistics("hospital.safetensors").examples
        2

    Raises:
        ContributionError: if the file is not exactly what `write_statistics` writes (names the file, and the tensor if
            there is one), or if the argument is not a path.
    """
    check_path("read_statistics: path", path)
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ContributionError(
                    f"{path}: is not a statistics file, or is truncated: its header claims {length:,} bytes, but the "
                    f"file has {size:,}"
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
                    + ("it is truncated; copy it again" if size < expected else "there is extra data at its end")
                )
            check_counts(about.layout, about.examples, about.tokens, str(path))
            hasher = hashlib.sha256(text.encode())
            bad_values = []
            for block in about.blocks:
                bad = 0
                for first in range(0, block.entries, CHUNK):
                    values = np.fromfile(file, "<f4", min(CHUNK, block.entries - first))
                    hasher.update(values.data)
                    bad += values.size - int(np.count_nonzero(np.isfinite(values)))
                bad_values.append((block, bad))
    except OSError as error:
        raise ContributionError(f"{path}: cannot be read: {error.strerror or error}") from None
    if hasher.hexdigest() != sha256:
        raise ContributionError(
            f"{path}: was changed after it was written: its SHA-256 does not match the one in its header; copy it "
            "again, or measure again"
        )
    for block, bad in bad_values:
        _check_finite(path, block, bad)
    return StatisticsFile(path, about, start, sha256)


def _header(text: str, sha256: str, blocks: tuple[Block, ...]) -> bytes:
    """Return the header that these tensors must have, padded with spaces to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"gramfuse": text, "sha256": sha256}}
    start = 0
    for block in blocks:
        stop = start + ITEM_BYTES * block.entries
        header[block.name] = {"dtype": "F32", "shape": list(block.shape), "data_offsets": [start, stop]}
        start = stop
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % 8)


def _metadata(path: Path, header: bytes) -> tuple[str, str]:
    """Return the metadata document and the digest in a header."""
    try:
        metadata = parse_json(header, HEADER_LIMIT, FEATURES)["__metadata__"]
        text, sha256 = metadata["gramfuse"], metadata["sha256"]
    except (ValueError, KeyError, TypeError):
        text = sha256 = None
    if not isinstance(text, str) or not isinstance(sha256, str) or any("\ud800" <= c <= "\udfff" for c in text):
        raise ContributionError(
            f"{path}: is not a statistics file: its header has no gramfuse metadata; make one with: gramfuse measure"
        )
    return text, sha256


def _about(path: Path, text: str) -> About:
    try:
        document = parse_json(text, HEADER_LIMIT, FEATURES)
        version = document.get("version", 1) if isinstance(document, dict) else 1
        if type(version) is not int or version != 1:
            raise ContributionError(
                f"{path}: has format version {repr(version)[:50]}, but this gramfuse reads version 1; use the gramfuse "
                "that wrote it, or measure again"
            )
        check_keys(document, About)
        return About.model_validate_json(text, by_alias=True, by_name=False)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        key = quoted(".".join(map(str, problem["loc"])) or "the document")
        raise ContributionError(f"{path}: its metadata is invalid: {key}: {one_line(problem['msg'], 1000)}") from None
    except ValueError as error:
        raise ContributionError(f"{path}: its metadata is invalid: {one_line(str(error), 1000)}") from None


def _check_header(path: Path, header: bytes, text: str, sha256: str, blocks: tuple[Block, ...]) -> None:
    expected = _header(text, sha256, blocks)
    if header == expected:
        return
    actual, wanted = json.loads(header), json.loads(expected)
    for name in sorted(actual.keys() | wanted.keys()):
        if actual.get(name) != wanted.get(name):
            raise ContributionError(
                f"{path}: tensor {quoted(name)} is {_entry_text(actual.get(name), 'missing')}, but the layout in the "
                f"file expects {_entry_text(wanted.get(name), 'no such tensor')}; measure again"
            )
    raise ContributionError(f"{path}: its header differs from what gramfuse writes; do not edit it; measure again")


def _entry_text(entry: Any, absent: str) -> str:
    return absent if entry is None else json.dumps(entry)[:200]


def _check_finite(path: Path, block: Block, bad: int) -> None:
    if bad:
        raise ContributionError(
            f"{path}: tensor {block.name!r} has {bad} NaN or infinite values out of {block.entries}; training diverged"
        )
