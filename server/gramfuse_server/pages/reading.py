"""A report as the sections of its page read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from gramfuse_protocol.metrics import primary
from gramfuse_protocol.plan import Plan
from gramfuse_server.pages.wording import known, ranked_by
from gramfuse_server.verdicts import worst

Model = Mapping[str, Any]


class Reading:
    """A report with what the sections ask of it.

    Args:
        report: as it stands in report.json.
        plan: that of the run, or None.
    """

    def __init__(self, report: Mapping[str, Any], plan: Plan | None) -> None:
        self.report = report
        self.plan = plan
        self.failure: Mapping[str, Any] | None = report.get("failure")
        self.models: Sequence[Model] = [known(model) for model in report.get("models") or []]
        self.tasks: Mapping[str, Any] = report.get("tasks") or {}
        self.rounds: Sequence[Mapping[str, Any]] = report.get("rounds") or []
        self.tuning: Mapping[str, Any] | None = report.get("tuning")
        self.own = "own" in (report.get("head"), report.get("heads"))

    @property
    def title(self) -> str:
        """What the run is called."""
        return str(self.report.get("name") or self.report["run"])

    @cached_property
    def ranked(self) -> str:
        """By which metric models are ranked."""
        return ranked_by(self.tasks)

    @cached_property
    def silos(self) -> list[str]:
        """The silos that the report names."""
        return [silo["name"] for silo in self.report["silos"]]

    @cached_property
    def lost(self) -> list[tuple[int, str, str]]:
        """Round, silo and reason of each that was lost, once each."""
        found: dict[tuple[str, str], int] = {}
        for of in [*self.rounds, {"round": self.last, "lost": self.report.get("lost", [])}]:
            for lost in of["lost"]:
                found.setdefault((lost["name"], lost["reason"]), of["round"])
        return [(number, name, reason) for (name, reason), number in found.items()]

    @property
    def last(self) -> int:
        """The number of the last round."""
        if self.failure is not None:
            return int(self.failure["round"])
        return int(self.rounds[-1]["round"]) if self.rounds else 1

    def of_kind(self, *kinds: str) -> list[Model]:
        """Return the measured models of some kinds."""
        return [model for model in self.models if model["kind"] in kinds]

    def one(self, kind: str) -> Model | None:
        """Return the measured model of a kind, if there is one."""
        return next(iter(self.of_kind(kind)), None)

    @cached_property
    def alone(self) -> Model | None:
        """The best that silos have without the others: each its own model where heads are theirs, else one silo's."""
        return self.one("alone") or max(self.of_kind("silo"), key=self.value, default=None)

    def value(self, model: Model) -> float:
        """Return the metric that a model is ranked by."""
        return float(model["metrics"][self.ranked])

    @cached_property
    def unsolved(self) -> list[Mapping[str, Any]]:
        """The groups that were not solved as they stand."""
        return [step for step in self.report.get("solve") or [] if step["outcome"] != "clean"]

    @property
    def unsound(self) -> bool:
        """Whether a check of the merge is bad."""
        return worst(self.report.get("checks") or []) == "bad"

    def primary(self, silo: str, metrics: Mapping[str, float]) -> str:
        """Return which of a silo's metrics ranks models there."""
        if self.plan is not None and silo in self.plan.names:
            return primary(self.plan.task_of(silo).task)
        return next(metric for metric in map(primary, self.tasks.values()) if metric in metrics)
