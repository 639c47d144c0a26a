"""The registry of merge methods, used by the command line, the report and its page.

To add one, write a file in this folder:

    @method(
        name="median",
        label="median",
        words="the median of the silos' parameters, one by one",
        paper="Yin et al., ICML 2018",
        needs=("models",),
    )
    def median(silos: Silos) -> MethodModel:
        differences, _ = silos.parents()
        return MethodModel({name: np.median([d[name] for d in differences], axis=0) for name in differences[0]})

`gramfuse simulate --compare median` then measures it, and tables show it as "median". Other packages can register
methods too, before they call gramfuse. The file must not import torch at module level: the command line imports it for
`--help`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.tasks.registry import kind_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gramfuse_model.loading.base_model import Base
    from gramfuse_protocol.contract.layout import Layout
    from gramfuse_protocol.held_out.metrics import Sums
    from gramfuse_protocol.statistics.head_sums import HeadSums
    from gramfuse_server.merging.closed_form_head import Head
    from gramfuse_server.merging.methods.arithmetic import Differences, Weights

Need = Literal["models", "data", "fisher"]
"""What a method needs from single silos: their models after one exchange, their training data, or their models' Fisher
information. Any of it rules out secure aggregation."""


class Silos(Protocol):
    """The silos in a merge, as a method sees them."""

    @property
    def plan(self) -> Plan:
        """The plan of the run."""

    @property
    def layout(self) -> Layout:
        """The layout of the merge."""

    @property
    def names(self) -> Sequence[str]:
        """The silos, in roster order."""

    @property
    def base(self) -> Base:
        """The base model with the head of the first silo's task."""

    def start(self) -> Mapping[str, NDArray[np.float32]]:
        """Return the base model's merged parameters and buffers, by name."""

    def deltas(self, silo: str) -> Differences:
        """Return the differences of a silo's own model from the base."""

    def parents(self) -> tuple[Sequence[Differences], Sequence[Weights]]:
        """Return the differences of all silos, zero where their weight is zero, and their weights."""

    def fisher(self, silo: str, variant: str | None, examples: int) -> tuple[str, Differences]:
        """Return the Fisher variant, by default the one for the silo's task, and the diagonal Fisher information."""

    def measure(self, deltas: Differences) -> Mapping[str, Sums]:
        """Return the held-out sums of base + deltas, by silo."""

    def metrics(self, sums: Mapping[str, Sums]) -> Mapping[str, float]:
        """Return the metrics of all silos together."""

    @property
    def ranked_by(self) -> str:
        """The metric that ranks models; higher is better."""

    def ask_together(self) -> Mapping[str, Sums]:
        """Return the held-out sums of the ensemble of all silos' own models, by silo."""

    def train_jointly(self, *, cold: bool) -> Mapping[str, Sums]:
        """Return the held-out sums of a model trained on all silos' data, by silo; it starts as silos do, or cold."""

    def merged(self) -> Differences:
        """Return the run's merge: its differences from the base."""

    @property
    def head_fit(self) -> str:
        """How a head of the silos' task is fitted in closed form (`gramfuse_protocol.tasks.registry.TaskKind.fit`)."""

    def head_sums(self, deltas: Differences, pooling: str) -> HeadSums:
        """Return the moments of the features of all silos' training examples, for the base with differences added."""

    def measure_head(self, deltas: Differences, head: Head, pooling: str) -> Mapping[str, Sums]:
        """Return the held-out sums of the base with differences added and another last layer, by silo."""

    def federate(self, rounds: int, after: Callable[[int, Differences], None]) -> Mapping[str, int]:
        """Run FedAvg, call `after` with each round and its average, and return the bytes that each silo sent."""

    def tell(self, name: str) -> None:
        """Tell the observer that a model was measured."""


@dataclass(frozen=True)
class MethodModel:
    """A model made by a method, to be measured.

    Args:
        deltas: its differences from the base, by parameter name.
        about: details, shown in brackets after its name.
        more: further fields of its `gramfuse_server.report.schema.Measured`, by name; `note` is shown beside it.
    """

    deltas: Differences
    about: Sequence[str] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodSums:
    """Results of a method that does not produce a single model and measures itself.

    Args:
        sums: held-out sums by silo.
        about, more: as in `MethodModel`.
    """

    sums: Mapping[str, Sums]
    about: Sequence[str] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


class NotAllowed(NamedTuple):
    """A condition on plans under which a method is not available.

    Args:
        applies: whether a plan meets the condition.
        why: the reason and the remedy, for the error.
    """

    applies: Callable[[Plan], bool]
    why: str


class Options(NamedTuple):
    """The options that can follow a method's name.

    Args:
        written: their syntax, for `--help`.
        words: their meaning and defaults, for `--help`.
        parse: takes the values between colons and returns all keyword arguments of the method; raises ValueError with
            the problem.
    """

    written: str
    words: str
    parse: Callable[[Sequence[str]], dict[str, Any]]


def _nothing(values: Sequence[str]) -> dict[str, Any]:
    if values:
        raise ValueError("it takes no options")
    return {}


NOTHING = Options("", "", _nothing)


def one_of(name: str, default: str, other: str, words: str) -> Options:
    """Return the options of a method with one choice between two words."""

    def parse(values: Sequence[str]) -> dict[str, Any]:
        if len(values) > 1 or not set(values) <= {default, other}:
            raise ValueError(f"{name} is {default} or {other}")
        return {name: values[0] if values else default}

    return Options(f"[:{name.upper()}]", words, parse)


def number(name: str, default: float, most: float, words: str) -> Options:
    """Return the options of a method with a single numeric option, above 0, of the type of its default.

    Args:
        words: as in `Options`.
    """

    def parse(values: Sequence[str]) -> dict[str, Any]:
        try:
            (value,) = map(type(default), values) if values else (default,)
        except ValueError:
            value = type(default)(0)
        if not 0 < value <= most:
            raise ValueError(f"{name} must be one {'whole ' if type(default) is int else ''}number in (0, {most:g}]")
        return {name: value}

    return Options(f"[:{name.upper()}]", words, parse)


@dataclass(frozen=True)
class Method:
    """A method of merging silos' models.

    Args:
        name: on the command line, and the `kind` of its models in a report.
        label: in tables.
        words: description, for `--help` and the report's page.
        make: called with the silos, and with the options as keyword arguments.
        paper: its source.
        options: the options that can follow its name.
        needs: what it needs from single silos.
        refusals: conditions under which it is not available, beside those that follow from its needs.
        ready: raises PlanError if a library that it needs is not installed.
        always: whether every run measures it without being asked.
    """

    name: str
    label: str
    words: str
    make: Callable[..., MethodModel | MethodSums]
    paper: str = ""
    options: Options = NOTHING
    needs: Sequence[Need] = ()
    refusals: Sequence[NotAllowed] = ()
    ready: Callable[[], Any] = lambda: None
    always: bool = False


METHODS: dict[str, Method] = {}
"""All methods by name."""

Make = Callable[..., MethodModel | MethodSums]


def method(**about: Any) -> Callable[[Make], Make]:
    """Register a function as a method; keyword arguments as in `Method`.

    Raises:
        ValueError: if the name is taken, or cannot be used on a command line.
    """

    def register(make: Make) -> Make:
        entry = Method(make=make, **about)
        if entry.name in METHODS or not entry.name or set(entry.name) & set(",: "):
            raise ValueError(f"the method name {entry.name!r} is taken or invalid")
        METHODS[entry.name] = entry
        return make

    return register


DIFFERENT_TASKS = NotAllowed(
    lambda plan: bool(plan.task),
    "the silos have different tasks, so neither their outputs nor their data can be combined; leave it out",
)

MASKED = NotAllowed(
    lambda plan: any(silo.labels and kind_of(plan.task_of(silo.name)).exclusive for silo in plan.silo),
    "silos annotate different classes ('labels' of a [[silo]]), so a label of one silo does not rule out another "
    "silo's class; leave it out",
)

UNTRAINED = NotAllowed(
    lambda plan: plan.training.epochs == 0,
    "needs fine-tuned models, but training.epochs = 0 trains none; use --set training.epochs=5, for instance",
)

OF_NEEDS: tuple[tuple[frozenset[Need], NotAllowed], ...] = (
    (
        frozenset(("models", "data", "fisher")),
        NotAllowed(
            lambda plan: plan.privacy.secure_aggregation,
            "needs each silo's own model or data, but privacy.secure-aggregation reveals only their sum. If this "
            "machine may see all silos' data, simulate in open mode with --open; or compare with simple only",
        ),
    ),
    (
        frozenset(("models", "data", "fisher")),
        NotAllowed(
            lambda plan: plan.privacy.metrics == "none",
            'privacy.metrics = "none" lets no metrics leave; use --set privacy.metrics=sum',
        ),
    ),
    (
        frozenset(("models", "fisher")),
        NotAllowed(
            lambda plan: plan.merge.rounds > 1,
            "needs the silos' models after a single exchange; use --set merge.rounds=1",
        ),
    ),
    (
        frozenset(("models", "fisher")),
        UNTRAINED,
    ),
)
"""Conditions under which methods with any of these needs are not available."""


def refused(method: Method) -> tuple[NotAllowed, ...]:
    """Return all conditions under which a method is not available."""
    return (*(refusal for needs, refusal in OF_NEEDS if needs & set(method.needs)), *method.refusals)
