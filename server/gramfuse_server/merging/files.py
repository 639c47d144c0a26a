"""Merging statistics that are there already: in memory, or as files in place of what silos send."""

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

from gramfuse_model.differences import add_differences
from gramfuse_model.digests import tensor_digests
from gramfuse_model.loading.auto_classes import FORMS
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.loading.zero_head import load_zero_headed, plan_for
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
from gramfuse_server.report.page.added_tokens import tell_added
from gramfuse_server.report.page.page import page
from gramfuse_server.report.schema import SCHEMA, BaseOfReport, Report, SiloOfReport
from gramfuse_server.report.studies import Studied
from gramfuse_server.report.verdicts import told, worst
from gramfuse_server.run_directory import PAGE, REPORT, RunDirectory

Heads = Literal["merged", "own"]

PINNED = {"config": "configurations", "processor": "tokenizers or image processors"}
"""Digests of a base beside those of its weights, and of what they are."""

UNSTUDIED = Studied()


@dataclass(frozen=True)
class Settings:
    """How files are merged.

    Args:
        alpha: share of the off-diagonal that is kept; None is as the plan has it, or 0.9.
        weighting: None is as the plan has it, or `uniform`.
        weights: what the weight of a file in the sums is multiplied by, by its name; 1 for others.
        heads: whether heads are merged, or each model keeps its own.
        base: the base model: directory, hub id or bundled name. It is needed; what the files call it is nobody's to
            load.
        tokenizer: directory of a tokenizer that has added tokens to keep; None is the base's, without them.
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
        files: checked one by one already, in any order.
        heads: as `Settings` has it.

    Attributes:
        files: in the order in which they are added: that of the plan's roster, or of their names.
        plan: that all of them follow, if any.
        heads: whether heads are merged.
        layout: of what is merged.

    Raises:
        ContributionError: naming two files and what differs, if they do not belong together.
    """

    def __init__(self, files: Sequence[StatisticsFile], heads: Heads | None = None) -> None:
        first = files[0]
        for position, file in enumerate(files):
            for other in files[:position]:
                if file.name == other.name:
                    raise ContributionError(
                        f"{other.path} and {file.path} are both called {file.name!r}; give one of them another name "
                        "(gramfuse measure --name), or leave it out if they are the same"
                    )
            if file.about.plan != first.about.plan:
                raise ContributionError(
                    f"{first.path} and {file.path} do not follow the same plan; merge only files that were measured "
                    "under one plan, or only files that were measured without one"
                )
        self.plan = Plan.parse(first.about.plan, f"plan in {first.path}") if first.about.plan else None
        if self.plan is not None:
            if first.about.layout.digest != self.plan.merge.layout:
                raise ContributionError(f"{first.path}: its layout is not the one that its plan is locked to")
            heads = "own" if self.plan.model.head == "own" else heads
        self.heads: Heads = heads or "merged"
        order = {name: place for place, name in enumerate(self.plan.names)} if self.plan else {}
        for file in files:
            if self.plan and file.name not in order:
                raise ContributionError(f"{file.path}: {file.name!r} is no silo of the plan that it follows")
            self._check_goes_with(first, file)
        self.files = tuple(sorted(files, key=lambda file: (order.get(file.name, 0), file.name)))
        if self.plan is not None and len(files) < self.plan.minimum_survivors:
            missing = [name for name in self.plan.names if name not in {file.name for file in files}]
            raise ContributionError(
                f"the plan asks for at least {self.plan.minimum_survivors} silos (privacy.minimum-survivors), and "
                f"{len(files)} are here; {', '.join(missing)} is missing"
            )
        self.layout = first.about.layout if self.heads == "merged" else self._body()

    def _check_goes_with(self, first: StatisticsFile, file: StatisticsFile) -> None:
        one, other = first.about, file.about
        both = f"{first.path} and {file.path}"
        for key, what in PINNED.items():
            if getattr(one.base, key) != getattr(other.base, key):
                raise ContributionError(
                    f"{both} have bases with different {what}, so the same weights do not mean the same in both; only "
                    "models that were fine-tuned from one base can be merged. If these were, measure all with the same "
                    "--base, its tokenizer among its files; else, fine-tune again from one"
                )
        task, same = (one.task.task, one.task.labels), (other.task.task, other.task.labels)
        if self.heads == "merged" and task != same:
            raise ContributionError(
                f"{both} have different {'labels' if task[0] == same[0] else 'tasks'}: {_told(*task)}; {_told(*same)}. "
                "Merge their bodies only, so that each keeps its own head: --heads own. Or fine-tune all for the same "
                "labels in the same order"
            )
        scales = [(about.task.centre, about.task.scale) for about in (one, other)]
        if self.heads == "merged" and scales[0] != scales[1]:
            raise ContributionError(
                f"{both} are of models that learned targets with other centres and scales: {scales[0]}, {scales[1]}; "
                "fine-tune all with the same 'centre' and 'scale'"
            )
        weights = [self._shared_weights(about.base.weights, about.head) for about in (one, other)]
        odd = sorted(name for name in weights[0].keys() & weights[1].keys() if weights[0][name] != weights[1][name])
        if odd or (self.heads == "merged" and weights[0].keys() != weights[1].keys()):
            what = f"tensor {odd[0]!r} is not the same in both" if odd else "they have other tensors"
            raise ContributionError(
                f"{both} are of different base models ({one.base.name}, {other.base.name}): {what}. Only models that "
                "were fine-tuned from one base can be merged"
            )
        if self.heads == "merged" and one.layout.digest != other.layout.digest:
            raise ContributionError(
                f"{both} were measured by different layouts: {_difference(one.layout, other.layout)}. Measure all with "
                "the same --gram and --freeze"
            )

    def _shared_weights(self, weights: Mapping[str, str], head: Iterable[str]) -> Mapping[str, str]:
        if self.heads == "merged":
            return weights
        return {name: digest for name, digest in weights.items() if name not in set(head)}

    def _body(self) -> Layout:
        """Return the layout of what all have outside of their heads, with one shape."""
        shapes = [
            {t.name: t.shape for t in file.about.layout.tensors if t.name not in file.about.head} for file in self.files
        ]
        names = {name for name, shape in shapes[0].items() if all(other.get(name) == shape for other in shapes)}
        layouts = [_excerpt_of(file.about.layout, names) for file in self.files]
        for file, layout in zip(self.files, layouts, strict=True):
            if layout is None:
                raise ContributionError("the files have no parameter in common outside of their heads")
            if layouts[0] is not None and layout.digest != layouts[0].digest:
                raise ContributionError(
                    f"{self.files[0].path} and {file.path} were measured by different layouts: "
                    f"{_difference(layouts[0], layout)}. Measure all with the same --gram and --freeze"
                )
        assert layouts[0] is not None  # noqa: S101
        return layouts[0]

    def load_base(self, file: StatisticsFile, given: str | None, directory: Path) -> Base:
        """Load the base model of a file, with what its differences are taken from.

        Args:
            given: its directory, hub id or bundled name.

        Raises:
            ModelError: if none is given, or if it cannot be loaded, or is another one.
        """
        about = file.about
        if given is None:
            at = f" (commit {about.base.revision})" if about.base.revision else ""
            raise ModelError(
                f"{file.path}: says that its base model is {quoted(about.base.name)}{at}. Nothing is loaded because a "
                "file says so: if you know and trust that model, name it with --base"
            )
        if self.plan is not None:
            base = load_base(self.plan, directory, silo=file.name, override=given)
        else:
            base = load_zero_headed(plan_for(file.name, given, about.task), directory)
        here = tensor_digests(base.model)
        odd = sorted(
            key for key in here.keys() | about.base.weights.keys() if here.get(key) != about.base.weights.get(key)
        )
        if odd:
            raise ModelError(
                f"{given!r} is not the base model of {file.path}, which calls it {about.base.name!r}: tensor "
                f"{odd[0]!r} is another, {len(odd)} in all; name the right one with --base"
            )
        for key, what in PINNED.items():
            if getattr(base.pins, key) != getattr(about.base, key):
                raise ModelError(
                    f"{given!r} is not the base model of {file.path}, which calls it {about.base.name!r}: their {what} "
                    "differ; name the right one with --base, and merge with the transformers that it was measured with"
                )
        return base


def merge_files(
    paths: Sequence[Path], out: Path, settings: Settings, directory: Path, studied: Studied = UNSTUDIED
) -> Report:
    """Merge statistics files and write the merged model, or with own heads one for each file.

    Args:
        paths: of the files; their order does not matter.
        out: directory of the model, or with own heads of one directory for each file; must not exist.
        directory: where relative paths of models start.
        studied: what else the report says.

    Returns:
        The report, as it stands in report.json.

    Raises:
        ContributionError: naming the file, if one is damaged or does not go with the others.
        ModelError: if the base model cannot be loaded, or is another one.
        RunDirectoryError: if `out` exists already, or cannot be written.
    """
    began = time.monotonic()
    collection = Collection([read_statistics(path) for path in paths], settings.heads)
    names = [file.name for file in collection.files]
    unknown = sorted(set(settings.weights or {}) - set(names))
    if unknown:
        raise ContributionError(f"a weight is given for {unknown[0]!r}, and the files are of {', '.join(names)}")
    weights = dict.fromkeys(names, 1.0) | dict(settings.weights or {})
    agreed = collection.plan.merge if collection.plan else None
    alpha = settings.alpha if settings.alpha is not None else agreed.alpha if agreed else 0.9
    weighting: Weighting = settings.weighting or (agreed.weighting if agreed else "uniform")
    base = collection.load_base(collection.files[0], settings.base, directory)
    counts = {file.name: file.examples if weighting == "examples" else 1 for file in collection.files}
    added = Additions.of(
        collection.files,
        {name: weights[name] * counts[name] for name in names},
        base,
        None if settings.tokenizer is None else directory / settings.tokenizer,
    )
    model_bytes = ITEM_BYTES * sum(parameter.numel() for parameter in base.model.parameters())
    models = len(names) if collection.heads == "own" else 1
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
            *check_model(base.model, merged, maximum),
        ]
        report = Report(
            schema=SCHEMA,
            run=out.name,
            mode="files",
            base=BaseOfReport.read({"name": settings.base, "sha256": base.pins.sha256}),
            **_described(collection, alpha, weighting, weights),
            examples=accumulator.examples,
            added_tokens=added.told(),
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
                    own = collection.load_base(file, settings.base, directory)
                    _write(run.partial / file.name, own, merged, collection, added, report, file)
        report = report.updated(seconds=round(time.monotonic() - began, 3))
        run.write(REPORT, report.text)
        run.write(PAGE, page(report, None))
        run.finish()
    return report


def _described(
    collection: Collection, alpha: float, weighting: Weighting, weights: Mapping[str, float]
) -> dict[str, Any]:
    """Return what the report says of files and of how they are merged."""
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
    """Of a file, what a layout has that is part of the file's own."""

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
    """Return a layout without all tensors but these; None if it has none of them."""
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
        base: becomes the model.
        added: tokens that it has beside those of the base.
        file: whose own parameters it has beside the merged ones, if any.
    """
    if file is not None:
        own = {t.name for t in file.about.layout.tensors} - merged.deltas.keys()
        add_differences(base.model, {name: file.block(delta_block(name)).astype(np.float64) for name in own})
        tensors = base.model.state_dict()
        for name, value in file.own().items():
            tensors[name].copy_(torch.from_numpy(value))
    add_differences(base.model, merged.rounded())
    fold(base.model, (file or collection.files[0]).about.task)
    base = added.put(base, file)
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
        lines += [f"**Do not use this model: {told(report.checks)}.**", ""]
    lines += [
        f"{len(collection.files)} models that were fine-tuned from {code(about.base.name)}, merged by RegMean (Jin et "
        f"al., ICLR 2023) with gramfuse from files of their statistics: alpha {report.alpha}, {report.weighting} "
        f"weighting. Their data was not pooled.{kept}{followed}",
        "",
        "| model | examples | weight | SHA-256 of its statistics |",
        "|---|---|---|---|",
        *(f"| {one.name} | {one.examples:,} | {one.weight:g} | `{one.sha256}` |" for one in report.silos),
        "",
        *(line for said in tell_added(report, code) for line in (said, "")),
        *extent(report, report.solve),
        *usage(form),
    ]
    return "\n".join(lines)


def _told(kind: str, labels: Sequence[str]) -> str:
    return f"{kind}, {len(labels)} labels ({listed(labels, 5)})" if labels else kind


def _difference(one: Layout, other: Layout) -> str:
    """Say what first differs between two layouts."""
    for what, mine, theirs in (
        ("group", {g.name: g.structure for g in one.groups}, {g.name: g.structure for g in other.groups}),
        ("tensor", {t.name: t.shape for t in one.tensors}, {t.name: t.shape for t in other.tensors}),
    ):
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                return f"{what} {name!r} is {mine.get(name, 'not there')} and {theirs.get(name, 'not there')}"
    return "their groups hold other weights"
