"""What errors of data call the settings behind them: keys of a plan and a silo file, or a command's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SettingNames:
    """Names of settings, and what to do about data that do not fit them.

    Args:
        columns: how columns are named.
        pair: what to do where the second column of a pair is not named; `{path}` is that of the silo file.
        labels: what labels must be among.
        unknown: what to do about a label that is not.
        annotated: what else they must be among, where there are others.
        foreign: what to do about a label that is not.
        range: what targets must be in.
        beyond: what to do about a target that is not.
        skip_bad: how many bad rows may be left out.
        skipping: what to do so that `{count}` are; nothing where none can be.
        validation: that all `{count}` examples of `{path}` to choose by are among others, and what to do.
    """

    columns: str
    pair: str
    labels: str
    unknown: str
    annotated: str
    foreign: str
    range: str
    beyond: str
    skip_bad: str
    skipping: str
    validation: str


OF_FILES = SettingNames(
    columns="Name yours in [data] of the silo file (text, text-pair, image, label)",
    pair="{path}: the plan is about text pairs (model.pair); name the second column in data.text-pair",
    labels="the plan's labels",
    unknown="All silos must use the plan's labels: rename it here, or agree on a plan that has it. Where a silo "
    "annotates only some of them, the plan lists those as 'labels' of its [[silo]]",
    annotated="that the plan says this silo annotates",
    foreign="leave the example out, or agree on a plan that lists the label in this silo's 'labels'",
    range="the plan's range",
    beyond="correct it, or agree on a plan with a wider 'model.range'",
    skip_bad="data.skip-bad",
    skipping="With skip-bad = {count} under [data] of the silo file they are left out",
    validation="{path}: all {count} examples of data.validation are among the training or held-out examples too; name "
    "others, or leave data.validation out",
)
"""Where there are a plan and a silo file."""


def of_options(columns: Sequence[str], *, skip: bool = True, unlabelled: bool = False) -> SettingNames:
    """Return the words for a command that has neither plan nor silo file.

    Args:
        columns: the options that name columns.
        skip: whether it has --skip-bad.
        unlabelled: whether it takes rows without a label.
    """
    without = "; rows without a label are taken too" if unlabelled else ""
    leave = "leave it out with --skip-bad" if skip else "leave it out"
    return SettingNames(
        columns=f"Name yours with {' or '.join(columns)}",
        pair="the model takes pairs of texts; name the second column with --text-pair",
        labels="the model's labels",
        unknown=f"Say with --labels what the data call the model's outputs, rename it, or {leave}{without}",
        annotated="that the model was trained on",
        foreign=leave,
        range="the model's range",
        beyond=f"correct it, or {leave}",
        skip_bad="--skip-bad",
        skipping="With --skip-bad {count} they are left out" if skip else "",
        validation="--validation: all {count} examples are among those of --test too; name others",
    )
