"""What `gramfuse simulate --compare` can be asked for, and which of it a plan allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import click

from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.plan import Plan

FISHER_EXAMPLES = 256
FISHER_VARIANTS = ("hard", "soft", "empirical")
FISHER_NORMS = {"tensor": "per tensor", "model": "per model", "none": "none"}


@dataclass(frozen=True)
class Term:
    """One model to compare with.

    Args:
        text: as it was written.
        kind: what stands before the first colon.
        options: what stands behind it, by name, and what was left out as KINDS says.
    """

    text: str
    kind: str
    options: Mapping[str, Any]


def parse_terms(text: str) -> tuple[Term, ...]:
    """Parse terms between commas; one that comes twice counts once.

    Raises:
        ValueError: saying which term is wrong, and what there is.
    """
    return tuple({term.text: term for term in (_parse(part.strip()) for part in text.split(","))}.values())


def _parse(text: str) -> Term:
    name, *values = text.split(":")
    kind = KINDS.get(name)
    if kind is None:
        raise ValueError(f"{text!r} is nothing to compare with; there are {', '.join(KINDS)}")
    try:
        return Term(text, name, kind.parse(values))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; expected {name}{kind.options}") from None


def _fisher(values: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {"variant": None, "norm": "per tensor", "examples": FISHER_EXAMPLES}
    for value in values:
        if value in FISHER_VARIANTS:
            options["variant"] = value
        elif value in FISHER_NORMS:
            options["norm"] = FISHER_NORMS[value]
        elif value.isascii() and value.isdigit() and int(value):
            options["examples"] = int(value)
        else:
            raise ValueError(f"{value!r} is neither a variant, nor a norm, nor a number of examples")
    return options


def _nothing(values: list[str]) -> dict[str, Any]:
    if values:
        raise ValueError("it has no options")
    return {}


def _number(name: str, default: float, most: float) -> Callable[[list[str]], dict[str, Any]]:
    """Return what parses at most one number above 0, of the type of its default."""

    def parse(values: list[str]) -> dict[str, Any]:
        try:
            (number,) = map(type(default), values) if values else (default,)
        except ValueError:
            number = type(default)(0)
        if not 0 < number <= most:
            raise ValueError(f"{name} is one {'whole ' if type(default) is int else ''}number in (0, {most:g}]")
        return {name: number}

    return parse


class Kind(NamedTuple):
    """One kind of model to compare with: its options as they are written, what it is, and what parses its options."""

    options: str
    meaning: str
    parse: Callable[[list[str]], dict[str, Any]]


KINDS = {
    "simple": Kind("", "the weighted mean of the silos' models; always measured", _nothing),
    "fisher": Kind(
        "[:hard|soft|empirical][:tensor|model|none][:EXAMPLES]",
        "the mean weighed by each parameter's Fisher information: of the likeliest label, of all, or of the true one; "
        "normalised per tensor, per model, or not at all; over 256 examples of each silo",
        _fisher,
    ),
    "ensemble": Kind("", "all silos' models asked together: mean of logits, majority vote on generated text", _nothing),
    "joint": Kind("", "one model fine-tuned on the data of all silos, as if they could be pooled", _nothing),
    "best": Kind("", "the one silo's model that does best on the very data that are reported", _nothing),
    "fedavg": Kind(
        "[:ROUNDS]", "Flower's FedAvg, 5 rounds, each with all of the plan's local training", _number("rounds", 5, 1000)
    ),
    "task-arithmetic": Kind(
        "[:SCALE]", "the base plus 0.3 times the sum of all differences", _number("scale", 0.3, 100)
    ),
    "ties": Kind(
        "[:DENSITY]",
        "the largest 0.2 of each silo's differences, signs elected, and the mean of those that agree",
        _number("density", 0.2, 1),
    ),
    "transport": Kind("", "hidden units of two silos' models matched by optimal transport, then the mean", _nothing),
}
"""All kinds by name."""


def compare_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --compare."""

    def parse(_: click.Context, __: click.Parameter, text: str | None) -> tuple[Term, ...]:
        try:
            return () if text is None else parse_terms(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    explained = "\n\n".join(f"{name}{kind.options}: {kind.meaning}." for name, kind in KINDS.items())
    return click.option(
        "--compare",
        callback=parse,
        metavar="TERM,…",
        help="Measure other models on the same held-out examples, for instance fisher:soft,ensemble,fedavg:5. All but "
        f"simple need open mode (see --open).\n\n{explained}",
    )(command)


def check_terms(terms: tuple[Term, ...], plan: Plan) -> None:
    """Raise PlanError, naming the terms and saying what to do, if a plan does not allow all that is asked for."""
    for kinds, applies, why in _REFUSALS:
        refused = [term.text for term in terms if term.kind in kinds]
        if refused and applies(plan):
            raise PlanError(f"--compare {','.join(refused)}: {why}")
    for term in terms:
        if term.kind == "fisher":
            from gramfuse_client.fisher import choose_variant

            for task in plan.tasks.values():
                choose_variant(task, term.options["variant"])
        if term.kind == "transport":
            from gramfuse_server.transport import load_pot

            load_pot()


_MERGES = ("fisher", "ensemble", "best", "task-arithmetic", "ties", "transport")
_ALL = (*_MERGES, "joint", "fedavg")

_REFUSALS: tuple[tuple[tuple[str, ...], Callable[[Plan], bool], str], ...] = (
    (
        _ALL,
        lambda plan: plan.privacy.secure_aggregation,
        "needs each silo's own model or data, and with privacy.secure-aggregation all that is seen is their sum. If "
        "all silos' data may be seen on this machine, simulate in open mode with --open; or compare with simple only",
    ),
    (
        _ALL,
        lambda plan: plan.privacy.metrics == "none",
        'privacy.metrics = "none" lets no metrics leave; use --set privacy.metrics=sum',
    ),
    (
        _MERGES,
        lambda plan: plan.merge.rounds > 1,
        "is of the models that silos have after one exchange; use --set merge.rounds=1",
    ),
    (
        ("ensemble", "joint"),
        lambda plan: bool(plan.task),
        "the silos have different tasks, so neither their outputs nor their data can be put together; leave it out",
    ),
    (
        ("fedavg",),
        lambda plan: plan.model.head == "own",
        "Flower's FedAvg averages whole models, and here heads stay at their silos; leave it out",
    ),
    (
        ("fedavg",),
        lambda plan: any(silo.labels for silo in plan.silo),
        "silos annotate different labels ('labels' of a [[silo]]), and Flower's FedAvg would average the outputs for "
        "labels that a silo does not annotate; leave it out",
    ),
    (
        ("joint",),
        lambda plan: plan.model.task == "classification" and any(silo.labels for silo in plan.silo),
        "silos annotate different classes ('labels' of a [[silo]]), so a label of one silo does not say that another's "
        "class is absent; leave it out",
    ),
    (
        ("transport",),
        lambda plan: len(plan.silo) != 2,
        "the hidden units of two models are matched, so the plan must have two silos; leave it out",
    ),
)
