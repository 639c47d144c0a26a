"""The plan: the contract of one merge, public among its participants.

A plan is written as `plan.toml`. `Plan.digest` is the SHA-256 of its canonical form
(`gramfuse_protocol.canonical`); it binds every message of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tomlkit
from pydantic import AfterValidator, Field, model_validator

from gramfuse_protocol.bounds import SILOS, Many
from gramfuse_protocol.canonical import digest
from gramfuse_protocol.contract.gram_structure import parse_structure
from gramfuse_protocol.contract.node_key import PublicNodeKey
from gramfuse_protocol.contract.roster import Roster, check_terms, smallest_threshold
from gramfuse_protocol.contract.task import Kind, Labels, MaskedTask, Task, TaskSettings
from gramfuse_protocol.documents import Section, build, parse, parse_toml, read_text
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.secure_sum.keys import check_identity_key
from gramfuse_protocol.tasks.registry import KINDS, kind_of
from gramfuse_protocol.text import Word

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
BaseName = Annotated[str, Field(min_length=1, max_length=500)]
"""Hub id, directory, or `bundled:minilm`."""
EMBEDDINGS = "embeddings"
LARGEST = 2**53 - 1
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Unit = Annotated[float, Field(ge=0, le=1)]
ContextFree = Literal["mean", "diagonal", "full"]

Experts = Literal["mean", "full"]
"""How weights are merged whose layer sees tokens without context: each gives away more than the one before."""
Patterns = Annotated[Many[Word], Field(max_length=SILOS)]


def _identity_key(text: str) -> str:
    check_identity_key(bytes.fromhex(text))
    return text


class Header(Section):
    """`[plan]`: what this merge is called."""

    name: Name
    version: Count = 1


class Pins(NamedTuple):
    """What a plan holds its base model to; each is None as long as the plan is not locked.

    Args:
        sha256: digest of the weights.
        config: digest of the configuration.
        processor: digest of the tokenizer or image processor.
        revision: commit of the hub repository that has the files; None for a base model that is a directory.
    """

    sha256: str | None
    config: str | None
    processor: str | None
    revision: str | None = None


class _Start(Section):
    base: BaseName
    revision: Commit | None = None
    """Commit of a hub model that is loaded, whatever came after it; `plan lock` fills in the newest."""
    sha256: Sha256 | None = None
    """Digest of every weight that training starts from, the head included if it is merged; filled by `plan lock`."""
    config: Sha256 | None = None
    """Digest of the whole configuration, with how texts are generated; filled by `plan lock`."""
    processor: Sha256 | None = None
    """Digest of the whole tokenizer or image processor; filled by `plan lock`."""
    task: Kind | None = None
    head: Literal["same", "different", "own"] = "same"
    """Whether silos start from one head or each from a head of its own, or keep their heads, which are not merged."""


class Model(TaskSettings, _Start):  # pydantic takes the keys of the last base first
    """`[model]`: the base model, and what its head is for.

    `task` and what belongs to it stand here if all silos have the same task, and in `[[task]]` sections if not.
    """

    @model_validator(mode="after")
    def _is_a_task(self) -> Model:
        if self.task is not None:
            _ = self.alone
        return self

    @property
    def alone(self) -> Task:
        """The task that stands here; raises ValueError if none does, or if it contradicts itself."""
        if self.task is None:
            raise ValueError("[model] needs 'task', or the plan needs [[task]] sections")
        return Task(task=self.task, **{name: getattr(self, name) for name in TaskSettings.model_fields})


class NamedTask(Task):
    """One `[[task]]`: silos with different tasks share a body, and each keeps its head."""

    name: Name


class Training(Section):
    """`[training]`: AdamW with linear warm-up and decay, the same at every silo."""

    epochs: Count = 5
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    batch_size: Count = 16
    warmup: Unit = 0.06
    """Fraction of the steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products in training. Weights and the optimizer stay in float32, and so does all that is measured."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """What is drawn: new heads, the order of training, and which examples are measured."""
    freeze: Patterns = (EMBEDDINGS,)
    """Patterns (shell style) of the parameters that stay as they are and never leave a silo.

    The word `embeddings` stands for all that turns tokens, positions and patches into features, whatever a model calls
    it.
    """

    def in_round(self, number: int) -> Training:
        """Return the settings of a round, from 1 on: each has a seed of its own, and so other batches."""
        return self.model_copy(update={"seed": (self.seed + number - 1) % 2**32})


class Merge(Section):
    """`[merge]`: the closed form and what it is fed.

    Example:
        >>> merge = gramfuse.Merge(gram={"*": "full", "*.intermediate.*": "block:4"}, exclude=("*pooler*",))
        >>> len(gramfuse.derive_layout(base, batch, merge).groups) < len(layout.groups)
        True
    """

    method: Literal["regmean"] = "regmean"
    alpha: Unit = 0.9
    """Share of the off-diagonal of each Gram matrix that is kept."""
    weighting: Literal["uniform", "examples"] = "uniform"
    gram: Annotated[Mapping[Word, Word], Field(max_length=SILOS)] = {"*": "full"}
    """Pattern of a weight's name to `full`, `block:<b>` or `diagonal`; the longest pattern that fits counts."""
    exclude: Patterns = ()
    """Patterns of linear weights that are averaged instead."""
    context_free: ContextFree = "mean"
    """What becomes of weights whose layer sees tokens without context, as the first behind the embeddings does.

    Which these are is found by running the base model. `mean` averages them, and nothing but their differences leaves.
    `diagonal` and `full` merge them in closed form, `full` as `gram` says. That gives the tokens away: anybody can
    compute what such a layer sees of each token, so the sum of the Gram matrices tells exactly which tokens occur in
    the silos' data, at which place, and how often; with few tokens and many features, the diagonal does too.
    """
    experts: Experts | None = None
    """What becomes of the experts of a mixture that are one parameter: `mean`, or `full` as `gram` says.

    By default it is `full` where each silo's statistics are read, and `mean` under secure aggregation: of an expert
    that only one silo uses, the sum of the Gram matrices is that silo's own.
    """
    tokens: Count = 100_000
    """Most token rows that a silo measures for one Gram matrix; its examples come in an order drawn by the seed."""
    rounds: Count = 1
    """Exchanges: in each after the first, silos go on from the merged model."""
    maximum_change: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """Most that a tensor may change, as a multiple of the norm that it has in the base.

    Silos keep no model that changes more, and do not measure it or go on from it.
    """
    layout: Sha256 | None = None
    """Digest of the layout; filled by `plan lock`."""

    @model_validator(mode="after")
    def _gram_patterns(self) -> Merge:
        for structure in self.gram.values():
            parse_structure(structure)
        return self

    def experts_in(self, *, secure: bool) -> Experts:
        """Return what becomes of the experts of a mixture.

        Args:
            secure: whether statistics leave under masks only.
        """
        return self.experts or ("mean" if secure else "full")


class Privacy(Section):
    """`[privacy]`: what the coordinator sees."""

    secure_aggregation: bool = True
    """Whether the coordinator sees sums over silos only, or each silo's statistics."""
    colluding: Annotated[int, Field(ge=0, le=LARGEST)] = 1
    """Silos that may be on the coordinator's side without the others' contributions being seen."""
    threshold: Count | None = None
    """Shares that open a silo's mask; by default the smallest that is safe."""
    minimum_survivors: Count | None = None
    """Fewest silos that a merge may be of; by default the threshold, or without secure aggregation all of them."""
    metrics: Literal["none", "sum", "silo"] = "sum"
    """Whether held-out metrics leave a silo: not at all, to be shown as a sum only, or silo by silo."""
    metrics_epsilon: Annotated[float, Field(ge=0.001, le=100)] | Literal["none"] = 2.0
    """The differential privacy of one held-out example in the secure sum of one candidate's metrics, at δ = 1e-5.

    `"none"` adds no noise; a silo takes part in such a plan only if its own file allows it.
    """
    candidates: Annotated[tuple[Literal["simple", "regmean"], ...], Field(min_length=1)] = ("simple", "regmean")
    """The models that silos measure in each round, in this order, and no others. `regmean` must be among them.

    `simple` is the plain average, a control. Each candidate costs `metrics-epsilon`.
    """

    @model_validator(mode="after")
    def _candidates(self) -> Privacy:
        if len(set(self.candidates)) != len(self.candidates) or "regmean" not in self.candidates:
            raise ValueError("'privacy.candidates' names each model once, and \"regmean\" among them")
        return self


class Silo(Section):
    """One `[[silo]]` of the roster."""

    name: Name
    public_key: Annotated[Sha256, AfterValidator(_identity_key)] | None = None
    """Ed25519 public key in hexadecimal, as `gramfuse silo keygen` prints it."""
    node_key: PublicNodeKey | None = None
    """P-384 public key that the silo's connection to the coordinator is authenticated with, as an OpenSSH line."""
    task: Name | None = None
    """Which `[[task]]` this silo has."""
    labels: Labels = ()
    """Labels that this silo annotates, if not all: the others are masked there, not taken as absent."""


class Plan(Section):
    """A whole plan."""

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
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        if twice:
            raise ValueError(f"[[silo]] names {', '.join(twice)} more than once")
        for keys in ([silo.public_key for silo in self.silo], [silo.node_key for silo in self.silo]):
            given = [key for key in keys if key is not None]
            if len(set(given)) != len(given):
                raise ValueError("[[silo]] names one key twice; every silo makes its own with: gramfuse silo keygen")
        if self.privacy.secure_aggregation:
            check_terms(len(self.silo), self.privacy.colluding, self.threshold, self.minimum_survivors)
        elif self.minimum_survivors > len(self.silo):
            raise ValueError(f"'privacy.minimum-survivors' is more than the {len(self.silo)} silos of the roster")
        return self

    @model_validator(mode="after")
    def _tasks(self) -> Plan:
        headless = [task.task for task in self.tasks.values() if kind_of(task).headless]
        if headless and self.model.head != "same":
            raise ValueError(f"task {headless[0]!r} has no head of its own: 'model.head' must be \"same\"")
        names = [task.name for task in self.task]
        if len(set(names)) != len(names):
            raise ValueError("[[task]] gives one name twice")
        if not names:
            for silo in self.silo:
                if silo.task is not None:
                    raise ValueError(
                        f"[[silo]] {silo.name!r} has the task {silo.task!r}, and there is no such [[task]]"
                    )
            return self
        if self.model.task is not None or self.model.head != "own":
            raise ValueError(
                "with [[task]] sections, silos share a body and keep their heads: 'model.head' must be \"own\", and "
                "'model.task' stands in each [[task]]"
            )
        for silo in self.silo:
            if silo.task not in names:
                raise ValueError(f"[[silo]] {silo.name!r} needs 'task', one of {', '.join(names)}")
        idle = set(names) - {silo.task for silo in self.silo}
        if idle:
            raise ValueError(f"no [[silo]] has the task {', '.join(sorted(idle))}")
        if self.privacy.metrics == "sum":
            raise ValueError(
                'results of different tasks do not add up over silos: \'privacy.metrics\' must be "silo" or "none"'
            )
        return self

    @model_validator(mode="after")
    def _masked_labels(self) -> Plan:
        masked, known = [silo for silo in self.silo if silo.labels], set(self.model.labels)
        if not masked:
            return self
        if self.model.task is None or not KINDS[self.model.task].partial_labels:
            some = " or ".join(f'"{kind.name}"' for kind in KINDS.values() if kind.partial_labels)
            raise ValueError(f"'labels' of a [[silo]] needs 'model.task' {some}")
        for silo in masked:
            unknown = [label for label in silo.labels if label not in known]
            if unknown:
                raise ValueError(f"[[silo]] {silo.name!r}: {unknown[0]!r} is not among 'model.labels'")
        if self.model.head == "own":
            return self
        dropouts = len(self.silo) - self.minimum_survivors
        secure = self.privacy.secure_aggregation
        needed = self.privacy.colluding + 2 + dropouts if secure else 1
        all_of_them = len(self.silo) - len(masked)
        annotated = Counter(label for silo in masked for label in set(silo.labels))
        for label in self.model.labels:
            held = all_of_them + annotated[label]
            if held < needed:
                raise ValueError(
                    f"label {label!r} is annotated by {held} silos, and its rows of the head would be merged over as "
                    f"few; it needs at least {needed}"
                    + (
                        f", of which {self.privacy.colluding} may collude and {dropouts} drop out: use "
                        'secure-aggregation = false, or model.head = "own"'
                        if secure
                        else ""
                    )
                )
        return self

    def task_of(self, silo: str) -> Task:
        """Return what a silo fine-tunes for, with the labels that it annotates.

        Raises:
            PlanError: if it is not in the roster, and silos have different tasks.
        """
        entry = next((entry for entry in self.silo if entry.name == silo), None)
        if not self.task:
            task = self._alone
            return MaskedTask(**dict(task), annotates=entry.labels) if entry and entry.labels else task
        if entry is None:
            raise PlanError(f"the plan has no [[silo]] {silo!r}, so none of its tasks is this silo's")
        return next(task for task in self.task if task.name == entry.task)

    @property
    def tasks(self) -> Mapping[str, Task]:
        """All tasks by name; the only one of a plan without [[task]] sections has none, and covers all labels."""
        return {task.name: task for task in self.task} or {"": self._alone}

    @property
    def _alone(self) -> Task:
        """The task that all silos have; with all that it needs where results leave in a sum."""
        task = self.model.alone
        return kind_of(task).for_sum(task) if self.summed else task

    @property
    def summed(self) -> bool:
        """Whether held-out results leave in a secure sum only."""
        return self.privacy.secure_aggregation and self.privacy.metrics == "sum"

    @property
    def epsilon(self) -> float | None:
        """The differential privacy of one held-out example in what leaves of one candidate; None without noise."""
        epsilon = self.privacy.metrics_epsilon
        return None if epsilon == "none" or not self.summed else epsilon

    @property
    def releases(self) -> int:
        """How many times held-out results leave: once for each candidate in each round."""
        return 0 if self.privacy.metrics == "none" else len(self.privacy.candidates) * self.merge.rounds

    def holders(self, label: str) -> tuple[str, ...]:
        """Return the silos that annotate a label, in roster order."""
        return tuple(silo.name for silo in self.silo if not silo.labels or label in silo.labels)

    @property
    def threshold(self) -> int:
        """Shares that open a silo's mask: as the plan says, or the smallest that is safe."""
        return self.privacy.threshold or smallest_threshold(len(self.silo), self.privacy.colluding)

    @property
    def minimum_survivors(self) -> int:
        """Fewest silos that a merge may be of."""
        if self.privacy.minimum_survivors is not None:
            return self.privacy.minimum_survivors
        return self.threshold if self.privacy.secure_aggregation else len(self.silo)

    @property
    def roster(self) -> Roster:
        """The silos and their keys, on the terms of a secure sum.

        Raises:
            PlanError: naming the silos that have no key.
        """
        missing = [silo.name for silo in self.silo if silo.public_key is None]
        if missing:
            raise PlanError(
                f"plan: no public key for {', '.join(missing)}; each of them runs gramfuse silo keygen, and the key "
                "that it prints goes into the plan as 'public-key' of its [[silo]]"
            )
        keys = {silo.name: bytes.fromhex(silo.public_key or "") for silo in self.silo}
        return Roster(self.digest, keys, self.threshold, self.minimum_survivors)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form: what both sides print, approve and put into every message."""
        return digest(self.document())

    @property
    def reading(self) -> str:
        """SHA-256 of what decides which of a silo's rows count and what they become, and not what is done with them."""
        model = self.model.model_dump(mode="json", by_alias=True, exclude={"base", "revision"})
        tasks = [task.model_dump(mode="json", by_alias=True) for task in self.task]
        drawn = {"tokens": self.merge.tokens, "batch": self.training.batch_size, "seed": self.training.seed}
        return digest({"model": model, "task": tasks, **drawn})

    def terms_of(self, silo: str) -> str:
        """SHA-256 of what the plan says of one silo alone, and its statistics depend on."""
        (entry,) = (entry for entry in self.silo if entry.name == silo)
        head = silo if self.model.head != "same" else ""  # the name is what a head of its own starts from
        return digest({"task": entry.task or "", "labels": list(entry.labels), "head": head})

    @property
    def names(self) -> tuple[str, ...]:
        """The silos, in roster order."""
        return tuple(silo.name for silo in self.silo)

    @property
    def locked(self) -> bool:
        """Whether the base model, weights, configuration and processor, and the layout are pinned."""
        return None not in (self.model.sha256, self.model.config, self.model.processor, self.merge.layout)

    @property
    def pins(self) -> Pins:
        """What the base model is held to."""
        return Pins(*(getattr(self.model, name) for name in Pins._fields))

    def document(self) -> dict[str, Any]:
        """Return the plan as the nested kebab-case document that its digest is taken of."""
        return self.model_dump(mode="json", by_alias=True)

    def to_toml(self) -> str:
        """Return the plan as TOML text; `Plan.parse` gives back an equal plan."""
        document = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        if not self.task:
            del document["task"]
        return tomlkit.dumps(document)

    def unlocked(self) -> Plan:
        """Return this plan without the digests of `plan lock`; a commit that it names stays."""
        return self.pinned(Pins(None, None, None, self.model.revision), None)

    def with_keys(self, keys: Mapping[str, str]) -> Plan:
        """Return this plan with other public keys, by silo."""
        roster = tuple(silo.model_copy(update={"public_key": keys[silo.name]}) for silo in self.silo)
        return self.model_copy(update={"silo": roster})

    def pinned(self, pins: Pins, layout: str | None) -> Plan:
        """Return this plan with what `plan lock` fills in: what the base model is held to, and the layout's digest."""
        return self.model_copy(
            update={
                "model": self.model.model_copy(update=pins._asdict()),
                "merge": self.merge.model_copy(update={"layout": layout}),
            }
        )

    def override(self, settings: Iterable[str]) -> Plan:
        """Return this plan with `section.key=value` settings applied and, if there are any, its lock removed.

        With another base model, a commit goes too, unless it is among the settings. Values are TOML
        (`merge.alpha=1.0`, `training.freeze=["*pooler*"]`); a bare word is a string.

        Raises:
            PlanError: for a setting without `=`, an unknown key or a value that does not fit.
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
                table = table.setdefault(key, {}) if isinstance(table, dict) else None
            if not isinstance(table, dict):
                raise PlanError(f"--set {setting}: {'.'.join(keys[:-1])!r} is not a table of the plan")
            table[keys[-1]] = _toml_value(text.strip())
        if settings:
            document["model"] |= dict.fromkeys(("sha256", "config", "processor"))
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
