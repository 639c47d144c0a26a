"""The schema of report.json, used by all code that writes or shows a report.

`make api` generates docs/report.md from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from gramfuse_protocol.contract.task import TaskName
from gramfuse_server.report.choices import HeadChoice, Tuning
from gramfuse_server.report.part import ReportPart
from gramfuse_server.report.ranges import (
    Amount,
    Count,
    Intervals,
    Metrics,
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
"""`ok`: usual for honest merges. `look`: rare for honest merges. `bad`: impossible, or forbidden by the plan."""

Outcome = Literal["clean", "jitter", "mean", "unused", "empty"]
CheckName = Literal["counts", "share", "power", "eigenvalue", "ratio", "average", "change", "outputs"]


class BaseOfReport(ReportPart):
    """The base model."""

    name: str
    """Its directory, hub id or bundled name, as given in the plan or on the command line."""
    sha256: str
    """SHA-256 of its weights, hexadecimal."""


class Generation(ReportPart):
    """How texts are generated when models are measured."""

    strategy: Literal["greedy"]
    """How the next token is chosen."""
    max_new_tokens: Count = Field(alias="max-new-tokens")
    """Most tokens to generate for a text."""
    first_token: str | None = Field(alias="first-token")
    """The forced first token of every text; null if there is none."""


class SiloOfReport(ReportPart):
    """A silo: in a complete run, one of the merge; in a failed run, any of the roster."""

    name: str
    """Its name in the roster or in its statistics file."""
    examples: Count | None = None
    """Training examples; null with secure aggregation, where only the silo knows."""
    state: Literal["merged", "lost", "trained", "joined", "connected", "absent"] = "merged"
    """Failed runs: how far it got. `connected`: its key is known, and it has not been asked yet."""
    weight: Positive = 1.0
    """Files: factor on its weight in the sums, above 0."""
    sha256: str | None = None
    """Files: SHA-256 of its statistics file, hexadecimal."""
    auto_class: str | None = None
    """Files: the transformers class that loads its model."""


class Loss(ReportPart):
    """A silo that dropped out or refused."""

    name: str
    """Its name."""
    reason: str
    """What happened, for people."""


class LabelFigures(ReportPart):
    """Held-out figures of a label or entity type."""

    examples: Amount
    """How often it is true, 0 or more; not a whole number if released with noise."""
    precision: Share
    """Share of its predictions that are right, 0 to 1; 0 if it was never predicted."""
    recall: Share
    """Share of its true occurrences that were predicted, 0 to 1; 0 if it is never true."""
    f1: Share
    """Harmonic mean of both, 0 to 1."""
    interval: ShareInterval | None = None
    """Noisy figures: interval that contains the exact F1 with at least 95% confidence."""


Labels = Mapping[str, Mapping[str, LabelFigures]]
"""Figures by task and label."""


class PrivacyTotal(ReportPart):
    """Privacy cost of all releases of a run, for one held-out example."""

    epsilon: Positive
    """ε of all releases together, above 0."""
    releases: Count
    """Number of sums that the plan releases."""


class PrivacyOfReport(ReportPart):
    """Differential privacy of one held-out example."""

    epsilon: Positive
    """ε of this one sum, above 0."""
    delta: Share
    """δ, 0 to 1, for `epsilon` and for `total`."""
    total: PrivacyTotal
    """For the whole run."""


class ExactFigures(ReportPart):
    """The figures without noise; only simulations have them."""

    metrics: Metrics
    """As in the model."""
    labels: Labels = Field(default={})
    """As in the model."""


class Measured(ReportPart):
    """A model and its metrics on the silos' held-out examples."""

    name: str
    """Its name; a silo's own model has the silo's name."""
    kind: str
    """`silo`, `body`, `alone`, `simple`, `regmean`, `fitted`, `refitted`, `untuned`, or a comparison: `fisher`,
    `joint`, …"""
    metrics: Metrics
    """Over the held-out examples of all silos together. With several tasks: `examples` and `mean-score`, the mean over
    tasks of the metric that ranks models of each."""
    tasks: Mapping[str, Metrics] = Field(default={})
    """All metrics by task, if the plan has several."""
    labels: Labels = Field(default={})
    """Figures by task and label; a plan's only task is called "". Labels neither true nor predicted are left out."""
    silos: Mapping[str, Metrics] = Field(default={})
    """Metrics by silo, on its own held-out examples, if the plan shows metrics by silo."""
    intervals: Intervals = Field(default={})
    """Noisy metrics: interval that contains the exact value with at least 95% confidence."""
    privacy: PrivacyOfReport | None = None
    """Noisy metrics: their privacy cost."""
    exact: ExactFigures | None = None
    """Noisy metrics in a simulation: the exact ones."""
    seconds: Seconds = 0.0
    """Comparisons: seconds to make and measure it."""
    note: str = ""
    """Comparisons: a remark, for people."""
    silo: str = ""
    """`best`: whose model it is."""
    rounds: tuple[Metrics, ...] = ()
    """`fedavg`: metrics after each round."""
    bytes: Mapping[str, Count] = Field(default={})
    """`fedavg`: bytes sent, by silo."""
    pairs: Count = 0
    """`transport`: number of feed-forward pairs whose units were matched."""

    @property
    def without_noise(self) -> Measured:
        """The model with exact figures instead of noisy ones, if it has both."""
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
    the mean; `unused` if only the blocks of experts without measured tokens took the mean; `empty` if all inputs were
    zero, so that the whole group took the mean."""
    jitter: Amount
    """Largest relative ridge that any solved block needed, 0 or more."""
    smallest_eigenvalue: Share
    """Estimated smallest eigenvalue over all blocks of S, scaled to a unit diagonal, before any ridge: 0 to 1. 1 is
    perfect; below about 1e-6 the float32 statistics carry no information in some direction; 0 if Cholesky failed."""
    dead_features: Count
    """Number of features that were zero at every silo; their rows took the mean."""
    mean_blocks: Count
    """Number of `blocks` that could not be solved and took the mean."""
    blocks: Count
    """Number of blocks of the Gram matrix, or of all experts' matrices."""
    unused: tuple[Count, ...]
    """Indices of the experts to which no silo routed a measured token; they took the mean. Empty without experts."""


class Check(ReportPart):
    """One check of a merge, at one place."""

    name: CheckName
    """What was checked (operations.md)."""
    where: str
    """A group, a tensor, a silo, or the name of a count."""
    value: float
    """The observed value."""
    usual: Bounds
    """Usual range of honest merges: least and most, null for no bound."""
    possible: Bounds
    """Possible range of honest merges, or the plan's limit, in the same form."""
    verdict: Verdict
    """`ok`: within `usual`; `look`: within `possible`; `bad`: outside both."""


class RoundOfReport(ReportPart):
    """One session of a run; a failed one, as far as it got."""

    round: Number
    """Its number, from 1."""
    work: Literal["fit", "train", "refit"] = "train"
    """What silos did: `fit`: contributed the sums that the head was fitted from; `train`: fine-tuned; `refit`:
    contributed the sums of the merged body's features, from which its head was fitted again."""
    survivors: tuple[str, ...] = ()
    """Silos whose contributions are in its merge, in roster order; missing before the merge."""
    examples: Count = 0
    """Training examples of these silos together; 0 if the sum does not count them, as after a fit of the head."""
    solve: tuple[Step, ...] = ()
    """How each group of weights was solved; missing before the merge."""
    checks: tuple[Check, ...] = ()
    """Checks of its merge; missing before the merge."""
    models: tuple[Measured, ...] = ()
    """Measured models; the merge comes last."""
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


class AddedToken(ReportPart):
    """A token that was added to the vocabulary of some models."""

    token: str
    """Text of the token."""
    silos: tuple[str, ...]
    """Silos whose models have it."""


class AddedTokensOfReport(ReportPart):
    """Which added tokens the merged model has."""

    kept: tuple[AddedToken, ...]
    """Tokens of the merged model; each row is the weighted mean over the models that have the token."""
    left_out: tuple[AddedToken, ...]
    """Tokens that the merged model lacks."""


class Failure(ReportPart):
    """Why a run failed."""

    error: str
    """Type of the error (exit-codes/README.md)."""
    message: str
    """What happened, for people."""
    phase: str
    """Phase in which it failed."""
    round: Number
    """Number of the session in which it failed, from 1."""
    exit_code: Count
    """Exit code of the command; see `gramfuse explain`."""
    resumable: bool
    """Whether `gramfuse run --resume` can resume it."""


ALWAYS = ("schema", "run", "mode", "base", "outputs", "layout_digest", "plan_digest", "silos", "versions")
OF_PLANS = ("name", "auto_class", "head", "tasks", "generation", "identities")
OF_RUNS = (*OF_PLANS, "merged", "unfitted", "lost", "bytes", "bytes_to_silos", "seconds", "rounds")
OF_SUMS = ("examples", "solve", "checks")
OF_MERGES = (*OF_SUMS, "models", "unmeasured")
OF_FILES = (*OF_SUMS, "heads", "alpha", "weighting", "added_tokens", "truncated", "closed", "unmatched", "seconds")

REQUIRED = {
    "complete": (*ALWAYS, *OF_RUNS, *OF_MERGES),
    "failed": (*ALWAYS, *OF_RUNS, "failure"),
    "files": (*ALWAYS, *OF_FILES),
}
"""Required keys of a report, by its subject: a complete run, a failed run, or a merge of files."""

OPTIONAL = {
    "complete": ("tuning", "head_choice"),
    "failed": OF_MERGES,
    "files": ("tasks", "models", "tuning", "left_out"),
}
"""Optional keys beside those."""


class Report(ReportPart):
    """A whole report.json."""

    schema_id: Literal["gramfuse.report/1"] = Field(alias="schema")
    """Name and version of this format."""
    run: str
    """Name of the run directory."""
    name: str = ""
    """Name of the plan."""
    mode: Literal["secure", "open", "files"]
    """Who saw statistics: `secure`: the coordinator saw sums only; `open`: it saw each silo's; `files`: the person who
    merged saw each file."""
    plan_digest: str | None
    """Digest of the plan, hexadecimal, that silos approve; null for files measured without a plan."""
    layout_digest: str
    """Digest of the layout, hexadecimal."""
    base: BaseOfReport
    """The base model."""
    auto_class: str = ""
    """The transformers class that loads the merged model."""
    outputs: tuple[Literal["adapter", "model"], ...] = ("model",)
    """What was written: a whole `model`, or an `adapter` for its base. A run makes a directory of this name for each; a
    merge of files writes the last into its directory, and the other into one of its name."""
    head: Literal["fitted", "same", "different", "own"] = "same"
    """Runs: whether heads were merged from one fitted start, from one random start or from different ones, or kept by
    the silos."""
    merged: Literal["regmean", "simple", "fitted", "refitted"] = "regmean"
    """Runs: kind of the merged model, the one in model/: merged by `regmean`; the `simple` average; the base with a
    `fitted` head; or a merged body with a `refitted` head."""
    heads: Literal["merged", "own"] = "merged"
    """Files: whether heads were merged, or each file kept its own."""
    tasks: Mapping[str, TaskName] = Field(default={})
    """Kind of each task by name; a plan's only task is called ""."""
    generation: Mapping[str, Generation] = Field(default={})
    """How texts are generated, by task, for tasks that generate text."""
    identities: Literal["made for this run", "those of the plan"] | None = None
    """Origin of the silos' keys; a simulation makes its own."""
    alpha: Share | None = None
    """Files: share of each Gram matrix off its diagonal that was kept, 0 to 1."""
    weighting: Literal["uniform", "examples"] = "uniform"
    """Files: whether silos are weighted equally or by their number of examples."""
    silos: tuple[SiloOfReport, ...]
    """Silos whose examples are in the model, in roster order; in a failed run, the whole roster."""
    examples: Count = 0
    """Training examples of all silos in the merge together. With a fitted head under secure aggregation, those in its
    sums, without labels that are rare at a silo; 0 if no sum over exactly these silos counts them."""
    added_tokens: AddedTokensOfReport | None = None
    """Files: which added tokens the merged model has."""
    truncated: Mapping[str, Share] = Field(default={})
    """Files: what a smaller rank of a merged adapter loses, as a share of the mean square of its outputs, by module;
    modules that lose nothing are left out."""
    closed: Share | None = None
    """Files: share of the trained parameters that were merged in closed form, 0 to 1; the others were averaged."""
    unmatched: tuple[str, ...] = ()
    """Files: weights of linear layers that were averaged because it is unknown which of their input rows are tokens."""
    lost: tuple[Loss, ...] = ()
    """Silos that dropped out or refused in the last session."""
    models: tuple[Measured, ...] = ()
    """Models measured in the last round of training and after it."""
    unmeasured: str | None = None
    """Why nothing was measured in the last session, for people; null if something was."""
    unfitted: str | None = None
    """Why the head was not fitted again, though the plan asks for it, for people; null if it was, or need not be."""
    head_choice: HeadChoice | None = None
    """Which of two heads was kept, if silos have validation examples and the head was fitted again."""
    solve: tuple[Step, ...] = ()
    """How each group of weights was solved in the last round of training."""
    checks: tuple[Check, ...] = ()
    """Checks of the last round's merge, and of a head fitted after it."""
    bytes: Traffic = Field(default={})
    """Bytes that the coordinator received in all sessions, by silo and phase."""
    bytes_to_silos: Traffic = Field(default={})
    """Bytes that the coordinator sent in all sessions, by silo and phase."""
    seconds: Mapping[str, Seconds] | Seconds = Field(default={})
    """Runs: seconds of all sessions, by phase. Files: total seconds."""
    rounds: tuple[RoundOfReport, ...] = ()
    """The sessions; in a failed run, those before the failed one."""
    versions: Mapping[str, str]
    """Package versions, by name."""
    tuning: Tuning | None = None
    """What `gramfuse tune` tried."""
    left_out: tuple[str, ...] = ()
    """Rows of data that `gramfuse tune` skipped, with what is wrong with each, for people."""
    failure: Failure | None = None
    """Why the run failed."""

    @property
    def subject(self) -> str:
        """Its subject: "complete" (a run), "failed" (a run) or "files"."""
        return "failed" if self.failure is not None else "files" if self.mode == "files" else "complete"

    @property
    def text(self) -> str:
        """The text of report.json."""
        return json.dumps(self.document(), indent=2) + "\n"

    @property
    def total_seconds(self) -> float:
        """Total seconds."""
        return sum(self.seconds.values()) if isinstance(self.seconds, Mapping) else self.seconds

    @property
    def simulated(self) -> bool:
        """Whether the run was a simulation, with keys of its own."""
        return self.identities == "made for this run"

    @model_validator(mode="after")
    def _has_the_keys_of_its_kind(self) -> Self:
        keys = {"schema" if name == "schema_id" else name for name in self.model_fields_set}
        for key in REQUIRED[self.subject]:
            if key not in keys:
                raise ValueError(f"'{key}' is missing")
        for key in sorted(keys - {*REQUIRED[self.subject], *OPTIONAL[self.subject]}):
            raise ValueError(f"unknown key '{key}' in a report of this kind ({self.subject})")
        return self
