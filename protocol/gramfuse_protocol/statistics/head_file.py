"""Head files: the sums that a head is fitted from, of one silo without a network.

docs/statistics-format.md specifies their bytes.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gramfuse_protocol.bounds import Title
from gramfuse_protocol.contract.form import EXPONENT, Block
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.layout import Positive
from gramfuse_protocol.contract.plan_sections import Name
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.documents import Section
from gramfuse_protocol.errors import ContributionError, RunDirectoryError
from gramfuse_protocol.statistics.about import Origin
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_protocol.statistics.sealed_file import Kind, check_finite
from gramfuse_protocol.tasks.registry import TaskKind, kind_of
from gramfuse_protocol.text import Word, quoted

MOST_FEATURES = 2**14
"""Maximum number of features: sums of so many take 1 GB."""

ROUNDING = 1e-6
"""How far sums may be off each other, relative to the largest value that they can have."""


FIT = "discriminant"
"""How heads are fitted from files."""


def fitted_by_files(kind: TaskKind) -> bool:
    """Return whether heads for a kind of task are fitted from files: if each example has exactly one label."""
    return kind.exclusive and kind.fit == FIT


class AboutHead(Section):
    """The metadata of a head file.

    Args:
        name: name of the silo.
        model: the model whose features were summed; its `weights` leave out the head's last layer, which is replaced.
        task: what the head is for.
        weight: name of the last layer's weight.
        bias: name of its bias; None if it has none.
        features: number of features that enter the layer.
        least: minimum number of examples of a label; labels with fewer were left out.
        examples: examples in the sums, ≥ 1.
        made_by: version of gramfuse that wrote the file.
    """

    version: Literal[1] = 1
    name: Name
    model: Origin
    task: Task
    weight: Word
    bias: Word | None
    features: Annotated[int, Field(ge=1, le=MOST_FEATURES)]
    least: Positive
    examples: Positive
    made_by: Title

    @model_validator(mode="after")
    def _has_a_closed_form(self) -> AboutHead:
        if not fitted_by_files(kind_of(self.task)):
            raise ValueError(f"a head for task {self.task.task!r} cannot be fitted in closed form")
        return self

    @cached_property
    def head(self) -> HeadLayout:
        """The form of the sums; without scales, which only secure sums need, and which differ between machines."""
        return HeadLayout(
            weight=self.weight,
            bias=self.bias,
            features=self.features,
            fit=FIT,
            outputs=kind_of(self.task).outputs(self.task),
            columns=kind_of(self.task).columns(self.task),
            exponents=(0,) * self.features,
        )

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All tensors of the file, sorted by the bytes of their names, as in the file."""
        return tuple(sorted(self.head.blocks, key=lambda block: block.name.encode()))


HEAD = Kind("gramfuse-head", AboutHead, "float64")


@dataclass(frozen=True, eq=False)
class HeadFile:
    """A checked head file.

    Args:
        path: path of the file.
        about: its metadata.
        sums: its sums.
        sha256: its verified digest.
    """

    path: Path
    about: AboutHead
    sums: HeadSums
    sha256: str

    @property
    def name(self) -> str:
        """Name of the silo."""
        return self.about.name


def write_head(
    path: Path, sums: HeadSums, *, name: str, model: Origin, task: Task, head: HeadLayout, least: int
) -> str:
    """Write a head file atomically; only its owner can read it.

    Args:
        path: must not exist.
        sums: the sums over the silo's examples.
        head: the layer to fit.
        name, model, task, least: see `AboutHead`; `model.weights` may have the head's last layer.

    Returns:
        The file's digest.

    Raises:
        ContributionError: naming the tensor, if the sums do not fit the layer or are not finite; or if it has too many
            features.
        RunDirectoryError: if the file exists already, or cannot be written.
    """
    if path.exists():
        raise RunDirectoryError(f"{path} exists already; choose another name or remove it")
    if head.features > MOST_FEATURES:
        raise ContributionError(f"{head.features:,} features enter the head; a head file has {MOST_FEATURES:,} at most")
    weights = {key: sha256 for key, sha256 in model.weights.items() if key not in head.tensors}
    about = AboutHead(
        name=name,
        model=model.model_copy(update={"weights": weights}),
        task=task,
        weight=head.weight,
        bias=head.bias,
        features=head.features,
        least=least,
        examples=round(sums.examples),
        made_by=importlib.metadata.version("gramfuse"),
    )
    arrays = sums.blocks(about.head)

    def tensors() -> Iterator[NDArray[Any]]:
        for block in about.blocks:
            array = arrays[block.name]
            check_finite(path, block, array.size - int(np.count_nonzero(np.isfinite(array))))
            yield array

    return HEAD.write(path, about, tensors)


def read_head(path: Path) -> HeadFile:
    """Read and check a head file; only the measured values themselves cannot be verified.

    Raises:
        ContributionError: naming the file, if it is not what `write_head` writes, or its sums contradict each other.
    """
    sealed = HEAD.read(path)
    about = sealed.about
    arrays = {}
    try:
        with path.open("rb") as file:
            file.seek(sealed.start)
            for block in about.blocks:
                arrays[block.name] = np.fromfile(file, HEAD.stored, block.entries).reshape(block.shape)
    except (OSError, ValueError) as error:
        raise ContributionError(f"{path}: cannot be read again: {error}; the file changed while in use") from None
    sums = HeadSums.read(about.head, arrays.__getitem__)
    _check_sums(path, about, sums)
    return HeadFile(path, about, sums, sealed.sha256)


def _check_sums(path: Path, about: AboutHead, sums: HeadSums) -> None:
    """Check that the sums of examples with one label each do not contradict each other or the document."""
    counts, most = sums.counts, about.examples
    odd = np.flatnonzero((counts != np.round(counts)) | (counts > most) | ((counts != 0) & (counts < about.least)))
    if odd.size:
        label = quoted(about.task.labels[odd[0]])
        raise ContributionError(
            f"{path}: has {counts[odd[0]]:g} of {most} examples with label {label}, expected a whole number, 0 or at "
            f"least {about.least}; measure again"
        )
    if not counts.sum() == sums.examples == most:
        raise ContributionError(
            f"{path}: its labels have {counts.sum():g} examples, its sums {sums.examples:g} and its metadata {most}; "
            "expected the same number three times; measure again"
        )
    squares, first = sums.second.diagonal()[:-1], sums.first[:-1]
    if not ((squares >= 0) & (squares <= most * 4.0**EXPONENT)).all():
        raise ContributionError(f"{path}: a feature has a mean square below 0 or above 2^{2 * EXPONENT}; measure again")
    size = (1 + ROUNDING) * np.sqrt(squares)
    possible = (np.abs(sums.second[:-1, :-1]) <= np.outer(size, size)).all()
    possible = possible and (np.abs(first) <= np.outer(size, np.sqrt(counts))).all()
    off = np.abs(first.sum(axis=1) - sums.second[:-1, -1]) if possible else size
    if not possible or (off > ROUNDING * size * np.sqrt(most)).any():
        raise ContributionError(f"{path}: its sums contradict each other; measure again")
