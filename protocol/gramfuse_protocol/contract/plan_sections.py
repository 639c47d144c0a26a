"""The sections of a plan: each key, its default, and what it may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from gramfuse_protocol.bounds import SILOS, Many
from gramfuse_protocol.contract.gram_structure import parse_structure
from gramfuse_protocol.contract.node_key import PublicNodeKey
from gramfuse_protocol.contract.task import Labels, Task, TaskKind, TaskSettings
from gramfuse_protocol.documents import Section
from gramfuse_protocol.secure_sum.keys import check_identity_key
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
    task: TaskKind | None = None
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
