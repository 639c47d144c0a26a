"""Statistics files that can be merged with each other, and the base that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from gramfuse_model.digests import tensor_digests
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.loading.zero_head import load_with_adapter, load_zero_headed, plan_for
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ContributionError, ModelError
from gramfuse_protocol.statistics.file import StatisticsFile
from gramfuse_protocol.text import listed, quoted

Heads = Literal["merged", "own"]

PINNED = {"config": "configurations", "processor": "tokenizers or image processors"}
"""Attributes with digests of a base beside those of its weights, and their names in errors."""


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
        self._check_adapters(first, file)
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

    def _check_adapters(self, first: StatisticsFile, file: StatisticsFile) -> None:
        """Check that two files have adapters with the same A, or are both of whole models."""
        both, one, other = f"{first.path} and {file.path}", first.about.adapter, file.about.adapter
        if (one is None) != (other is None):
            raise ContributionError(
                f"{both} are of an adapter and of a whole model; merge adapters with adapters, or fold each into its "
                "model (merge_and_unload of PEFT) and measure the models"
            )
        if one is None or other is None:
            return
        if self.heads == "own":
            raise ContributionError(f"{both} are of adapters, which include their heads; --heads own is for models")
        if one.saved != other.saved:
            raise ContributionError(
                f"{both} are of adapters with different modules trained whole: {', '.join(one.saved) or 'none'}; "
                f"{', '.join(other.saved) or 'none'}"
            )
        matrices = [{f"{module}.lora_A": shape for module, shape in about.frozen.items()} for about in (one, other)]
        same = matrices[0] == matrices[1] and all(
            first.about.base.weights.get(name) == file.about.base.weights.get(name)
            for name in first.about.base.weights
            if ".lora_A." in name
        )
        if not same:
            raise ContributionError(
                f"{both} are of adapters with different matrices A, so their B are not comparable. Measure each "
                "adapter again beside the files of all others (gramfuse measure --beside), and merge the new files"
                + ("; these were measured beside others, but not beside the same" if one.adapters > 1 else "")
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
        elif about.adapter is not None:
            frozen = {module: torch.from_numpy(matrix) for module, matrix in file.frozen().items()}
            base = load_with_adapter(plan_for(file.name, name, about.task), directory, frozen, about.adapter.saved)
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
