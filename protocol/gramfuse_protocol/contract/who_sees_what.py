"""What leaves a silo, when, who can read it, in which mode, and under which assumption: stated once.

`gramfuse silo check`, `gramfuse plan show`, the page of a report and the model card say it in these words; the tables
in README.md and docs/threat-model.md are tested against `FACTS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Mode = Literal["secure", "open", "files"]
"""`secure`: statistics are summed under masks; `open`: the coordinator gets each silo's; `files`: whoever merges."""

Metrics = Literal["none", "sum", "silo"]
"""`privacy.metrics` of a plan."""

COORDINATOR = "the coordinator"
SILOS = "the coordinator, other silos"
NOBODY = "nobody"
SUMMED = "nobody: random words. Only the sum over at least {least} silos can be read"
"""Who can read a masked vector; `least` is how many silos are in a sum."""

EXAMPLES = "texts, labels, single predictions"
STATISTICS = "Gram matrices of its layers' inputs, weight differences, numbers of examples and of token rows"
ADDED = "tokens that were added to its model, as text, with their rows of the tables"
STATISTICS_SAY = (
    "A contribution in the clear is not harmless: the Gram matrix of few examples gives away which tokens stood where, "
    "and the base model with the weight differences added is the silo's own fine-tuned model."
)
MODEL_SAYS = (
    "What the merged model's weights say about the silos' data is not masked, and no noise is added to it: there is no "
    "differential privacy in the model."
)
SUM_SAYS = "The sum is not anonymous: it says something about the data of the silos in it together."

SOFTWARE, COLLUDE, KEYS = "Software", "Few collude", "Keys"
CRYPTOGRAPHY, NETWORK = "Cryptography", "The network"
MASKS = (SOFTWARE, COLLUDE, KEYS, CRYPTOGRAPHY)


@dataclass(frozen=True)
class Read:
    """How something leaves in one mode.

    Args:
        when: phases of a run in which it leaves, or what people do.
        readers: who can read it.
    """

    when: str
    readers: str


@dataclass(frozen=True)
class Fact:
    """Something that leaves a silo, or never does.

    Args:
        what: what it is.
        read: by mode; it does not leave in the others.
        assumptions: what the readers rest on, as docs/threat-model.md names it.
    """

    what: str
    read: Mapping[Mode, Read]
    assumptions: tuple[str, ...] = (SOFTWARE,)


def _in_runs(when: str, readers: str) -> dict[Mode, Read]:
    return {"secure": Read(when, readers), "open": Read(when, readers)}


FACTS: Mapping[str, Fact] = {
    "examples": Fact(EXAMPLES, {**_in_runs("never", NOBODY), "files": Read("never", NOBODY)}),
    "connection": Fact(
        "that the silo is there, its address, times and amounts",
        _in_runs("connection", "the coordinator, the network"),
    ),
    "presence": Fact(
        "that the silo takes part, or a refusal with its reason; the data are not touched",
        _in_runs("join", COORDINATOR),
    ),
    "failure": Fact(
        "that it failed, after it touched the data: one bit, without a reason",
        _in_runs("train, and all after it", COORDINATOR),
    ),
    "keys": Fact(
        "public keys for one session, signed with the silo's own key", {"secure": Read("keys", SILOS)}, (SOFTWARE, KEYS)
    ),
    "shares": Fact(
        "shares of the secrets behind its masks, sealed for one other silo each",
        {"secure": Read("shares", "the silo that it is for")},
        MASKS,
    ),
    "statistics": Fact(
        f"{STATISTICS}; in a sum also products of both",
        {
            "secure": Read("masked", SUMMED),
            "open": Read("train, upload", COORDINATOR),
            "files": Read("measure", "whoever has the file"),
        },
        (*MASKS, NETWORK),
    ),
    "added": Fact(
        f"{ADDED}, if there are any",
        {"files": Read("measure", "whoever has the file")},
    ),
    "signature": Fact(
        "its signature over the list of silos that are in the sum",
        {"secure": Read("survivors", SILOS)},
        (SOFTWARE, KEYS),
    ),
    "opening": Fact(
        "one share for each silo: what takes the masks off the sum, and off nothing else",
        {"secure": Read("unmask", COORDINATOR)},
        MASKS,
    ),
    "results": Fact(
        "held-out results: counts (right, wrong, of each label) or moments of a regression; in a sum with noise",
        {"secure": Read("evaluate, masked", SUMMED), "open": Read("evaluate", COORDINATOR)},
        (*MASKS, NETWORK),
    ),
    "end": Fact("that it wiped what it kept for the session", _in_runs("finish", COORDINATOR)),
}
"""Everything that leaves, by name, in the order of a run; `{least}` in readers is how many silos are in a sum."""

SHOWN: Mapping[Metrics, str] = {
    "none": "leave no silo",
    "sum": "are shown as a sum over silos only",
    "silo": "are shown silo by silo",
}
"""What becomes of metrics; "metrics" comes before it."""


def seen(mode: Mode, *, past: bool = False, least: str = "") -> str:
    """Say who sees statistics in a mode.

    Args:
        past: whether the run is over.
        least: fewest silos in a sum, if that is to be said.
    """
    who = "whoever merges" if mode == "files" else COORDINATOR
    what = (
        f"sums over {f'at least {least} ' if least else ''}silos only" if mode == "secure" else "each silo's statistics"
    )
    return f"{who} {'saw' if past else 'sees'} {what}"


def holds(colluding: int) -> str:
    """Say under which assumption nobody can read one silo's part of a sum.

    Args:
        colluding: most silos that may work together with the coordinator.
    """
    if colluding == 0:
        return "This holds as long as no silo works together with the coordinator, even if it lies to the silos."
    silos = "1 silo works" if colluding == 1 else f"{colluding} silos work"
    return f"This holds as long as at most {silos} together with the coordinator, even if it lies to the silos."


def results(metrics: Metrics, *, secure: bool, noise: bool) -> str:
    """Say what the coordinator sees of held-out results."""
    if metrics == "none":
        return "No results left a silo."
    if metrics == "silo":
        return "Each silo's held-out results as counts, in the clear."
    if secure:
        return f"Of held-out results the sum, in the same way{', and with noise' if noise else ''}."
    return "Each silo's held-out results as counts, of which the plan shows the sum only."


def row(name: str, least: str = "`minimum-survivors`") -> str:
    """Return a fact as a row of the README's table: what leaves in secure mode, when, and who can read it."""
    fact = FACTS[name]
    read = fact.read["secure"]
    return f"| {fact.what} | {read.when} | {read.readers.format(least=least)} |"


def full_row(name: str, least: str = "`minimum-survivors`") -> str:
    """Return a fact as a row of the threat model's table: in all modes, with the assumptions."""
    fact = FACTS[name]
    cells = (_cell(fact.read.get(mode), least) for mode in ("secure", "open", "files"))
    return f"| {fact.what} | {' | '.join(cells)} | {', '.join(fact.assumptions)} |"


def _cell(read: Read | None, least: str) -> str:
    return "does not leave" if read is None else f"{read.when}: {read.readers.format(least=least)}"


def leaving(mode: Mode) -> Iterator[str]:
    """Yield the names of the facts of a mode, in the order of a run."""
    yield from (name for name, fact in FACTS.items() if mode in fact.read)
