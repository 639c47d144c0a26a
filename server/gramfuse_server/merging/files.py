"""Merges statistics files, instead of contributions that silos send."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gramfuse_model.loading.auto_classes import FORMS
from gramfuse_model.loading.base_model import Base
from gramfuse_model.parameters import add_differences
from gramfuse_model.rescaling import fold
from gramfuse_model.saving import save_adapter, save_model
from gramfuse_protocol.contract.coverage import coverage, unchanged
from gramfuse_protocol.contract.layout import ITEM_BYTES, Layout, delta_block
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import ContributionError, PlanError
from gramfuse_protocol.statistics.file import StatisticsFile, read_statistics
from gramfuse_server.merging.accumulator import Accumulator, Merged
from gramfuse_server.merging.adapter_files import write_adapters
from gramfuse_server.merging.added_tokens import Additions
from gramfuse_server.merging.checks import check_model, check_shares, check_sums
from gramfuse_server.merging.collection import Collection, Heads
from gramfuse_server.merging.regmean import Weighting
from gramfuse_server.report.merged_model import code, extent, front_matter, usage, usage_of_adapter
from gramfuse_server.report.page.added_tokens import explain_added_tokens
from gramfuse_server.report.page.page import page
from gramfuse_server.report.schema import SCHEMA, BaseOfReport, Report, SiloOfReport
from gramfuse_server.report.studies import Studied
from gramfuse_server.report.verdicts import describe_bad, worst
from gramfuse_server.run_directory import PAGE, REPORT, RunDirectory

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
        rank: rank of a merged adapter; None for the rank of all its rows, which loses nothing.
    """

    alpha: float | None = None
    weighting: Weighting | None = None
    weights: Mapping[str, float] | None = None
    heads: Heads | None = None
    base: str | None = None
    tokenizer: Path | None = None
    rank: int | None = None


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
    if settings.rank is not None and (base.adapters is None or collection.plan is not None):
        raise PlanError("--rank is for adapters that were measured without a plan; these files are of something else")
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
            if base.adapters is not None and collection.plan is None:
                task = collection.files[0].about.task
                lost = write_adapters(run.partial, base, task, merged, accumulator, settings, directory)
                report = report.updated(truncated=lost)
                _write_card(run.partial, collection, report)
            else:
                _write_models(run.partial, base, merged, collection, added, report, settings, directory)
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
        "outputs": _outputs(collection),
        "truncated": {},
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


def _write_models(
    place: Path,
    base: Base,
    merged: Merged,
    collection: Collection,
    added: Additions,
    report: Report,
    settings: Settings,
    here: Path,
) -> None:
    """Write the merged model, or one for each file with its own head; arguments as in `_write` and `load_base`."""
    if collection.heads == "merged":
        _write(place, base, merged, collection, added, report)
        return
    for file in collection.files:
        base = collection.load_base(file, settings.base, here)
        _write(place / file.name, base, merged, collection, added, report, file)


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
    outputs, plan = _outputs(collection), collection.plan
    if plan is not None and "adapter" in outputs:
        place = directory / "adapter" if "model" in outputs else directory
        save_adapter(base, plan.model.base, place, task=plan.model.single_task.task, revision=plan.model.revision)
    if "model" in outputs:
        save_model(base, directory)
    _write_card(directory, collection, report, file)


def _outputs(collection: Collection) -> tuple[Literal["adapter", "model"], ...]:
    if collection.plan is not None:
        return collection.plan.outputs
    return ("model",) if collection.files[0].about.adapter is None else ("adapter",)


def _write_card(directory: Path, collection: Collection, report: Report, file: StatisticsFile | None = None) -> None:
    (directory / "README.md").write_text(_card(collection, report, file), encoding="utf-8")


def _card(collection: Collection, report: Report, file: StatisticsFile | None) -> str:
    about = (file or collection.files[0]).about
    form = FORMS[about.task.task]
    kept = f" Only the bodies were merged; the head is that of `{file.name}`." if file else ""
    followed = f" All of them follow the plan `{collection.plan.digest}`." if collection.plan else ""
    adapter = report.outputs == ("adapter",)
    front = front_matter(about.base.name, form, library="peft" if adapter else "transformers")
    lines = [*front, "", f"# {file.name if file else 'Merged model'}", ""]
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
        *(usage_of_adapter(form, about.base.name) if adapter else usage(form)),
    ]
    return "\n".join(lines)
