"""Chooses between the head that a merge has and the one that was fitted again, by results on validation examples."""

from __future__ import annotations

from collections.abc import Sequence

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.stages import Stage
from gramfuse_server.report.choices import HeadChoice
from gramfuse_server.report.schema import Measured
from gramfuse_server.run.evaluation import ranked_by


def choose(plan: Plan, stage: Stage, judged: Sequence[Measured]) -> HeadChoice | None:
    """Return which of a stage's two models is better, or None if there are no results.

    The model that the stage ends with is kept, unless the other is better by more than the noise of both results. There
    are none if the number of validation examples is not clearly above zero.

    Args:
        judged: the entries of both on validation examples, in the order of `stage.judged`; or none.
    """
    if not judged:
        return None
    before, after = judged
    metric = ranked_by(plan)
    if _least(before, "examples") < 1:
        return None
    return HeadChoice.read(
        {
            "kept": stage.judged[0] if _least(before, metric) > _most(after, metric) else stage.judged[1],
            "metric": metric,
            "examples": before.metrics["examples"],
            "scores": {name: model.metrics[metric] for name, model in zip(stage.judged, judged, strict=True)},
        }
    )


def _least(model: Measured, metric: str) -> float:
    return model.intervals[metric][0] if metric in model.intervals else model.metrics[metric]


def _most(model: Measured, metric: str) -> float:
    return model.intervals[metric][1] if metric in model.intervals else model.metrics[metric]
