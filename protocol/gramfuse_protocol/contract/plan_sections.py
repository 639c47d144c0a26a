"""The sections of a plan: each key, its default and its valid values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from gramfuse_protocol.bounds import SILOS, Many
from gramfuse_protocol.contract.gram_structure import parse_structure
from gramfuse_protocol.contract.node_key import PublicNodeKey
from gramfuse_protocol.contract.task import Labels, Task, TaskName, TaskSettings
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
"""How weights of context-free layers are merged; each value reveals more than the one before."""

Experts = Literal["mean", "full"]
"""How the experts of a mixture are merged; `full` reveals more than `mean`."""

Patterns = Annotated[Many[Word], Field(max_length=SILOS)]

LARGEST_RANK = 4096

ALL_LINEAR = "all-linear"

UNSUPPORTED_LORA = {
    "dora": "DoRA rescales the base's own weights, so the merge of adapters would not be exact",
    "use-dora": "DoRA rescales the base's own weights, so the merge of adapters would not be exact",
    "lora-bias": "a bias inside an adapter has no input that a Gram matrix could be measured on",
    "dropout": "silos would draw their own masks, and the result would depend on the device",
}
"""Keys of other kinds of adapters, with the reason why a plan has none."""

UNSUPPORTED_INIT = {
    **dict.fromkeys(
        ("pissa", "olora", "corda", "loftq", "lora-ga", "lora_ga"),
        "it changes the base's own weights, which must stay the same at all silos",
    ),
    "eva": "it depends on one silo's data, and all silos must have the same A",
}
"""Values of `init` elsewhere, with the reason why a plan has none."""


def _identity_key(text: str) -> str:
    check_identity_key(bytes.fromhex(text))
    return text


class Header(Section):
    """`[plan]`: name and version of this merge."""

    name: Name
    version: Count = 1


class Pins(NamedTuple):
    """The digests and the commit that the base model must match; each is None until the plan is locked.

    Args:
        sha256: digest of the weights.
        config: digest of the configuration.
        processor: digest of the tokenizer or image processor.
        revision: commit of the hub repository; None for a base model in a directory.
        adapters: digest of the frozen matrices of all adapters; None without adapters.
    """

    sha256: str | None
    config: str | None
    processor: str | None
    revision: str | None = None
    adapters: str | None = None


class _Start(Section):
    base: BaseName
    revision: Commit | None = None
    """Commit of the hub model to load; `plan lock` fills in the newest."""
    sha256: Sha256 | None = None
    """Digest of all initial weights, including the head if it is merged; filled in by `plan lock`."""
    config: Sha256 | None = None
    """Digest of the whole configuration, including generation settings; filled in by `plan lock`."""
    processor: Sha256 | None = None
    """Digest of the whole tokenizer or image processor; filled in by `plan lock`."""
    adapters: Sha256 | None = None
    """Digest of all matrices A of `[training.lora]`; filled in by `plan lock`."""
    task: TaskName | None = None
    head: Literal["fitted", "same", "different", "own"] | None = None
    """Where heads start from, and whether they are merged.

    `fitted`: an exchange before training fits one head in closed form, from which all silos start. `same`: all silos
    start from one head, that of the base's files or one of random weights; `different`: each starts from its own.
    `own`: heads are not merged. By default `plan lock` chooses `fitted` where silos have one task with exactly one of
    several labels and the base has no head for it, and otherwise `same`.
    """


class Model(TaskSettings, _Start):  # pydantic orders the keys of the last base first
    """`[model]`: the base model and the task.

    `task` and its settings are here if all silos have the same task, and otherwise in `[[task]]` sections.
    """

    @model_validator(mode="after")
    def _check_task(self) -> Model:
        if self.task is not None:
            _ = self.single_task
        return self

    @property
    def single_task(self) -> Task:
        """The task of this section; raises ValueError if it has none, or an inconsistent one."""
        if self.task is None:
            raise ValueError("[model] needs 'task', or the plan needs [[task]] sections")
        return Task(task=self.task, **{name: getattr(self, name) for name in TaskSettings.model_fields})


class NamedTask(Task):
    """One `[[task]]`: silos with different tasks share a body and keep their own heads."""

    name: Name


class Lora(Section):
    """`[training.lora]`: silos train adapters (LoRA; Hu et al., ICLR 2022) instead of the base's own weights.

    An adapter adds s · B A x to the output of a linear layer with input x. A, (rank, d_in), is the same at all silos
    and frozen; B, (d_out, rank), starts at zero and is trained and merged. The head is trained whole.
    """

    rank: Annotated[int, Field(ge=1, le=LARGEST_RANK)] = 16
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """Scales the adapters: s = alpha / rank."""
    rslora: bool = False
    """Whether s = alpha / √rank instead."""
    targets: Annotated[Many[Word], Field(min_length=1, max_length=SILOS)] = (ALL_LINEAR,)
    """Names of the modules that get an adapter, or the ends of their names, as in PEFT's `target_modules`.

    `"all-linear"` selects all linear layers of the body, but not those of a head or an output layer.
    """
    modules_to_save: Annotated[Many[Word], Field(max_length=SILOS)] = ()
    """Modules to train whole, besides the head and what is new in the model; names or their ends, as in PEFT."""
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    """How each A is drawn from `training.seed` and its module's name.

    `kaiming`: uniform with variance 1 / (3 d_in), PEFT's default. `gaussian`: normal with variance 1 / rank², PEFT's
    too. `orthogonal`: orthogonal rows, each as long as a row of `kaiming` is on average.
    """
    output: Literal["adapter", "merged", "both"] = "adapter"
    """What is written: an adapter for PEFT, the merged model with the adapter folded in, or both."""

    @model_validator(mode="before")
    @classmethod
    def _of_other_kinds(cls, values: object) -> object:
        """Refuse other kinds of adapters with the reason; a single target need not be a list."""
        if not isinstance(values, Mapping):
            return values
        for key, reason in UNSUPPORTED_LORA.items():
            if key in values:
                raise ValueError(f"{key!r} is not supported: {reason}")
        init = values.get("init")
        if isinstance(init, str) and init.lower() in UNSUPPORTED_INIT:
            raise ValueError(f"init = {init!r} is not supported: {UNSUPPORTED_INIT[init.lower()]}")
        listed = {"targets": [values["targets"]]} if isinstance(values.get("targets"), str) else {}
        # What a "before" validator returns is no longer JSON, and strict types take no list for a tuple.
        return {key: tuple(value) if isinstance(value, list) else value for key, value in {**values, **listed}.items()}

    @property
    def scale(self) -> float:
        """The factor s on B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Training(Section):
    """`[training]`: AdamW with linear warm-up and decay, the same at every silo."""

    epochs: Annotated[int, Field(ge=0, le=LARGEST)] = 5
    """Passes over the data in each round; 0 trains nothing: the fitted head on the base is the result."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    batch_size: Count = 16
    warmup: Unit = 0.06
    """Fraction of the steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products in training. Weights, optimizer and all measurements are float32."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Seed for new heads, the order of training examples, and the choice of measured examples."""
    freeze: Patterns = (EMBEDDINGS,)
    """Shell-style patterns of the parameters that are not trained and never leave a silo.

    The word `embeddings` selects all parameters that turn tokens, positions and patches into features, whatever their
    names in the model.
    """
    lora: Lora | None = None
    """Adapters to train instead of the base's own weights."""

    def in_round(self, number: int) -> Training:
        """Return the settings of a round, counted from 1: each round has its own seed, and so its own batches."""
        return self.model_copy(update={"seed": (self.seed + number - 1) % 2**32})


class Merge(Section):
    """`[merge]`: the closed-form merge and its statistics.

    Example:
        >>> merge = gramfuse.Merge(gram={"*": "full", "*.intermediate.*": "block:4"}, exclude=("*pooler*",))
        >>> len(gramfuse.derive_layout(base, batch, merge).groups) < len(layout.groups)
        True
    """

    method: Literal["regmean", "average"] = "regmean"
    """`regmean` merges linear weights in closed form. `average` averages all weights, and needs no Gram matrices."""
    refit: bool = False
    """Whether an exchange after the last round fits the head again, to the merged body's features."""
    alpha: Unit = 0.9
    """Factor on the off-diagonal entries of each Gram matrix."""
    weighting: Literal["uniform", "examples"] = "uniform"
    gram: Annotated[Mapping[Word, Word], Field(max_length=SILOS)] = {"*": "full"}
    """Maps a pattern of weight names to `full`, `block:<b>` or `diagonal`; the longest matching pattern wins."""
    exclude: Patterns = ()
    """Patterns of linear weights to average instead of merging in closed form."""
    context_free: ContextFree = "mean"
    """How to merge weights of context-free layers, such as the first layer after the embeddings.

    These layers are found by running the base model. `mean` averages their weights, so only differences leave a silo.
    `diagonal` and `full` merge them in closed form, `full` with the structure that `gram` names. That reveals the
    tokens: anyone can compute the input of such a layer for each token, so the sum of the Gram matrices reveals exactly
    which tokens occur in the silos' data, at which positions, and how often; with few tokens and many features, so does
    the diagonal.
    """
    experts: Experts | None = None
    """How to merge experts that are stored in one parameter: `mean`, or `full` with the structure that `gram` names.

    The default is `mean` under secure aggregation, and `full` otherwise: if only one silo uses an expert, the sum of
    the expert's Gram matrices is that silo's own.
    """
    tokens: Count = 100_000
    """Maximum number of token rows that a silo measures for one Gram matrix; the seed shuffles its examples."""
    rounds: Count = 1
    """Number of rounds; after the first, silos continue from the merged model."""
    maximum_change: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """Maximum change of a tensor, as a multiple of its norm in the base.

    Silos refuse a model that changes more: they do not keep it, measure it or continue from it.
    """
    layout: Sha256 | None = None
    """Digest of the layout; filled in by `plan lock`."""

    @model_validator(mode="after")
    def _gram_patterns(self) -> Merge:
        for structure in self.gram.values():
            parse_structure(structure)
        return self

    def experts_in(self, *, secure: bool) -> Experts:
        """Return how experts are merged.

        Args:
            secure: whether the plan uses secure aggregation.
        """
        return self.experts or ("mean" if secure else "full")


class Privacy(Section):
    """`[privacy]`: what the coordinator sees."""

    secure_aggregation: bool = True
    """Whether the coordinator sees only sums over silos, or each silo's statistics."""
    colluding: Annotated[int, Field(ge=0, le=LARGEST)] = 1
    """Number of silos that may collude with the coordinator without exposing the other silos' contributions."""
    threshold: Count | None = None
    """Number of shares that reconstruct a silo's secret; by default the smallest safe one."""
    minimum_survivors: Count | None = None
    """Minimum number of silos in a merge; by default the threshold, or all silos without secure aggregation."""
    metrics: Literal["none", "sum", "silo"] = "sum"
    """How held-out metrics leave a silo: not at all, as a sum over silos only, or silo by silo."""
    metrics_epsilon: Annotated[float, Field(ge=0.001, le=100)] | Literal["none"] = 2.0
    """The ε of one held-out example in the secure sum of one candidate's metrics, at δ = 1e-5.

    `"none"` adds no noise; a silo joins such a plan only if its own silo file allows it.
    """
    candidates: Annotated[tuple[Literal["simple", "regmean"], ...], Field(min_length=1)] = ("simple", "regmean")
    """The models that silos measure in each round, in order; `regmean` must be among them.

    `simple` is the plain average, a control; with `merge.method = "average"`, it is the merge, and the only candidate.
    Each costs `metrics-epsilon`. So do a head that is fitted again and a head without training, which are also
    measured.
    """

    @model_validator(mode="after")
    def _candidates(self) -> Privacy:
        if len(set(self.candidates)) != len(self.candidates) or "regmean" not in self.candidates:
            raise ValueError("'privacy.candidates' must name each model once and include \"regmean\"")
        return self


class Silo(Section):
    """One `[[silo]]` of the roster."""

    name: Name
    public_key: Annotated[Sha256, AfterValidator(_identity_key)] | None = None
    """Ed25519 public key in hexadecimal, as `gramfuse silo keygen` prints it."""
    node_key: PublicNodeKey | None = None
    """P-384 public key that authenticates the silo's connection to the coordinator, as an OpenSSH line."""
    task: Name | None = None
    """Name of this silo's `[[task]]`."""
    labels: Labels = ()
    """Labels that this silo annotates; by default all. The others are masked, not counted as absent."""
