"""Fits the head of a model to the sums in head files, instead of sums that silos send."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gramfuse_model.derive_head import load_for_head, probe_for_head
from gramfuse_model.digests import tensor_digests
from gramfuse_model.loading.auto_classes import FORMS
from gramfuse_model.loading.base_model import Base
from gramfuse_model.parameters import set_values
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.layout import ITEM_BYTES
from gramfuse_protocol.contract.who_sees_what import OF_HEAD
from gramfuse_protocol.errors import ContributionError, MergeError, ModelError
from gramfuse_protocol.statistics.head_file import HeadFile, read_head
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_protocol.text import listed, quoted
from gramfuse_server.merging.closed_form_head import Head, without_bias
from gramfuse_server.merging.collection import PINNED
from gramfuse_server.merging.head_accumulator import values_of
from gramfuse_server.merging.head_checks import check_head
from gramfuse_server.merging.head_solvers import SOLVERS
from gramfuse_server.report.merged_model import code, front_matter, usage
from gramfuse_server.report.schema import Check
from gramfuse_server.report.verdicts import describe_bad, worst
from gramfuse_server.run_directory import RunDirectory

TAGS = ("gramfuse", "federated-learning")
"""Tags of the model card."""


@dataclass(frozen=True)
class SiloOfHead:
    """A file of a fitted head.

    Args:
        sha256: of the file's content, as `gramfuse head measure` printed it.
    """

    name: str
    examples: int
    sha256: str


@dataclass(frozen=True)
class Fitted:
    """A fitted head.

    Args:
        model: the model whose features it is fitted to, as the user named it.
        tensors: names of its parameters.
        silos: the files, by name of the silo.
        examples: number of examples of each label, over all files.
        shrinkage: λ of the covariance within labels.
        checks: of the sums.
    """

    model: str
    tensors: tuple[str, ...]
    silos: tuple[SiloOfHead, ...]
    examples: Mapping[str, int]
    shrinkage: float
    checks: tuple[Check, ...]

    @property
    def absent(self) -> tuple[str, ...]:
        """Labels without an example, which the model never predicts."""
        return tuple(label for label, count in self.examples.items() if not count)

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            **asdict(self),
            "absent": list(self.absent),
            "checks": [check.model_dump(mode="json", by_alias=True) for check in self.checks],
        }


def fit_files(model: str, paths: Sequence[Path], out: Path, directory: Path, *, seen: bool = False) -> Fitted:
    """Fit the head of a model to the sums of head files together, and write the model with it.

    Args:
        model: directory, hub id or bundled name of the model that the silos measured.
        paths: of the files; their order does not matter.
        out: directory for the model; must not exist.
        directory: where relative paths of models start.
        seen: whether the model was trained on these examples.

    Raises:
        ContributionError: naming the file, if it is damaged, its sums are impossible, or it does not fit the others.
        ModelError: if the model cannot be loaded, is not the one that was measured, or its head has no closed form.
        MergeError: if the sums allow no head.
        RunDirectoryError: if `out` exists already, or cannot be written.
    """
    files = sorted((read_head(path) for path in paths), key=lambda file: file.name)
    check_together(files)
    task = files[0].about.task
    base = load_for_head(model, task, directory)
    _check_measured(files[0], model, base)
    head = _head_of(files[0], model, base)
    for file in files:
        _check_possible(file, head)
    sums = functools.reduce(operator.add, (file.sums for file in files))
    fitted = _fit(sums, head, files, seen=seen)
    report = Fitted(
        model=model,
        tensors=head.tensors,
        silos=tuple(SiloOfHead(file.name, file.about.examples, file.sha256) for file in files),
        examples={label: round(count) for label, count in zip(task.labels, sums.counts, strict=True)},
        shrinkage=fitted.shrinkage,
        checks=tuple(check_head(sums, head, len(files), secure=False)),
    )
    set_values(base.model, {name: value.astype(np.float32) for name, value in values_of(fitted, head).items()})
    needed = ITEM_BYTES * sum(parameter.numel() for parameter in base.model.parameters()) + 20 * 2**20
    with RunDirectory(out, needed) as run:
        with run.writing():
            base.model.save_pretrained(run.partial, safe_serialization=True)
            base.tokenizer.save_pretrained(run.partial)
            (run.partial / "README.md").write_text(_card(report, files), encoding="utf-8")
        run.finish()
    return report


def check_together(files: Sequence[HeadFile]) -> None:
    """Check that head files can be added up.

    Raises:
        ContributionError: naming two files and what differs.
    """
    first = files[0]
    for position, file in enumerate(files):
        for other in files[:position]:
            if _same_content(file, other):
                raise ContributionError(
                    f"{other.path} and {file.path} have the same sums, so the same examples would count twice; leave "
                    "one of them out"
                )
            if file.name == other.name:
                raise ContributionError(
                    f"{other.path} and {file.path} are both named {file.name!r}; leave one of them out, or measure "
                    "again with another --name"
                )
        difference = next(_differences(first, file), None)
        if difference is not None:
            raise ContributionError(f"{first.path} and {file.path} do not fit each other: {difference}")


SAME = 1e-5
"""Relative difference of the sums of the same examples in other batches: rounding."""


def _same_content(one: HeadFile, other: HeadFile) -> bool:
    pairs = (one.sums.second, other.sums.second), (one.sums.first, other.sums.first)
    return one.about.examples == other.about.examples and all(np.allclose(*pair, rtol=SAME, atol=0) for pair in pairs)


def _differences(one: HeadFile, other: HeadFile) -> Iterator[str]:
    """Yield why two files cannot be added up, and what to do."""
    mine, theirs = one.about, other.about
    if mine.task.labels != theirs.task.labels:
        labels = [f"{len(about.task.labels)} ({listed(about.task.labels, 5)})" for about in (mine, theirs)]
        yield f"their labels are {labels[0]} and {labels[1]}; measure both for the same labels in the same order"
    settings = [about.task.model_dump(mode="json", by_alias=True) for about in (mine, theirs)]
    for key in settings[0]:
        if settings[0][key] != settings[1][key]:
            yield (
                f"{key!r} is {settings[0][key]!r} and {settings[1][key]!r}, so their features mean different things; "
                "measure both with the same options"
            )
    for key, title in PINNED.items():
        if getattr(mine.model, key) != getattr(theirs.model, key):
            yield f"their models have different {title}; measure the same model at all silos"
    odd = _odd(mine.model.weights, theirs.model.weights)
    if odd or (mine.weight, mine.bias, mine.features) != (theirs.weight, theirs.bias, theirs.features):
        where = f"tensor {odd[0]!r} differs" if odd else "their last layers differ"
        yield (
            f"they are of different models ({quoted(mine.model.name)}, {quoted(theirs.model.name)}): {where}; measure "
            "the same model at all silos, for instance the merged one"
        )


def _odd(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return the names of tensors whose digests differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _check_measured(file: HeadFile, name: str, base: Base) -> None:
    """Raise ModelError unless a model is the one that a file was measured on."""
    about = file.about
    lead = f"{name!r} is not the model that {file.path} was measured on, which names {quoted(about.model.name)}"
    digests = {key: sha256 for key, sha256 in tensor_digests(base.model).items() if key not in about.head.tensors}
    odd = _odd(digests, about.model.weights)
    if odd:
        new = f"{odd[0]!r} (not in its files, but random: use the version of torch that measured)"
        which = new if odd[0] in base.fresh else repr(odd[0])
        raise ModelError(f"{lead}: {len(odd)} tensors differ, the first is {which}; pass the right model")
    for key, title in PINNED.items():
        if getattr(base.pins, key) != getattr(about.model, key):
            raise ModelError(
                f"{lead}: their {title} differ; pass the right model, and use the version of transformers that "
                "measured the file"
            )


def _head_of(file: HeadFile, name: str, base: Base) -> HeadLayout:
    """Return the layout of a model's head; raise ContributionError if a file's is another."""
    about = file.about
    head = probe_for_head(name, base, about.task)
    if (head.weight, head.bias, head.features) != (about.weight, about.bias, about.features):
        raise ContributionError(
            f"{file.path}: fits {about.weight!r} of {about.features} features, but the last layer of {name!r} is "
            f"{head.weight!r} of {head.features}; measure again"
        )
    return head


def _check_possible(file: HeadFile, head: HeadLayout) -> None:
    """Raise ContributionError if no examples can have a file's sums."""
    checks = check_head(file.sums, head, 1, secure=False)
    if worst(checks) == "bad":
        raise ContributionError(
            f"{file.path}: {describe_bad(checks)}: no examples have such sums; measure again, or leave the file out"
        )


def _fit(sums: HeadSums, head: HeadLayout, files: Sequence[HeadFile], *, seen: bool) -> Head:
    try:
        fitted = SOLVERS[head.fit].fit(sums, start=None, seen=seen)
    except MergeError as error:
        raise MergeError(f"{', '.join(str(file.path) for file in files)}: {error}") from None
    return without_bias(fitted, sums, relative=True) if head.bias is None else fitted


def _card(report: Fitted, files: Sequence[HeadFile]) -> str:
    about = files[0].about
    form = FORMS[about.task.task]
    layer = " and ".join(map(code, report.tensors))
    absent = ", ".join(map(code, report.absent))
    return "\n".join(
        [
            *front_matter(about.model.name, form, TAGS),
            "",
            "# Model with a fitted head",
            "",
            f"{code(about.model.name)} with another head: {layer} are fitted with gramfuse in closed form, as a linear "
            f"discriminant with a shrunk covariance (λ = {report.shrinkage:.3g}), to the model's features of the "
            "silos' training examples. All else is as it was. The silos' data was not pooled; each gave a file "
            f"with sums over its examples {OF_HEAD}.",
            "",
            "| silo | examples | SHA-256 of its head file |",
            "|---|---|---|",
            *(f"| {silo.name} | {silo.examples:,} | `{silo.sha256}` |" for silo in report.silos),
            "",
            *([f"No silo has examples of {absent}: the model never predicts them.", ""] if absent else []),
            *usage(form),
        ]
    )
