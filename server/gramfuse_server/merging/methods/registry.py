"""The registry of methods: what the command line, a report and its page know of each.

To add one, write a file in this folder:

    @method(
        name="median",
        label="median",
        words="the median of the silos' parameters, one by one",
        paper="Yin et al., ICML 2018",
        needs=("models",),
    )
    def median(silos: Silos) -> Candidate:
        differences, _ = silos.parents()
        return Candidate({name: np.median([d[name] for d in differences], axis=0) for name in differences[0]})

`gramfuse simulate --compare median` then measures it, and tables show it as "median". Another package can do the same
before it calls gramfuse. A file must not load torch when it is imported: the command line reads it for `--help`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from gramfuse_protocol.contract.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gramfuse_model.loading.base_model import Base
    from gramfuse_protocol.contract.layout import Layout
    from gramfuse_protocol.held_out.metrics import Sums
    from gramfuse_server.merging.methods.arithmetic import Differences, Weights

Need = Literal["models", "data", "fisher"]
"""What a method takes of single silos: their models after one exchange, their training data, or their models' Fisher
information. Whoever needs any of it cannot have secure aggregation."""


class Silos(Protocol):
    """What a method may ask of the silos that are in a merge."""

    @property
    def plan(self) -> Plan:
        """What the silos agreed on."""

    @property
    def layout(self) -> Layout:
        """What is merged."""

    @property
    def names(self) -> Sequence[str]:
        """The silos, in roster order."""

    @property
    def base(self) -> Base:
        """The base model with the head of the first silo's task."""

    def start(self) -> Mapping[str, NDArray[np.float32]]:
        """Return the base model's parameters and buffers that are merged, by name."""

    def deltas(self, silo: str) -> Differences:
        """Return how a silo's own model differs from the base."""

    def parents(self) -> tuple[Sequence[Differences], Sequence[Weights]]:
        """Return the differences of all silos, zero where they count for nothing, and what they count for."""

    def fisher(self, silo: str, variant: str | None, examples: int) -> tuple[str, Differences]:
        """Return the variant, by default the one that fits the silo's task, and the diagonal Fisher information."""

    def measure(self, deltas: Differences) -> Mapping[str, Sums]:
        """Return the held-out sums of the base with differences added, by silo."""

    def metrics(self, sums: Mapping[str, Sums]) -> Mapping[str, float]:
        """Return the metrics of all silos together."""

    @property
    def ranked_by(self) -> str:
        """Which metric ranks models: the higher, the better."""

    def ask_together(self) -> Mapping[str, Sums]:
        """Return the held-out sums of all silos' own models asked together, by silo."""

    def train_jointly(self) -> Mapping[str, Sums]:
        """Return the held-out sums of the base fine-tuned on all silos' data, by silo."""

    def federate(self, rounds: int, after: Callable[[int, Differences], None]) -> Mapping[str, int]:
        """Run FedAvg, with a call after each round, and return the bytes that each silo sent."""

    def tell(self, name: str) -> None:
        """Tell whoever watches that something was measured."""


@dataclass(frozen=True)
class Candidate:
    """One model that a method made, to be measured.

    Args:
        deltas: its differences from the base, by parameter name.
        about: how it was made; tables show it in brackets.
        more: what else a report says of it, by name of a field of `gramfuse_server.report.schema.Measured`; `note` is
            shown beside it.
    """

    deltas: Differences
    about: Sequence[str] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CandidateSums:
    """What a method measured itself, where there is not one model that could be.

    Args:
        sums: held-out sums by silo.
        about, more: as `Candidate` has them.
    """

    sums: Mapping[str, Sums]
    about: Sequence[str] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


class NotAllowed(NamedTuple):
    """A plan under which a method cannot be had.

    Args:
        applies: whether a plan is one.
        why: and what to do, for the error.
    """

    applies: Callable[[Plan], bool]
    why: str


class Options(NamedTuple):
    """What may stand behind a method's name.

    Args:
        written: how, for `--help`.
        words: what it means and what is taken without it, for `--help`.
        parse: takes what stands between colons, and returns keyword arguments of the method, all of them; raises
            ValueError saying what is wrong.
    """

    written: str
    words: str
    parse: Callable[[Sequence[str]], dict[str, Any]]


def _nothing(values: Sequence[str]) -> dict[str, Any]:
    if values:
        raise ValueError("it has no options")
    return {}


NOTHING = Options("", "", _nothing)


def number(name: str, default: float, most: float, words: str) -> Options:
    """Return the options of a method that has one: a number above 0, of the type of its default.

    Args:
        words: as `Options` has them.
    """

    def parse(values: Sequence[str]) -> dict[str, Any]:
        try:
            (value,) = map(type(default), values) if values else (default,)
        except ValueError:
            value = type(default)(0)
        if not 0 < value <= most:
            raise ValueError(f"{name} is one {'whole ' if type(default) is int else ''}number in (0, {most:g}]")
        return {name: value}

    return Options(f"[:{name.upper()}]", words, parse)


@dataclass(frozen=True)
class Method:
    """One way to put silos' models together.

    Args:
        name: on the command line, and as the `kind` of a model in a report.
        label: in tables.
        words: what it is, for `--help` and for a report's page.
        make: called with the silos and, by name, with the options.
        paper: where it comes from.
        options: what may stand behind its name.
        needs: what of single silos it takes.
        refusals: plans under which it cannot be had, beside those that follow from its needs.
        ready: raises PlanError if something that it works with is not installed.
        always: whether every run measures it, so that nobody has to ask for it.
    """

    name: str
    label: str
    words: str
    make: Callable[..., Candidate | CandidateSums]
    paper: str = ""
    options: Options = NOTHING
    needs: Sequence[Need] = ()
    refusals: Sequence[NotAllowed] = ()
    ready: Callable[[], Any] = lambda: None
    always: bool = False


METHODS: dict[str, Method] = {}
"""All methods by name."""

Make = Callable[..., Candidate | CandidateSums]


def method(**about: Any) -> Callable[[Make], Make]:
    """Register a function as a method; keyword arguments as `Method` has them.

    Raises:
        ValueError: if there is one of this name, or no command line could name it.
    """

    def register(make: Make) -> Make:
        one = Method(make=make, **about)
        if one.name in METHODS or not one.name or set(one.name) & set(",: "):
            raise ValueError(f"a method is called {one.name!r}, which is taken, or no name for one")
        METHODS[one.name] = one
        return make

    return register


DIFFERENT_TASKS = NotAllowed(
    lambda plan: bool(plan.task),
    "the silos have different tasks, so neither their outputs nor their data can be put together; leave it out",
)

OF_NEEDS: tuple[tuple[frozenset[Need], NotAllowed], ...] = (
    (
        frozenset(("models", "data", "fisher")),
        NotAllowed(
            lambda plan: plan.privacy.secure_aggregation,
            "needs each silo's own model or data, and with privacy.secure-aggregation all that is seen is their sum. "
            "If all silos' data may be seen on this machine, simulate in open mode with --open; or compare with simple "
            "only",
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
            "is of the models that silos have after one exchange; use --set merge.rounds=1",
        ),
    ),
)
"""Plans under which no method can be had that needs any of these."""


def refused(method: Method) -> tuple[NotAllowed, ...]:
    """Return all plans under which a method cannot be had."""
    return (*(refusal for needs, refusal in OF_NEEDS if needs & set(method.needs)), *method.refusals)
