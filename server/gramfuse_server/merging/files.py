"""Merges statistics files, instead of contributions that silos send."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gramfuse_model.digests import tensor_digests
from gramfuse_model.loading.auto_classes import FORMS
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.loading.zero_head import load_zero_headed, plan_for
from gramfuse_model.parameters import add_differences
from gramfuse_model.rescaling import fold
from gramfuse_protocol.contract.coverage import coverage, unchanged
from gramfuse_protocol.contract.layout import ITEM_BYTES, Layout, delta_block
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import ContributionError, ModelError
from gramfuse_protocol.statistics.file import StatisticsFile, read_statistics
from gramfuse_protocol.text import listed, quoted
from gramfuse_server.merging.accumulator import Accumulator, Merged
from gramfuse_server.merging.added_tokens import Additions
from gramfuse_server.merging.checks import check_model, check_shares, check_sums
from gramfuse_server.merging.regmean import Weighting
from gramfuse_server.report.merged_model import code, extent, front_matter, usage
from gramfuse_server.report.page.added_tokens import explain_added_tokens
from gramfuse_server.report.page.page import page
from gramfuse_server.report.schema import SCHEMA, BaseOfReport, Report, SiloOfReport
from gramfuse_server.report.studies import Studied
from gramfuse_server.report.verdicts import describe_bad, worst
from gramfuse_server.run_directory import PAGE, REPORT, RunDirectory

Heads = Literal["merged", "own"]

PINNED = {"config": "configurations", "processor": "tokenizers or image processors"}
"""Attributes with digests of a base beside those of its weights, and their names in errors."""

UNSTUDIED = Studied()


@dataclass(frozen=True)
class Settings:
    """How files are merged.

    Args:
        alpha: share of the off-diagonal to keep; None for the plan's, or 0.9 without a plan.
        weighting: None for the plan's, or `uniform` without a plan.
        weights: factor on the weight of each file in the sums, by file name; 1 if missing.
        heads: whether heads are merged, or each model keeps its own.
        base: the base model: directory, hub id or bundled name. Required: the name in a file is untrusted and is never
            loaded.
        tokenizer: directory of a tokenizer with the added tokens to keep; None for the base's, without added tokens.
    """

    alpha: float | None = None
    weighting: Weighting | None = None
    weights: Mapping[str, float] | None = None
    heads: Heads | None = None
    base: str | None = None
    tokenizer: Path | None = None


class Collection:
    """Statistics files that can be merged with each other.

    Args:
        files: individually valid, in any order.
        heads: as in `Settings`.

    Attributes:
        files: in the order of addition: the plan's roster, or sorted by name.
        plan: the plan that all files follow, if any.
        heads: whether heads are merged.
        layout: of the merge.

    Raises:
        ContributionError: naming two files and what differs, if they cannot be merged.
    """

    def __init__(self, files: Sequence[StatisticsFile], heads: Heads | None = None) -> None:
        first = files[0]
        for position, file in enumerate(files):
            for other in files[:position]:
                if file.name == other.name:
                    raise ContributionError(
                        f"{other.path} and {file.path} are both named {file.name!r}; give one of them another name "
                        "(gramfuse measure --name), or leave one out if they are the same"
                    )
            if file.about.plan != first.about.plan:
                raise ContributionError(
                    f"{first.path} and {file.path} do not follow the same plan; merge only files that were measured "
                    "under one plan, or only files that were measured without one"
                )
        self.plan = Plan.parse(first.about.plan, f"plan in {first.path}") if first.about.plan else None
        if self.plan is not None:
            if first.about.layout.digest != self.plan.merge.layout:
                raise ContributionError(f"{first.path}: its plan is locked to another layout")
            heads = "own" if self.plan.model.head == "own" else heads
        self.heads: Heads = heads or "merged"
        order = {name: place for place, name in enumerate(self.plan.names)} if self.plan else {}
        for file in files:
            if self.plan and file.name not in order:
                raise ContributionError(f"{file.path}: {file.name!r} is not a silo of its plan")
            self._check_mergeable(first, file)
        self.files = tuple(sorted(files, key=lambda file: (order.get(file.name, 0), file.name)))
        if self.plan is not None and len(files) < self.plan.minimum_survivors:
            missing = [name for name in self.plan.names if name not in {file.name for file in files}]
            raise ContributionError(
                f"the plan requires at least {self.plan.minimum_survivors} silos (privacy.minimum-survivors), but "
                f"there are {len(files)}; missing: {', '.join(missing)}"
            )
        self.layout = first.about.layout if self.heads == "merged" else self._body()

    def _check_mergeable(self, first: StatisticsFile, file: StatisticsFile) -> None:
        one, other = first.about, file.about
        both = f"{first.path} and {file.path}"
        for key, title in PINNED.items():
            if getattr(one.base, key) != getattr(other.base, key):
                raise ContributionError(
                    f"{both} have bases with different {title}, so their weights are not comparable; only models that "
                    "were fine-tuned from one base can be merged. If these were, measure all with the same --base, "
                    "including its tokenizer; otherwise, fine-tune again from one base"
                )
        task, other_task = (one.task.task, one.task.labels), (other.task.task, other.task.labels)
        if self.heads == "merged" and task != other_task:
            raise ContributionError(
                f"{both} have different {'labels' if task[0] == other_task[0] else 'tasks'}: {_task_text(*task)}; "
                f"{_task_text(*other_task)}. Use --heads own to merge only the bodies, so that each model keeps its "
                "own head; or fine-tune all for the same labels in the same order"
            )
        scales = [(about.task.centre, about.task.scale) for about in (one, other)]
        if self.heads == "merged" and scales[0] != scales[1]:
            raise ContributionError(
                f"{both} are of models that learned targets with different centres and scales: {scales[0]}, "
                f"{scales[1]}; fine-tune all with the same 'centre' and 'scale'"
            )
        weights = [self._shared_weights(about.base.weights, about.head) for about in (one, other)]
        odd = sorted(name for name in weights[0].keys() & weights[1].keys() if weights[0][name] != weights[1][name])
        if odd or (self.heads == "merged" and weights[0].keys() != weights[1].keys()):
            difference = f"tensor {odd[0]!r} differs" if odd else "they have different tensors"
            raise ContributionError(
                f"{both} are of different base models ({one.base.name}, {other.base.name}): {difference}. Only models "
                "that were fine-tuned from one base can be merged"
            )
        if self.heads == "merged" and one.layout.digest != other.layout.digest:
            raise ContributionError(
                f"{both} were measured with different layouts: {_difference(one.layout, other.layout)}. Measure all "
                "with the same --gram and --freeze"
            )

    def _shared_weights(self, weights: Mapping[str, str], head: Iterable[str]) -> Mapping[str, str]:
        if self.heads == "merged":
            return weights
        return {name: digest for name, digest in weights.items() if name not in set(head)}

    def _body(self) -> Layout:
        """Return the layout of the tensors outside of heads that all files have with the same shape."""
        shapes = [
            {t.name: t.shape for t in file.about.layout.tensors if t.name not in file.about.head} for file in self.files
        ]
        names = {name for name, shape in shapes[0].items() if all(other.get(name) == shape for other in shapes)}
        layouts = [_excerpt_of(file.about.layout, names) for file in self.files]
        for file, layout in zip(self.files, layouts, strict=True):
            if layout is None:
                raise ContributionError("the files have no common parameters outside of their heads")
            if layouts[0] is not None and layout.digest != layouts[0].digest:
                raise ContributionError(
                    f"{self.files[0].path} and {file.path} were measured with different layouts: "
                    f"{_difference(layouts[0], layout)}. Measure all with the same --gram and --freeze"
                )
        assert layouts[0] is not None  # noqa: S101
        return layouts[0]

    def load_base(self, file: StatisticsFile, name: str | None, directory: Path) -> Base:
        """Load the base model of a file, with the head that its differences refer to.

        Args:
            name: its directory, hub id or bundled name.

        Raises:
            ModelError: if `name` is None, cannot be loaded, or is a different model.
        """
        about = file.about
        if name is None:
            at = f" (commit {about.base.revision})" if about.base.revision else ""
            raise ModelError(
                f"{file.path}: names {quoted(about.base.name)}{at} as its base model. A model is never loaded just "
                "because a file names it: if you know and trust that model, pass it as --base"
            )
        if self.plan is not None:
            base = load_base(self.plan, directory, silo=file.name, override=name)
        else:
            base = load_zero_headed(plan_for(file.name, name, about.task), directory)
        digests, expected = tensor_digests(base.model), about.base.weights
        odd = sorted(key for key in digests.keys() | expected.keys() if digests.get(key) != expected.get(key))
        if odd:
            raise ModelError(
                f"{name!r} is not the base model of {file.path}, which names {about.base.name!r}: {len(odd)} tensors "
                f"differ, the first is {odd[0]!r}; pass the right model as --base"
            )
        for key, title in PINNED.items():
            if getattr(base.pins, key) != getattr(about.base, key):
                raise ModelError(
                    f"{name!r} is not the base model of {file.path}, which names {about.base.name!r}: their {title} "
                    "differ; pass the right model as --base, and use the version of transformers that measured the file"
                )
        return base


def merge_files(
    paths: Sequence[Path], out: Path, settings: Settings, directory: Path, studied: Studied = UNSTUDIED
) -> Report:
    """Merge statistics files and write the merged model, or with own heads one for each file.

    Args:
        paths: of the files; their order does not matter.
        out: directory for the model, or with own heads for a directory per file; must not exist.
        directory: where relative paths of models start.
        studied: further keys of the report.

    Returns:
        The report, as in report.json.

    Raises:
        ContributionError: naming the file, if it is damaged or cannot be merged with the others.
        ModelError: if the base model cannot be loaded, or is a different model.
        RunDirectoryError: if `out` exists already, or cannot be written.
    """
    began = time.monotonic()
    collection = Collection([read_statistics(path) for path in paths], settings.heads)
    weights = _weights([file.name for file in collection.files], settings.weights or {})
    agreed = collection.plan.merge if collection.plan else None
    alpha = settings.alpha if settings.alpha is not None else agreed.alpha if agreed else 0.9
    weighting: Weighting = settings.weighting or (agreed.weighting if agreed else "uniform")
    base = collection.load_base(collection.files[0], settings.base, directory)
    counts = {file.name: file.examples if weighting == "examples" else 1 for file in collection.files}
    added = Additions.choose(
        collection.files,
        {name: weight * counts[name] for name, weight in weights.items()},
        base,
        None if settings.tokenizer is None else directory / settings.tokenizer,
    )
    model_bytes = ITEM_BYTES * sum(parameter.numel() for parameter in base.model.parameters())
    models = len(collection.files) if collection.heads == "own" else 1
    with RunDirectory(out, models * (model_bytes + 20 * 2**20)) as run:
        accumulator = Accumulator(collection.layout, alpha=alpha, weighting=weighting)
        for file in collection.files:
            accumulator.fold(
                _Excerpt(file, collection.layout), str(file.path), silo=file.name, share=weights[file.name]
            )
        merged = accumulator.merge()
        maximum = (agreed or Merge()).maximum_change
        checks = [
            *check_shares({file.name: file.examples for file in collection.files}, weighting, weights),
            *check_sums(accumulator, merged),
            *check_model(base.model, merged, collection.layout, maximum),
        ]
        report = Report(
            schema=SCHEMA,
            run=out.name,
            mode="files",
            base=BaseOfReport.read({"name": settings.base, "sha256": base.pins.sha256}),
            **_report_keys(collection, alpha, weighting, weights),
            examples=accumulator.examples,
            added_tokens=added.report(),
            **coverage(collection.layout, merged.steps, unchanged(collection.layout, collection.files))._asdict(),
            solve=merged.steps,
            checks=tuple(checks),
            seconds=0.0,
            versions={name: importlib.metadata.version(name) for name in ("gramfuse", "torch", "transformers")},
            **{key: value for key, value in studied._asdict().items() if value != getattr(UNSTUDIED, key)},
        )
        with run.writing():
            if collection.heads == "merged":
                _write(run.partial, base, merged, collection, added, report)
            else:
                for file in collection.files:
                    base = collection.load_base(file, settings.base, directory)
                    _write(run.partial / file.name, base, merged, collection, added, report, file)
        report = report.updated(seconds=round(time.monotonic() - began, 3))
        run.write(REPORT, report.text)
        run.write(PAGE, page(report, None))
        run.finish()
    return report


def _weights(names: Sequence[str], given: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of each file, 1 if none is given; raise ContributionError for one without a file."""
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise ContributionError(
            f"no file is named {unknown[0]!r}, which a weight is given for; the files are {', '.join(names)}"
        )
    return dict.fromkeys(names, 1.0) | dict(given)


def _report_keys(
    collection: Collection, alpha: float, weighting: Weighting, weights: Mapping[str, float]
) -> dict[str, Any]:
    """Return the report's keys on the files and the merge's settings."""
    return {
        "layout_digest": collection.layout.digest,
        "plan_digest": collection.plan.digest if collection.plan else None,
        "heads": collection.heads,
        "alpha": alpha,
        "weighting": weighting,
        "silos": tuple(
            SiloOfReport(
                name=file.name,
                examples=file.examples,
                weight=weights[file.name],
                sha256=file.sha256,
                auto_class=FORMS[file.about.task.task].auto,
            )
            for file in collection.files
        ),
    }


@dataclass(frozen=True)
class _Excerpt:
    """The part of a file that a smaller layout covers, as a contribution."""

    file: StatisticsFile
    layout: Layout

    @property
    def examples(self) -> int:
        return self.file.examples

    @property
    def tokens(self) -> Mapping[str, int]:
        return {group.name: self.file.tokens[group.name] for group in self.layout.groups}

    def block(self, name: str) -> NDArray[np.float32]:
        return self.file.block(name)


def _excerpt_of(layout: Layout, names: set[str]) -> Layout | None:
    """Return a layout reduced to these tensors; None if it has none of them."""
    groups = []
    for group in layout.groups:
        weights = tuple(weight for weight in group.weights if weight.weight in names)
        if weights:
            groups.append(group.model_copy(update={"weights": weights}))
    tensors = tuple(tensor for tensor in layout.tensors if tensor.name in names)
    if len(tensors) == len(layout.tensors):
        return layout
    return Layout(groups=tuple(groups), tensors=tensors, frozen=()) if tensors else None


def _write(
    directory: Path,
    base: Base,
    merged: Merged,
    collection: Collection,
    added: Additions,
    report: Report,
    file: StatisticsFile | None = None,
) -> None:
    """Write one model.

    Args:
        base: becomes the merged model, in place.
        added: tokens to add.
        file: the file whose own parameters the model keeps beside the merged ones, if any.
    """
    if file is not None:
        unmerged = {t.name for t in file.about.layout.tensors} - merged.deltas.keys()
        add_differences(base.model, {name: file.block(delta_block(name)).astype(np.float64) for name in unmerged})
        tensors = base.model.state_dict()
        for name, value in file.own().items():
            tensors[name].copy_(torch.from_numpy(value))
    add_differences(base.model, merged.rounded())
    fold(base.model, (file or collection.files[0]).about.task)
    base = added.add_to(base, file)
    base.model.save_pretrained(directory, safe_serialization=True)
    base.tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(_card(collection, report, file), encoding="utf-8")


def _card(collection: Collection, report: Report, file: StatisticsFile | None) -> str:
    about = (file or collection.files[0]).about
    form = FORMS[about.task.task]
    kept = f" Only the bodies were merged; the head is that of `{file.name}`." if file else ""
    followed = f" All of them follow the plan `{collection.plan.digest}`." if collection.plan else ""
    lines = [*front_matter(about.base.name, form), "", f"# {file.name if file else 'Merged model'}", ""]
    if worst(report.checks) == "bad":
        lines += [f"**Do not use this model: {describe_bad(report.checks)}.**", ""]
    lines += [
        f"{len(collection.files)} models that were fine-tuned from {code(about.base.name)}, merged by RegMean (Jin et "
        f"al., ICLR 2023) with gramfuse from their statistics files: alpha {report.alpha}, {report.weighting} "
        f"weighting. Their data was not pooled.{kept}{followed}",
        "",
        "| model | examples | weight | SHA-256 of its statistics |",
        "|---|---|---|---|",
        *(f"| {one.name} | {one.examples:,} | {one.weight:g} | `{one.sha256}` |" for one in report.silos),
        "",
        *(line for sentence in explain_added_tokens(report, code) for line in (sentence, "")),
        *extent(report, report.solve),
        *usage(form),
    ]
    return "\n".join(lines)


def _task_text(kind: str, labels: Sequence[str]) -> str:
    return f"{kind}, {len(labels)} labels ({listed(labels, 5)})" if labels else kind


def _difference(one: Layout, other: Layout) -> str:
    """Describe the first difference between two layouts."""
    for kind, mine, theirs in (
        ("group", {g.name: g.structure for g in one.groups}, {g.name: g.structure for g in other.groups}),
        ("tensor", {t.name: t.shape for t in one.tensors}, {t.name: t.shape for t in other.tensors}),
    ):
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                return f"{kind} {name!r} is {mine.get(name, 'missing')} and {theirs.get(name, 'missing')}"
    return "their groups contain different weights"
