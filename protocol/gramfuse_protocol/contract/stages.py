"""The stages of a run: what silos do in each of its sessions, and which models they measure then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from gramfuse_protocol.contract.form import Form

if TYPE_CHECKING:
    from gramfuse_protocol.contract.layout import Layout
    from gramfuse_protocol.contract.plan import Plan
    from gramfuse_protocol.contract.plan_sections import Merge, Model, Privacy, Training
    from gramfuse_protocol.secure_sum.statements import Sum

Subject = Literal["statistics", "uncounted", "head", "metrics"]
"""What a sum is about: statistics; statistics that count no examples; the moments of a head's inputs; or metrics."""

Work = Literal["fit", "train", "refit"]
"""`fit`: silos contribute the sums that the first head is fitted from. `train`: they fine-tune, and contribute their
statistics. `refit`: they contribute the sums of the merged model's features, from which its head is fitted again."""

FITTED, REFITTED = "fitted", "refitted"
"""Names of the models that the stages `fit` and `refit` end with."""


class Stage(NamedTuple):
    """One session of a run.

    Args:
        work: what silos do.
        round: the round of training: the same for `train`; 0 before the first; the last for `refit`.
        merged: name of the model that it ends with.
        measured: names of the models that silos measure on held-out examples, in order.
        last: whether it is the run's last.
        judged: names of the models that silos measure on validation examples, in order: the model that the session
            started from, and the one that it ends with. The better one is the run's result.
    """

    work: Work
    round: int
    merged: str
    measured: tuple[str, ...]
    last: bool
    judged: tuple[str, ...] = ()

    @property
    def results(self) -> tuple[str, ...]:
        """Names of all results of the session, in the order of their sums."""
        return (*self.measured, *self.judgements)

    @property
    def judgements(self) -> tuple[str, ...]:
        """Names of the results on validation examples, in the order of `judged`."""
        return tuple(f"{name}-validation" for name in self.judged)

    @property
    def fits_head(self) -> bool:
        """Whether silos contribute the sums of a head."""
        return self.work != "train"

    def form(self, layout: Layout) -> Form:
        """Return the form of what silos contribute.

        Raises:
            ValueError: if the stage fits a head, but the layout has none.
        """
        if not self.fits_head:
            return layout
        if layout.head is None:
            raise ValueError("the layout has no head to fit; lock the plan again with: gramfuse plan lock")
        return layout.head


def describe_stage(stage: Stage) -> str:
    """Return what a stage is, in words."""
    return {
        "fit": "the exchange that fits the head",
        "train": f"round {stage.round}",
        "refit": "the exchange that fits the head again",
    }[stage.work]


def subject(plan: Plan, stage: Stage, sum_of: Sum) -> Subject:
    """Return what a sum is about.

    Args:
        sum_of: which sum of the stage's session.
    """
    if sum_of == "metrics":
        return "metrics"
    if plan.counted:
        return "statistics"
    return "head" if stage.fits_head else "uncounted"


def subtractable(one: Subject, other: Subject) -> bool:
    """Return whether the difference of two sums could be about single silos, if their silos differ by few.

    The sums of a head and statistics that follow a fitted head have nothing in common: the last layer then has no Gram
    matrix (`gramfuse_model.derive_layout`), and nothing counts examples (`Plan.counted`). So fewer silos may be in the
    statistics than in the sums of the head.
    """
    subjects = {one, other}
    return "metrics" not in subjects if len(subjects) > 1 and subjects != {"head", "uncounted"} else one == other


def stages_of(model: Model, training: Training, merge: Merge, privacy: Privacy) -> tuple[Stage, ...]:
    """Return the stages of a run, in order.

    A head that is fitted before training is not measured: its model is the base, which silos gain nothing from. It is
    measured where there is no training.
    """
    measured = privacy.metrics != "none"
    trains = training.epochs > 0
    stages = []
    if model.head == "fitted":
        stages.append(Stage("fit", 0, FITTED, (FITTED,) if measured and not trains else (), last=not trains))
    if trains:
        merged = "regmean" if merge.method == "regmean" else "simple"
        candidates = privacy.candidates if merged == "regmean" else (merged,)
        stages += [
            Stage("train", n, merged, candidates if measured else (), last=n == merge.rounds and not merge.refit)
            for n in range(1, merge.rounds + 1)
        ]
    if merge.refit:
        models, judged = ((REFITTED,), (stages[-1].merged, REFITTED)) if measured else ((), ())
        stages.append(Stage("refit", merge.rounds, REFITTED, models, last=True, judged=judged))
    return tuple(stages)
