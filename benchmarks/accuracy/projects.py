"""Writes projects for `gramfuse simulate`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomlkit

from sets import Rows

Keys = Mapping[str, Any]


@dataclass(frozen=True)
class SiloData:
    """The data of one silo.

    Args:
        train, held_out, validation: its rows.
        entry: further keys of its [[silo]] in the plan.
    """

    train: Rows
    held_out: Rows
    validation: Rows = field(default_factory=list)
    entry: Keys = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """One experiment: a plan, and the data of each silo.

    Args:
        title: description, for the head of its table.
        model, training, merge: keys of these sections of the plan.
        columns: keys of [data] in the silo files, except the files.
        tasks: [[task]] sections.
        metric: the metric to show, if not the ranking metric.
        base: the base model.
    """

    title: str
    silos: Mapping[str, SiloData]
    model: Keys
    training: Keys = field(default_factory=dict)
    merge: Keys = field(default_factory=dict)
    columns: Keys = field(default_factory=dict)
    tasks: Sequence[Keys] = ()
    metric: str = ""
    base: str = "bundled:minilm"

    def quick(self) -> Setting:
        """Return a small version: an eighth of the training rows, fewer for measuring, and at most two epochs."""
        silos = {
            name: replace(
                data,
                train=data.train[: max(64, len(data.train) // 8)],
                held_out=data.held_out[: max(16, len(data.held_out) // 16)],
                validation=data.validation[: max(16, len(data.validation) // 16)],
            )
            for name, data in self.silos.items()
        }
        training = {**self.training, "epochs": min(2, self.training.get("epochs", 5))}
        return replace(self, title=f"{self.title} (quick)", silos=silos, training=training)


def write(directory: Path, setting: Setting, *, name: str, secure: bool = False) -> Path:
    """Write plan, silo files and data."""
    own_metrics = "silo" if setting.tasks or not secure else "sum"
    plan: dict[str, Any] = {
        "plan": {"name": name},
        "model": {"base": setting.base, "head": "own" if setting.tasks else "same", **setting.model},
        "training": {"learning-rate": 2e-4, "precision": "bfloat16", **setting.training},
        "merge": dict(setting.merge),
        "privacy": {"secure-aggregation": secure, "metrics": own_metrics},
        "silo": [{"name": silo, **data.entry} for silo, data in setting.silos.items()],
    }
    if setting.tasks:
        plan["task"] = list(setting.tasks)
    directory.mkdir(parents=True)
    (directory / "plan.toml").write_text(tomlkit.dumps(plan), encoding="utf-8")
    for silo, data in setting.silos.items():
        parts = {"train": data.train, "held-out": data.held_out, "validation": data.validation}
        files = {part: f"../data/{silo}/{part}.jsonl" for part, rows in parts.items() if rows}
        for part in files:
            _write_rows(directory / "data" / silo / f"{part}.jsonl", parts[part])
        own = {
            "name": silo,
            "data": {**files, **setting.columns},
            "limits": {"minimum-examples": 1, "open-uploads": not secure, "metrics": own_metrics},
        }
        path = directory / "silos" / f"{silo}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(tomlkit.dumps(own), encoding="utf-8")
    return directory


def _write_rows(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
