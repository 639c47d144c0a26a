"""The parts of a report that tell what was tried on validation examples, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from gramfuse_server.report.part import ReportPart
from gramfuse_server.report.ranges import Amount, Count, MetricsOfTasks, Positive, Share


class Tried(ReportPart):
    """Validation results of a tried merge."""

    score: float | None
    """The metric that merges are ranked by, higher is better; null if it could not be measured."""
    metrics: MetricsOfTasks
    """All metrics; with several tasks, `tasks` has those of each. Empty if they could not be measured."""


class TriedAlpha(Tried):
    """A tried value of α."""

    alpha: Share
    """Share of each Gram matrix off its diagonal that was kept, 0 to 1."""


class TriedWeights(Tried):
    """Tried weights of the silos."""

    weights: Mapping[str, Positive]
    """Factor on the silo's weight in the sums, above 0, by silo."""


class TriedOrder(Tried):
    """A merge of some silos."""

    silos: tuple[str, ...]
    """The silos in it, in the order of addition."""


class Chosen(TriedAlpha, TriedWeights):
    """The chosen merge."""


class Influence(ReportPart):
    """The merge without a silo."""

    silo: str
    """The silo that was left out."""
    without: float | None
    """Score of the merge without it on validation examples; null if it could not be measured."""
    difference: float | None
    """`without` minus the score of the merge with all silos; null if it could not be measured."""
    reported: Mapping[str, float]
    """The same difference in each metric on the reported examples."""


class ReportedOn(ReportPart):
    """The examples that the chosen merge is reported on; they took no part in the choice."""

    part: Literal["held-out"]
    """Part of a silo's examples."""
    examples: Mapping[str, Count]
    """Number of examples, by silo."""


class Tuning(ReportPart):
    """What `gramfuse tune` tried."""

    metric: str
    """The metric that merges are ranked by; higher is better."""
    part: Literal["validation"]
    """Part of a silo's examples that chose the merge."""
    examples: Mapping[str, Count]
    """Number of examples, by silo."""
    reported: ReportedOn
    """Examples that the chosen merge is reported on."""
    alpha: tuple[TriedAlpha, ...]
    """Tried values of α, in order."""
    weights: tuple[TriedWeights, ...]
    """Tried weights of the silos, at the best α; empty if none were tried."""
    order: tuple[TriedOrder, ...]
    """Merges of the first silo, the first two, and so on; empty if none were tried."""
    influence: tuple[Influence, ...]
    """Merges without each silo; empty if none were tried."""
    chosen: Chosen
    """The merge that was written to disk."""


class HeadChoice(ReportPart):
    """Which head was kept: the one that the merge had, or the one that was fitted again."""

    kept: Literal["regmean", "simple", "refitted"]
    """Kind of the model that was written to disk."""
    metric: str
    """The metric that decided; higher is better."""
    examples: Amount
    """Number of validation examples of all silos together; not a whole number if released with noise."""
    scores: Mapping[str, float]
    """The metric on them, by kind of model. The fitted head is kept unless the other is better by more than noise."""
