"""Names of settings in errors about data: keys of a plan and a silo file, or a command's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SettingNames:
    """Phrases for errors: names of settings, and what to do about data that do not fit them.

    Args:
        columns: how to name columns.
        pair: the error if the second column of a pair is not named; `{path}` is the silo file.
        labels: the set of known labels.
        unknown: what to do about an unknown label.
        annotated: describes the labels of this silo, "that …".
        foreign: what to do about a known label that is not this silo's.
        range: the range of targets.
        beyond: what to do about a target outside the range.
        skip_bad: the setting that allows bad rows.
        skipping: how to leave `{count}` bad rows out; empty if there is no way.
        validation: the error if all `{count}` validation examples of the silo file `{path}` are used elsewhere too.
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


FILE_SETTINGS = SettingNames(
    columns="Name yours in [data] of the silo file (text, text-pair, image, label)",
    pair="{path}: the plan is for text pairs (model.pair); name the second column in data.text-pair",
    labels="the plan's labels",
    unknown="All silos must use the plan's labels: rename it here, or agree on a plan that has it. If a silo annotates "
    "only some of them, the plan lists those as 'labels' of its [[silo]]",
    annotated="that the plan says this silo annotates",
    foreign="leave the example out, or agree on a plan that lists the label in this silo's 'labels'",
    range="the plan's range",
    beyond="correct it, or agree on a plan with a wider 'model.range'",
    skip_bad="data.skip-bad",
    skipping="To leave them out, write skip-bad = {count} under [data] of the silo file",
    validation="{path}: all {count} examples of data.validation are also training or held-out examples; name others, "
    "or leave data.validation out",
)
"""Names if there are a plan and a silo file."""


def option_settings(columns: Sequence[str], *, skip: bool = True, unlabelled: bool = False) -> SettingNames:
    """Return the names for a command without a plan and a silo file.

    Args:
        columns: the options that name columns.
        skip: whether the command has --skip-bad.
        unlabelled: whether it accepts rows without a label.
    """
    without = "; rows without a label are accepted too" if unlabelled else ""
    leave = "leave it out with --skip-bad" if skip else "leave it out"
    return SettingNames(
        columns=f"Name yours with {' or '.join(columns)}",
        pair="the model takes pairs of texts; name the second column with --text-pair",
        labels="the model's labels",
        unknown=f"Give the data's names of the model's outputs with --labels, rename it, or {leave}{without}",
        annotated="that the model was trained on",
        foreign=leave,
        range="the model's range",
        beyond=f"correct it, or {leave}",
        skip_bad="--skip-bad",
        skipping="To leave them out, use --skip-bad {count}" if skip else "",
        validation="--validation: all {count} examples are also in --test; name others",
    )
