"""Statistics files, for silos without a network and for publishers of fine-tuned models.

docs/statistics-format.md specifies their bytes.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from gramfuse_protocol.arguments import check_argument, check_contribution, check_path
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ContributionError, RunDirectoryError
from gramfuse_protocol.statistics.about import (
    About,
    Added,
    AddedTokens,
    FrozenOfAdapter,
    Origin,
    added_block,
    escaped,
    frozen_block,
    own_block,
)
from gramfuse_protocol.statistics.contribution import Contribution, check_counts
from gramfuse_protocol.statistics.sealed_file import Kind, check_finite
from gramfuse_protocol.text import one_line

STATISTICS = Kind("gramfuse", About, "float32")


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

    def frozen(self) -> dict[str, NDArray[np.float32]]:
        """Read an adapter's matrices A by module, float32 (rank, d_in); empty if it is not an adapter's file."""
        return {
            name: self.block(frozen_block(name)) for name in (self.about.adapter.frozen if self.about.adapter else ())
        }

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
    adapter: FrozenOfAdapter | None = None,
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
        adapter: the matrices A of an adapter; None for a whole model.
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
        adapter=None if adapter is None else adapter.about,
        plan=plan,
        made_by=importlib.metadata.version("gramfuse"),
    )
    kept = {own_block(parameter): array for parameter, array in own.items()}
    kept |= {frozen_block(module): array for module, array in (adapter.matrices if adapter else {}).items()}
    kept |= {added_block(parameter): array for parameter, array in (added.rows if added else {}).items()}
    return STATISTICS.write(path, about, lambda: _tensors(path, about, statistics, kept))


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
        check_finite(path, block, array.size - int(np.count_nonzero(np.isfinite(array))))
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
    sealed = STATISTICS.read(path)
    check_counts(sealed.about.layout, sealed.about.examples, sealed.about.tokens, str(path))
    return StatisticsFile(path, sealed.about, sealed.start, sealed.sha256)
