"""The plan: the contract of one merge, known to all its participants.

A plan is written as `plan.toml`. `Plan.digest` is the SHA-256 of its canonical form
(`gramfuse_protocol.canonical`); it binds every message of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import Field, model_validator

from gramfuse_protocol.bounds import SILOS, Many
from gramfuse_protocol.canonical import digest
from gramfuse_protocol.contract.plan_sections import (
    Header,
    Lora,
    Merge,
    Model,
    NamedTask,
    Pins,
    Privacy,
    Silo,
    Training,
)
from gramfuse_protocol.contract.roster import Roster, check_terms, smallest_threshold
from gramfuse_protocol.contract.stages import Stage, stages_of
from gramfuse_protocol.contract.task import MaskedTask, Task
from gramfuse_protocol.documents import Section, build, parse, parse_toml, read_text
from gramfuse_protocol.errors import FederationError, PlanError
from gramfuse_protocol.tasks.registry import TASK_KINDS, kind_of


class Plan(Section):
    """A complete plan."""

    kind = "a plan"

    plan: Header
    model: Model
    task: Annotated[Many[NamedTask], Field(max_length=SILOS)] = ()
    training: Training = Training()
    merge: Merge = Merge()
    privacy: Privacy = Privacy()
    silo: Annotated[Many[Silo], Field(min_length=1, max_length=SILOS)]

    @model_validator(mode="after")
    def _roster(self) -> Plan:
        names = [silo.name for silo in self.silo]
        repeated = sorted(name for name, times in Counter(names).items() if times > 1)
        if repeated:
            raise ValueError(f"[[silo]] names {', '.join(repeated)} more than once")
        for key in ("public_key", "node_key"):
            owners: dict[str, str] = {}
            for silo in self.silo:
                value = getattr(silo, key)
                if value is not None and owners.setdefault(value, silo.name) != silo.name:
                    raise ValueError(
                        f"[[silo]] {owners[value]!r} and {silo.name!r} have the same {key.replace('_', '-')}; each "
                        "silo makes its own with: gramfuse silo keygen"
                    )
        if self.privacy.secure_aggregation:
            check_terms(len(self.silo), self.privacy.colluding, self.threshold, self.minimum_survivors)
        elif self.minimum_survivors > len(self.silo):
            raise ValueError(f"'privacy.minimum-survivors' is more than the {len(self.silo)} silos in the roster")
        return self

    @model_validator(mode="after")
    def _tasks(self) -> Plan:
        headless = [task.task for task in self.tasks.values() if kind_of(task).headless]
        if headless and (self.model.head not in (None, "same") or self.merge.refit):
            raise ValueError(
                f"task {headless[0]!r} has no head of its own, and the class means of one that predicts tokens would "
                "show which words occur in the data: 'model.head' must be \"same\", and 'merge.refit' false"
            )
        names = [task.name for task in self.task]
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        if twice:
            raise ValueError(f"two [[task]] have the same name: {', '.join(twice)}")
        if not names:
            for silo in self.silo:
                if silo.task is not None:
                    raise ValueError(f"[[silo]] {silo.name!r} has task {silo.task!r}, but the plan has no [[task]]")
            return self
        if self.model.task is not None or self.model.head != "own":
            raise ValueError(
                "with [[task]] sections, silos share a body and keep their heads: 'model.head' must be \"own\", and "
                "'task' belongs in each [[task]] instead of [model]"
            )
        for silo in self.silo:
            if silo.task not in names:
                raise ValueError(f"[[silo]] {silo.name!r} needs 'task', one of {', '.join(names)}")
        unused = set(names) - {silo.task for silo in self.silo}
        if unused:
            raise ValueError(f"no [[silo]] has task {', '.join(sorted(unused))}")
        if self.privacy.metrics == "sum":
            raise ValueError(
                'results of different tasks cannot be summed over silos: \'privacy.metrics\' must be "silo" or "none"'
            )
        return self

    @model_validator(mode="after")
    def _adapters(self) -> Plan:
        if self.training.lora is not None and self.training.epochs == 0:
            raise ValueError("without training ('training.epochs' = 0), nothing trains the adapters of [training.lora]")
        if self.training.lora is not None and self.model.head == "own" and self.outputs != ("model",):
            raise ValueError(
                "an adapter includes a head, and in this plan silos keep their own heads: write training.lora.output = "
                '"merged"'
            )
        return self

    @model_validator(mode="after")
    def _fitted_heads(self) -> Plan:
        fits = {
            'model.head = "fitted"': self.model.head == "fitted",
            "merge.refit = true": self.merge.refit,
            "training.epochs = 0": self.training.epochs == 0,
        }
        wanted = next((key for key, asked in fits.items() if asked), None)
        if wanted is None:
            return self
        if self.training.epochs == 0 and (
            self.model.head not in (None, "fitted") or self.merge.refit or self.merge.rounds > 1
        ):
            raise ValueError(
                "without training ('training.epochs' = 0), the fitted head is the only result: use model.head = "
                '"fitted", merge.rounds = 1 and merge.refit = false'
            )
        if self.task or self.model.head == "own":
            raise ValueError(f"{wanted} fits one head for all silos, but in this plan silos keep their own heads")
        kind = kind_of(self.model.single_task)
        if kind.fit is None:
            kinds = ", ".join(f'"{name}"' for name, other in TASK_KINDS.items() if other.fit)
            raise ValueError(
                f"{wanted} fits a head in closed form, which tasks {kinds} have; this plan's is {kind.name!r}, "
                f"{kind.unfit}"
            )
        return self

    @model_validator(mode="after")
    def _masked_labels(self) -> Plan:
        masked, labels = [silo for silo in self.silo if silo.labels], set(self.model.labels)
        if not masked:
            return self
        if self.model.task is None or not TASK_KINDS[self.model.task].partial_labels:
            kinds = " or ".join(f'"{kind.name}"' for kind in TASK_KINDS.values() if kind.partial_labels)
            raise ValueError(f"'labels' of a [[silo]] requires 'model.task' to be {kinds}")
        for silo in masked:
            unknown = [label for label in silo.labels if label not in labels]
            if unknown:
                raise ValueError(f"[[silo]] {silo.name!r}: {unknown[0]!r} is not among 'model.labels'")
        if self.model.head == "own":
            return self
        if self.fits_head and TASK_KINDS[self.model.task].exclusive:
            raise ValueError(
                f"[[silo]] {masked[0].name!r} annotates some of the labels only, so its examples may belong to another "
                'silo\'s class, and no head is fitted to them: use model.head = "same" and merge.refit = false'
            )
        dropouts = len(self.silo) - self.minimum_survivors
        secure = self.privacy.secure_aggregation
        needed = self.privacy.colluding + 2 + dropouts if secure else 1
        unmasked = len(self.silo) - len(masked)
        annotated = Counter(label for silo in masked for label in set(silo.labels))
        for label in self.model.labels:
            held = unmasked + annotated[label]
            if held < needed:
                raise ValueError(
                    f"silos that annotate label {label!r}: {held}; its head rows need at least {needed}"
                    + (
                        f" ({self.privacy.colluding} may collude and {dropouts} drop out): set "
                        'secure-aggregation = false or model.head = "own"'
                        if secure
                        else ""
                    )
                )
        if secure and self.fits_head:
            self._check_alike(needed)
        return self

    def _check_alike(self, needed: int) -> None:
        """Check that the sums of a head, over the silos that annotate a label, differ by many silos or by none.

        Each label has a sum of features over the examples of the silos that annotate it. Silos that annotate the same
        labels are in the same sums, so no combination of sums is about fewer than all of them.

        Args:
            needed: least number of silos that annotate the same labels.

        Raises:
            ValueError: naming silos that too few others are like.
        """
        alike: dict[frozenset[str], list[str]] = {}
        for silo in self.silo:
            alike.setdefault(frozenset(silo.labels or self.model.labels), []).append(silo.name)
        few = min(alike.values(), key=len)
        if len(few) < needed:
            raise ValueError(
                f"silos that annotate exactly the labels of {', '.join(few)}: {len(few)}; to fit a head (model.head = "
                f'"fitted", merge.refit), at least {needed} must annotate the same ones, or the difference of two '
                'labels\' sums would be about these alone: set secure-aggregation = false, or model.head = "same" and '
                "merge.refit = false"
            )

    def task_of(self, silo: str) -> Task:
        """Return a silo's task, with the labels that it annotates.

        Raises:
            PlanError: if silos have different tasks and this silo is not in the roster.
        """
        entry = next((entry for entry in self.silo if entry.name == silo), None)
        if not self.task:
            task = self._single_task
            return MaskedTask(**dict(task), annotates=entry.labels) if entry and entry.labels else task
        if entry is None:
            raise PlanError(f"the plan has no [[silo]] {silo!r}, so this silo has no task")
        return next(task for task in self.task if task.name == entry.task)

    @property
    def tasks(self) -> Mapping[str, Task]:
        """All tasks by name; a plan without [[task]] sections has one task, named "", with all labels."""
        return {task.name: task for task in self.task} or {"": self._single_task}

    @property
    def _single_task(self) -> Task:
        """The task that all silos share, with a default range if results leave in a sum."""
        task = self.model.single_task
        return kind_of(task).for_sum(task) if self.summed else task

    @property
    def summed(self) -> bool:
        """Whether held-out results leave in a secure sum only."""
        return self.privacy.secure_aggregation and self.privacy.metrics == "sum"

    @property
    def epsilon(self) -> float | None:
        """The ε of one held-out example in the results of one candidate; None without noise."""
        epsilon = self.privacy.metrics_epsilon
        return None if epsilon == "none" or not self.summed else epsilon

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of a run, one for each session, in order."""
        return stages_of(self.model, self.training, self.merge, self.privacy)

    @property
    def closed_form(self) -> bool:
        """Whether weights of fine-tuned models are merged in closed form."""
        return self.merge.method == "regmean" and self.training.epochs > 0

    @property
    def outputs(self) -> tuple[Literal["adapter", "model"], ...]:
        """What is written of the result: an adapter, a whole model, or both, in this order."""
        match self.training.lora:
            case Lora(output="adapter"):
                return ("adapter",)
            case Lora(output="both"):
                return ("adapter", "model")
        return ("model",)

    @property
    def fits_head(self) -> bool:
        """Whether silos contribute the sums of a head in one of the stages."""
        return any(stage.fits_head for stage in self.stages)

    @property
    def trained_session(self) -> int:
        """Number of the session with the last round of training; 0 without training."""
        return max((n for n, stage in enumerate(self.stages, 1) if stage.work == "train"), default=0)

    def stage(self, number: int) -> Stage:
        """Return the stage of a session, counted from 1.

        Raises:
            FederationError: if the run has fewer.
        """
        if number > len(self.stages):
            raise FederationError(
                f"the coordinator asked for session {number}, but the plan has {len(self.stages)}",
                reason="the plan has fewer sessions",
            )
        return self.stages[number - 1]

    @property
    def releases(self) -> int:
        """Number of times that results about one held-out example leave a silo: once for each model that is measured.

        A validation example is not held out, and fewer models are measured on it.
        """
        return sum(len(stage.measured) for stage in self.stages)

    @property
    def counted(self) -> bool:
        """Whether the sum of statistics counts examples and tokens.

        It does not where the sums of a head, over perhaps more silos, do: the difference would be the numbers of the
        silos in between. Weights by examples are such a count.
        """
        return not (
            self.privacy.secure_aggregation and self.model.head == "fitted" and self.merge.weighting == "uniform"
        )

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the models that silos measure in some session."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.measured))

    def holders(self, label: str) -> tuple[str, ...]:
        """Return the silos that annotate a label, in roster order."""
        return tuple(silo.name for silo in self.silo if not silo.labels or label in silo.labels)

    @property
    def threshold(self) -> int:
        """Number of shares that reconstruct a silo's secret: the plan's, or the smallest safe one."""
        return self.privacy.threshold or smallest_threshold(len(self.silo), self.privacy.colluding)

    @property
    def minimum_survivors(self) -> int:
        """Minimum number of silos in a merge."""
        if self.privacy.minimum_survivors is not None:
            return self.privacy.minimum_survivors
        return self.threshold if self.privacy.secure_aggregation else len(self.silo)

    @property
    def roster(self) -> Roster:
        """The roster of the plan's secure sums.

        Raises:
            PlanError: naming the silos without a key.
        """
        missing = [silo.name for silo in self.silo if silo.public_key is None]
        if missing:
            raise PlanError(
                f"plan: no public key for {', '.join(missing)}; run gramfuse silo keygen at each, and put the key that "
                "it prints into the plan as 'public-key' of its [[silo]]"
            )
        keys = {silo.name: bytes.fromhex(silo.public_key or "") for silo in self.silo}
        return Roster(self.digest, keys, self.threshold, self.minimum_survivors)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form, which both sides print, approve and put into every message."""
        return digest(self.document())

    @property
    def reading(self) -> str:
        """SHA-256 of the settings that decide which of a silo's rows are used and how they are converted to tensors."""
        model = self.model.model_dump(mode="json", by_alias=True, exclude={"base", "revision", "head"})
        tasks = [task.model_dump(mode="json", by_alias=True) for task in self.task]
        drawn = {"tokens": self.merge.tokens, "batch": self.training.batch_size, "seed": self.training.seed}
        return digest({"model": model, "task": tasks, **drawn})

    def terms_of(self, silo: str) -> str:
        """Return the SHA-256 of the plan's terms for one silo that its statistics depend on."""
        (entry,) = (entry for entry in self.silo if entry.name == silo)
        head = silo if self.model.head in ("different", "own") else ""  # the name seeds the silo's own head
        return digest({"task": entry.task or "", "labels": list(entry.labels), "head": head})

    @property
    def names(self) -> tuple[str, ...]:
        """The silos' names, in roster order."""
        return tuple(silo.name for silo in self.silo)

    @property
    def locked(self) -> bool:
        """Whether the base model (weights, configuration, processor), its head and the layout are pinned."""
        model = self.model
        adapters = self.training.lora is None or model.adapters is not None
        return adapters and None not in (model.sha256, model.config, model.processor, model.head, self.merge.layout)

    @property
    def pins(self) -> Pins:
        """The digests and the commit that the base model must match."""
        return Pins(*(getattr(self.model, name) for name in Pins._fields))

    def document(self) -> dict[str, Any]:
        """Return the plan as a nested document with kebab-case keys, as hashed by `digest`."""
        return self.model_dump(mode="json", by_alias=True)

    def to_toml(self) -> str:
        """Return the plan as TOML text; `Plan.parse` restores an equal plan."""
        document = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        if not self.task:
            del document["task"]
        return tomlkit.dumps(document)

    def unlocked(self) -> Plan:
        """Return this plan without the digests of `plan lock`; the commit is kept."""
        return self.pinned(Pins(None, None, None, self.model.revision), None)

    def with_keys(self, keys: Mapping[str, str]) -> Plan:
        """Return this plan with these public keys, by silo."""
        roster = tuple(silo.model_copy(update={"public_key": keys[silo.name]}) for silo in self.silo)
        return self.model_copy(update={"silo": roster})

    def with_head(self, head: str) -> Plan:
        """Return this plan with `model.head`, if it has none."""
        return self if self.model.head else build(Plan, self._with("model", "head", head), "plan")

    def _with(self, section: str, key: str, value: Any) -> dict[str, Any]:
        document = self.document()
        document[section][key] = value
        return document

    def pinned(self, pins: Pins, layout: str | None) -> Plan:
        """Return this plan with these values of `plan lock`: the base model's pins and the layout's digest."""
        return self.model_copy(
            update={
                "model": self.model.model_copy(update=pins._asdict()),
                "merge": self.merge.model_copy(update={"layout": layout}),
            }
        )

    def override(self, settings: Iterable[str]) -> Plan:
        """Return this plan with `section.key=value` settings applied; any setting removes the lock.

        A new `model.base` also removes the commit, unless the settings name one. Values are TOML (`merge.alpha=1.0`,
        `training.freeze=["*pooler*"]`); a bare word is a string.

        Raises:
            PlanError: for a setting without `=`, an unknown key or an invalid value.
        """
        settings = tuple(settings)
        document = self.document()
        if any(setting.partition("=")[0].strip() == "model.base" for setting in settings):
            document["model"]["revision"] = None
        for setting in settings:
            path, separator, text = setting.partition("=")
            keys = path.strip().split(".")
            if not separator or len(keys) < 2:
                raise PlanError(f"--set {setting}: expected section.key=value, for instance merge.alpha=1.0")
            table: Any = document
            for key in keys[:-1]:
                if isinstance(table, dict) and table.get(key) is None:
                    table[key] = {}  # a table that the plan lacks, such as [training.lora]
                table = table[key] if isinstance(table, dict) else None
            if not isinstance(table, dict):
                raise PlanError(f"--set {setting}: {'.'.join(keys[:-1])!r} is not a section of the plan")
            table[keys[-1]] = _toml_value(text.strip())
        if settings:
            document["model"] |= dict.fromkeys(("sha256", "config", "processor", "adapters"))
            document["merge"]["layout"] = None
        return build(Plan, document, f"--set {' '.join(settings)}" if settings else "plan")

    @staticmethod
    def read(path: Path) -> Plan:
        """Read `plan.toml`; raises PlanError naming the file and the key."""
        return Plan.parse(read_text(path), str(path))

    @staticmethod
    def parse(text: str, source: str = "plan") -> Plan:
        """Parse the text of a plan; `source` names it in errors."""
        return parse(Plan, text, source)


def _toml_value(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text
