"""A report with the derived values that its page needs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.stages import describe_stage
from gramfuse_protocol.documents import explain
from gramfuse_protocol.errors import RunDirectoryError
from gramfuse_protocol.held_out.metrics import primary
from gramfuse_server.report.page.words import MERGES, ranked_by
from gramfuse_server.report.schema import Loss, Measured, Report, Step
from gramfuse_server.report.verdicts import worst

MOST_PROBLEMS = 5
"""Most problems of a file that an error lists."""


def read_report(path: Path) -> Report:
    """Read a report from a file.

    Raises:
        RunDirectoryError: if it cannot be read or is not a report; the message names the file and each invalid key.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"), by_alias=True, by_name=False)
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [explain(problem) for problem in problems[:MOST_PROBLEMS]]
        if problems[MOST_PROBLEMS:]:
            lines.append(f"{len(problems) - MOST_PROBLEMS:,} more problems")
        raise damaged(path, "; ".join(lines)) from None
    except ValueError as error:
        raise damaged(path, str(error)) from None


def damaged(path: Path, problem: str) -> RunDirectoryError:
    """Return the error for a file that is not a valid report."""
    return RunDirectoryError(
        f"{path}: is damaged, or not a report of this version of gramfuse ({problem}); copy it again from its source"
    )


class Reading:
    """A report with derived values for the sections of its page.

    Args:
        report: of a run, or of a merge of files.
        plan: of the run, or None.
    """

    def __init__(self, report: Report, plan: Plan | None) -> None:
        self.report = report
        self.plan = plan
        self.failure = report.failure
        self.models = [model.without_noise for model in report.models]
        self.tasks = report.tasks
        self.rounds = report.rounds
        self.tuning = report.tuning
        self.own_heads = "own" in (report.head, report.heads)
        self.merged = report.merged
        self.first = 1 if plan is None else plan.trained_session or 1
        """Number of the first session whose models and checks the report itself lists."""

    @property
    def title(self) -> str:
        """The display name of the run."""
        return self.report.name or self.report.run

    @cached_property
    def ranked(self) -> str:
        """The metric that ranks models."""
        return ranked_by(self.tasks)

    @cached_property
    def silos(self) -> list[str]:
        """Names of the silos in the report."""
        return [silo.name for silo in self.report.silos]

    @cached_property
    def lost(self) -> list[tuple[int, str, str]]:
        """Session, silo and reason of each loss, without repetitions."""
        first_round: dict[tuple[str, str], int] = {}
        by_round: list[tuple[int, tuple[Loss, ...]]] = [(one.round, one.lost) for one in self.rounds]
        for number, losses in [*by_round, (self.last, self.report.lost)]:
            for lost in losses:
                first_round.setdefault((lost.name, lost.reason), number)
        return [(number, name, reason) for (name, reason), number in first_round.items()]

    @property
    def last(self) -> int:
        """The number of the last session."""
        if self.failure is not None:
            return int(self.failure.round)
        return int(self.rounds[-1].round) if self.rounds else 1

    @property
    def sessions(self) -> int:
        """How many sessions the plan has."""
        return 1 if self.plan is None else len(self.plan.stages)

    def session(self, number: int) -> str:
        """Return what was done in a session, in words; empty if the plan has only one."""
        return "" if self.plan is None or self.sessions == 1 else describe_stage(self.plan.stage(number))

    @cached_property
    def earlier(self) -> list[tuple[str, Measured]]:
        """The merges of rounds of training before the last, each with its round in words."""
        return [
            (self.session(one.round), model.without_noise)
            for one in self.rounds
            for model in one.models
            if one.round < min(self.first, self.last) and model.kind in MERGES
        ]

    def of_kind(self, *kinds: str) -> list[Measured]:
        """Return the measured models of some kinds."""
        return [model for model in self.models if model.kind in kinds]

    def one(self, kind: str) -> Measured | None:
        """Return the measured model of a kind, if there is one."""
        return next(iter(self.of_kind(kind)), None)

    @cached_property
    def alone(self) -> Measured | None:
        """The best result without merging: all silos' own models if they keep their heads, else the best single one."""
        return self.one("alone") or max(self.of_kind("silo"), key=self.value, default=None)

    def value(self, model: Measured) -> float:
        """Return a model's value of the ranking metric."""
        return float(model.metrics[self.ranked])

    @cached_property
    def unsolved(self) -> list[Step]:
        """The groups that were not solved exactly."""
        return [step for step in self.report.solve if step.outcome != "clean"]

    @property
    def unsound(self) -> bool:
        """Whether a check of the merge is bad."""
        return worst(self.report.checks) == "bad"

    def primary(self, silo: str, metrics: Mapping[str, float]) -> str:
        """Return the ranking metric of a silo's task."""
        if self.plan is not None and silo in self.plan.names:
            return primary(self.plan.task_of(silo).task)
        return next(metric for metric in map(primary, self.tasks.values()) if metric in metrics)
