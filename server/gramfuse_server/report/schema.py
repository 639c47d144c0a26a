"""What report.json holds: the models that everyone who writes a report fills, and everyone who shows one reads.

docs/report.md is made from them by `make api`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from gramfuse_protocol.contract.task import TaskKind
from gramfuse_server.report.part import ReportPart
from gramfuse_server.report.ranges import (
    Amount,
    Count,
    Intervals,
    Metrics,
    MetricsOfTasks,
    Number,
    Positive,
    Seconds,
    Share,
    ShareInterval,
)

SCHEMA: Literal["gramfuse.report/1"] = "gramfuse.report/1"
"""Name and version of this format."""

Traffic = Mapping[str, Mapping[str, Count]]
"""Bytes by silo and phase."""
Bounds = tuple[float | None, float | None]
"""Least and most; None where there is no bound."""
Verdict = Literal["ok", "look", "bad"]
"""`ok`: as honest merges are. `look`: honest merges rarely are. `bad`: no honest merge is, or the plan forbids it."""

Outcome = Literal["clean", "jitter", "mean", "unused", "empty"]
CheckName = Literal["counts", "share", "power", "eigenvalue", "ratio", "average", "change"]


class BaseOfReport(ReportPart):
    """The base model."""

    name: str
    """Its directory, hub id or bundled name, as the plan or whoever merged gives it."""
    sha256: str
    """SHA-256 of its weights, hexadecimal."""


class Generation(ReportPart):
    """How texts are generated when models are measured."""

    strategy: Literal["greedy"]
    """How the next token is chosen."""
    max_new_tokens: Count = Field(alias="max-new-tokens")
    """Most tokens that are generated of a text."""
    first_token: str | None = Field(alias="first-token")
    """The token that every text begins with; null if none is forced."""


class SiloOfReport(ReportPart):
    """A silo: of a run that is complete, one of those in the merge; of one that failed, any of the roster."""

    name: str
    """Its name in the roster or in its statistics file."""
    examples: Count | None = None
    """Training examples; null with secure aggregation, where only the silo knows."""
    state: Literal["merged", "lost", "trained", "joined", "connected", "absent"] = "merged"
    """Failed runs: how far it came. `connected` means that its key is known and that it was not asked yet."""
    weight: Positive = 1.0
    """Files: the factor on its weight in the sums, above 0."""
    sha256: str | None = None
    """Files: SHA-256 of its statistics file, hexadecimal."""
    auto_class: str | None = None
    """Files: the class of transformers that loads its model."""


class Loss(ReportPart):
    """A silo that dropped out or refused."""

    name: str
    """Its name."""
    reason: str
    """What happened, for people."""


class LabelFigures(ReportPart):
    """What held-out examples say of a label, or of a type of entity."""

    examples: Amount
    """How often it is in the truth, 0 or more; not whole if it left with noise."""
    precision: Share
    """Share of what was predicted that is right, 0 to 1; 0 if it was never predicted."""
    recall: Share
    """Share of what is true that was found, 0 to 1; 0 if it is never true."""
    f1: Share
    """Harmonic mean of both, 0 to 1."""
    interval: ShareInterval | None = None
    """Figures with noise: lowest and highest value that the exact F1 may have, 95% of the time or more."""


Labels = Mapping[str, Mapping[str, LabelFigures]]
"""Figures by task and label."""


class PrivacyTotal(ReportPart):
    """What all releases of a run together say of one held-out example."""

    epsilon: Positive
    """ε of all releases, above 0."""
    releases: Count
    """How many sums the plan asks for."""


class PrivacyOfReport(ReportPart):
    """Differential privacy of one held-out example."""

    epsilon: Positive
    """ε of this one sum, above 0."""
    delta: Share
    """δ, 0 to 1, for `epsilon` and for `total`."""
    total: PrivacyTotal
    """For the whole run."""


class ExactFigures(ReportPart):
    """The figures without noise, which only a simulation knows."""

    metrics: Metrics
    """As those of the model."""
    labels: Labels = Field(default={})
    """As those of the model."""


class Measured(ReportPart):
    """A model and what the silos' held-out examples say of it."""

    name: str
    """What it is called; a silo's own model has the silo's name."""
    kind: str
    """`silo`, `body`, `alone`, `simple`, `regmean` (the merge), `untuned`, or a comparison: `fisher`, `joint`, …"""
    metrics: Metrics
    """Over the held-out examples of all silos together. With several tasks: `examples` and `mean-score`, the mean over
    tasks of the metric that ranks models of each."""
    tasks: Mapping[str, Metrics] = Field(default={})
    """All metrics by task, if the plan has several."""
    labels: Labels = Field(default={})
    """Figures by task and label; a plan with one task calls it "". Labels neither true nor predicted are left out."""
    silos: Mapping[str, Metrics] = Field(default={})
    """Metrics by silo, on its own held-out examples, if the plan shows metrics silo by silo."""
    intervals: Intervals = Field(default={})
    """Metrics with noise: lowest and highest value that the exact one may have, 95% of the time or more."""
    privacy: PrivacyOfReport | None = None
    """Metrics with noise: what they cost."""
    exact: ExactFigures | None = None
    """Metrics with noise, in a simulation: those without."""
    seconds: Seconds = 0.0
    """Comparisons: how long it took to make and measure it, in seconds."""
    note: str = ""
    """Comparisons: what else there is to say, for people."""
    silo: str = ""
    """`best`: whose model it is."""
    rounds: tuple[Metrics, ...] = ()
    """`fedavg`: metrics after each round."""
    bytes: Mapping[str, Count] = Field(default={})
    """`fedavg`: bytes that each silo sent, by silo."""
    pairs: Count = 0
    """`transport`: feed-forward pairs whose units were matched."""

    @property
    def known(self) -> Measured:
        """The model with exact figures in place of those with noise, where both are there."""
        if self.exact is None:
            return self
        kept = self.model_fields_set - {"exact", "intervals", "labels", "privacy"}
        figures = {name: getattr(self.exact, name) for name in self.exact.model_fields_set}
        return Measured(**{name: getattr(self, name) for name in kept} | figures)


class Step(ReportPart):
    """How a group of weights was solved."""

    group: str
    """Its name."""
    outcome: Outcome
    """`clean`; `jitter` if at least one block needed a ridge; `mean` if at least one block could not be solved and took
    the mean; `unused` if all blocks could be solved but those of experts that no measured token went to, which took the
    mean; `empty` if nothing but zeros ever came there, so that all of it took the mean."""
    jitter: Amount
    """Largest relative ridge that a solved block needed, 0 or more."""
    smallest_eigenvalue: Share
    """Estimate, over all blocks, of S scaled to a unit diagonal, before any ridge: 0 to 1. 1 is perfect; below about
    1e-6 the float32 statistics hold no information in some direction; 0 if Cholesky failed."""
    dead_features: Count
    """Features that were zero at every silo; their rows took the mean."""
    mean_blocks: Count
    """Blocks that took the mean since they could not be solved, of `blocks`."""
    blocks: Count
    """Blocks of the Gram matrix, or of those of all experts."""
    unused: tuple[Count, ...]
    """Indices of the experts to which no measured token of any silo was routed; they took the mean. Empty where there
    are no experts."""


class Check(ReportPart):
    """Something that can be seen of a merge, at one place."""

    name: CheckName
    """What was looked at (operations.md)."""
    where: str
    """A group, a tensor, a silo, or what is counted."""
    value: float
    """What is there."""
    usual: Bounds
    """Range of honest merges: least and most, null where there is no bound."""
    possible: Bounds
    """Range beyond which no honest merge lies, or which the plan sets, in the same form."""
    verdict: Verdict
    """`ok`: within `usual`; `look`: within `possible`; `bad`: beyond both."""


class RoundOfReport(ReportPart):
    """One round of a run; of one that failed, as far as it came."""

    round: Number
    """Its number, from 1 on."""
    survivors: tuple[str, ...] = ()
    """Silos whose contributions are in its merge, in roster order, once there is one."""
    solve: tuple[Step, ...] = ()
    """How each group of weights was solved, once there is a merge."""
    checks: tuple[Check, ...] = ()
    """What can be seen of its merge, once there is one."""
    models: tuple[Measured, ...] = ()
    """What was measured; the merge is of kind `regmean`."""
    unmeasured: str | None = None
    """Why nothing was measured, for people; null if something was."""
    lost: tuple[Loss, ...]
    """Silos that dropped out or refused."""
    bytes: Traffic
    """Bytes that the coordinator received, by silo and phase."""
    bytes_to_silos: Traffic
    """Bytes that the coordinator sent, by silo and phase."""
    seconds: Mapping[str, Seconds]
    """Seconds by phase."""


class Tried(ReportPart):
    """What a merge that was tried is worth on the validation examples."""

    score: float | None
    """The metric that merges are ranked by, higher is better; null if it could not be measured."""
    metrics: MetricsOfTasks
    """All metrics; with several tasks, `tasks` has those of each. Empty if they could not be measured."""


class TriedAlpha(Tried):
    """A value of α that was tried."""

    alpha: Share
    """Share of each Gram matrix off its diagonal that was kept, 0 to 1."""


class TriedWeights(Tried):
    """Weights of silos that were tried."""

    weights: Mapping[str, Positive]
    """By silo, the factor on its weight in the sums, above 0."""


class TriedOrder(Tried):
    """A merge of some silos."""

    silos: tuple[str, ...]
    """Silos that were in it, in the order in which they were added."""


class Chosen(TriedAlpha, TriedWeights):
    """The merge that was chosen."""


class Influence(ReportPart):
    """The merge without a silo."""

    silo: str
    """Whose contribution was left out."""
    without: float | None
    """Score of the merge without it on validation examples; null if it could not be measured."""
    difference: float | None
    """`without` less the score of the merge with all; null if it could not be measured."""
    reported: Mapping[str, float]
    """The same difference in each metric on the reported examples."""


class ReportedOn(ReportPart):
    """The examples that the chosen merge is reported on; they chose nothing."""

    part: Literal["held-out"]
    """Which part of a silo's examples."""
    examples: Mapping[str, Count]
    """How many, by silo."""


class Tuning(ReportPart):
    """What `gramfuse tune` tried."""

    metric: str
    """The metric that merges are ranked by; higher is better."""
    part: Literal["validation"]
    """Which part of a silo's examples chose."""
    examples: Mapping[str, Count]
    """How many, by silo."""
    reported: ReportedOn
    """What the chosen merge is reported on."""
    alpha: tuple[TriedAlpha, ...]
    """Values of α, in the order in which they were tried."""
    weights: tuple[TriedWeights, ...]
    """Weights of the silos, at the best α; empty if none were tried."""
    order: tuple[TriedOrder, ...]
    """Merges of the first silo, the first two, and so on; empty if none were tried."""
    influence: tuple[Influence, ...]
    """Merges without each silo; empty if none were tried."""
    chosen: Chosen
    """The merge that was written."""


class AddedToken(ReportPart):
    """A token that was added to models that are merged."""

    token: str
    """Its text."""
    silos: tuple[str, ...]
    """Whose models have it."""


class AddedTokensOfReport(ReportPart):
    """What became of the tokens that were added to models that are merged."""

    kept: tuple[AddedToken, ...]
    """Those that the merged model has, each with the weighted mean of its rows in the models that have it."""
    left_out: tuple[AddedToken, ...]
    """Those that it does not have."""


class Failure(ReportPart):
    """Why a run failed."""

    error: str
    """Type of the error (exit-codes/README.md)."""
    message: str
    """What happened, for people."""
    phase: str
    """Phase in which it ended."""
    round: Number
    """Round in which it ended, from 1 on."""
    exit_code: Count
    """Exit code of the command; `gramfuse explain` says more."""
    resumable: bool
    """Whether `gramfuse run --resume` can go on with it."""


ALWAYS = ("schema", "run", "mode", "base", "layout_digest", "plan_digest", "silos", "versions")
OF_PLANS = ("name", "auto_class", "head", "tasks", "generation", "identities")
OF_RUNS = (*OF_PLANS, "lost", "bytes", "bytes_to_silos", "seconds", "rounds")
OF_SUMS = ("examples", "solve", "checks")
OF_MERGES = (*OF_SUMS, "models", "unmeasured")
OF_FILES = (*OF_SUMS, "heads", "alpha", "weighting", "added_tokens", "closed", "unmatched", "seconds")

REQUIRED = {
    "complete": (*ALWAYS, *OF_RUNS, *OF_MERGES),
    "failed": (*ALWAYS, *OF_RUNS, "failure"),
    "files": (*ALWAYS, *OF_FILES),
}
"""Keys that a report must have, by what it is of: a complete run, one that failed, or a merge of files."""

OPTIONAL = {"complete": ("tuning",), "failed": OF_MERGES, "files": ("tasks", "models", "tuning", "left_out")}
"""Keys that it may have beside those."""


class Report(ReportPart):
    """A whole report.json."""

    schema_id: Literal["gramfuse.report/1"] = Field(alias="schema")
    """Name and version of this format."""
    run: str
    """Name of the run directory."""
    name: str = ""
    """Name of the plan."""
    mode: Literal["secure", "open", "files"]
    """Who saw statistics: `secure`: the coordinator saw sums only; `open`: it saw each silo's; `files`: whoever merged
    saw each file."""
    plan_digest: str | None
    """Digest of the plan, hexadecimal, which silos approve; null for files that follow no plan."""
    layout_digest: str
    """Digest of the layout, hexadecimal."""
    base: BaseOfReport
    """The base model."""
    auto_class: str = ""
    """Class of transformers that loads the merged model."""
    head: Literal["same", "different", "own"] = "same"
    """Runs: whether heads were merged from one start, merged from different starts, or kept by the silos."""
    heads: Literal["merged", "own"] = "merged"
    """Files: whether heads were merged, or each file kept its own."""
    tasks: Mapping[str, TaskKind] = Field(default={})
    """Kind of each task by name; a plan with one task calls it ""."""
    generation: Mapping[str, Generation] = Field(default={})
    """How texts are generated, by task, for tasks that generate any."""
    identities: Literal["made for this run", "those of the plan"] | None = None
    """Whose keys the silos had; those of a simulation are made for it."""
    alpha: Share | None = None
    """Files: share of each Gram matrix off its diagonal that was kept, 0 to 1."""
    weighting: Literal["uniform", "examples"] = "uniform"
    """Files: whether every silo counts the same, or by its number of examples."""
    silos: tuple[SiloOfReport, ...]
    """Silos in the merge, in roster order; of a failed run, all of the roster."""
    examples: Count = 0
    """Training examples of all silos in the merge together."""
    added_tokens: AddedTokensOfReport | None = None
    """Files: what became of tokens that were added to models."""
    closed: Share | None = None
    """Files: share of the trained parameters that are merged in closed form, 0 to 1; the others are averaged."""
    unmatched: tuple[str, ...] = ()
    """Files: weights of linear layers that are averaged since it cannot be told which rows of their inputs are tokens.
    """
    lost: tuple[Loss, ...] = ()
    """Silos that dropped out or refused in the last round."""
    models: tuple[Measured, ...] = ()
    """What was measured of the last round; the merge is of kind `regmean`."""
    unmeasured: str | None = None
    """Why nothing was measured, for people; null if something was."""
    solve: tuple[Step, ...] = ()
    """How each group of weights was solved in the last round."""
    checks: tuple[Check, ...] = ()
    """What can be seen of the last round's merge."""
    bytes: Traffic = Field(default={})
    """Bytes that the coordinator received in all rounds, by silo and phase."""
    bytes_to_silos: Traffic = Field(default={})
    """Bytes that the coordinator sent in all rounds, by silo and phase."""
    seconds: Mapping[str, Seconds] | Seconds = Field(default={})
    """Runs: seconds of all rounds, by phase. Files: seconds in all."""
    rounds: tuple[RoundOfReport, ...] = ()
    """The rounds; of a failed run, those before the one that failed."""
    versions: Mapping[str, str]
    """Versions of the packages that made it, by name."""
    tuning: Tuning | None = None
    """What `gramfuse tune` tried."""
    left_out: tuple[str, ...] = ()
    """What `gramfuse tune` on files left out: what is wrong with each bad row of its data, for people."""
    failure: Failure | None = None
    """Why the run failed."""

    @property
    def of(self) -> str:
        """What it is of: "complete" (a run), "failed" (a run) or "files"."""
        return "failed" if self.failure is not None else "files" if self.mode == "files" else "complete"

    @property
    def text(self) -> str:
        """The text of report.json."""
        return json.dumps(self.document(), indent=2) + "\n"

    @property
    def total_seconds(self) -> float:
        """How long it took, in seconds."""
        return sum(self.seconds.values()) if isinstance(self.seconds, Mapping) else self.seconds

    @property
    def simulated(self) -> bool:
        """Whether the run was a simulation, with identities that were made for it."""
        return self.identities == "made for this run"

    @model_validator(mode="after")
    def _has_the_keys_of_its_kind(self) -> Self:
        given = {"schema" if name == "schema_id" else name for name in self.model_fields_set}
        for key in REQUIRED[self.of]:
            if key not in given:
                raise ValueError(f"'{key}' is missing")
        for key in sorted(given - {*REQUIRED[self.of], *OPTIONAL[self.of]}):
            raise ValueError(f"unknown key '{key}' in a report of this kind ({self.of})")
        return self
