"""What leaves a silo, when, who can read it, in which mode, and under which assumptions: the single source.

`gramfuse silo check`, `gramfuse plan show`, report pages and model cards use these texts; the tables in README.md and
docs/threat-model.md are tested against `FACTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Mode = Literal["secure", "open", "files"]
"""`secure`: the coordinator receives masked statistics and learns their sum; `open`: it receives each silo's
statistics; `files`: whoever merges receives files."""

Metrics = Literal["none", "sum", "silo"]
"""Values of a plan's `privacy.metrics`."""

COORDINATOR = "the coordinator"
SILOS = "the coordinator, other silos"
NOBODY = "nobody"
SUMMED = "nobody: random words. Only the sum over at least {least} silos can be read"
"""Who can read a masked vector; `least` is the minimum number of silos in a sum."""

EXAMPLES = "texts, labels, single predictions"
STATISTICS = "Gram matrices of its layers' inputs, weight differences, numbers of examples and of token rows"
OF_HEAD = (
    "of the features that enter the head: their products in pairs, their sum for each label (or times the targets), "
    "and the number of examples of each label"
)
ADDED = "tokens added to its model, as text, with their embedding rows"
MATRICES = "the matrices A of an adapter that was trained elsewhere"
STATISTICS_SAY = (
    "A contribution in the clear is not harmless: the Gram matrix of few examples reveals which tokens occurred where, "
    "and the base model plus the weight differences is the silo's own fine-tuned model."
)
MODEL_SAYS = (
    "The merged model's weights can reveal information about the silos' data. No noise is added to them: the model has "
    "no differential privacy."
)
SUM_SAYS = "The sum is not anonymous: it reveals something about the combined data of the silos in it."

SOFTWARE, COLLUDE, KEYS = "Software", "Few collude", "Keys"
CRYPTOGRAPHY, NETWORK = "Cryptography", "The network"
MASKS = (SOFTWARE, COLLUDE, KEYS, CRYPTOGRAPHY)


@dataclass(frozen=True)
class Read:
    """When something leaves a silo in one mode, and who can read it.

    Args:
        when: the phases of a run in which it leaves, or the command that writes it.
        readers: who can read it.
    """

    when: str
    readers: str


@dataclass(frozen=True)
class Fact:
    """Something that leaves a silo, or never does.

    Args:
        what: a description.
        read: by mode; it does not leave in modes that are not listed.
        assumptions: what this depends on, by the names in docs/threat-model.md.
    """

    what: str
    read: Mapping[Mode, Read]
    assumptions: tuple[str, ...] = (SOFTWARE,)


def _in_runs(when: str, readers: str) -> dict[Mode, Read]:
    return {"secure": Read(when, readers), "open": Read(when, readers)}


FACTS: Mapping[str, Fact] = {
    "examples": Fact(EXAMPLES, {**_in_runs("never", NOBODY), "files": Read("never", NOBODY)}),
    "connection": Fact(
        "its presence and address, and the times and sizes of messages",
        _in_runs("connection", "the coordinator, the network"),
    ),
    "presence": Fact(
        "its consent to take part, or a refusal with the reason; the data are not touched",
        _in_runs("join", COORDINATOR),
    ),
    "failure": Fact(
        "a failure after it touched the data: one bit, without a reason",
        _in_runs("train, and all after it", COORDINATOR),
    ),
    "keys": Fact(
        "public keys for one session, signed with the silo's own key", {"secure": Read("keys", SILOS)}, (SOFTWARE, KEYS)
    ),
    "shares": Fact(
        "shares of the secrets behind its masks, each encrypted for one other silo",
        {"secure": Read("shares", "the silo that the share is for")},
        MASKS,
    ),
    "statistics": Fact(
        f"{STATISTICS}; in a sum also their products",
        {
            "secure": Read("masked", SUMMED),
            "open": Read("train, upload", COORDINATOR),
            "files": Read("measure", "whoever has the file"),
        },
        (*MASKS, NETWORK),
    ),
    "head": Fact(
        f"if the head is fitted: sums over its examples {OF_HEAD}",
        {
            "secure": Read("masked", SUMMED),
            "open": Read("upload", COORDINATOR),
            "files": Read("head measure", "whoever has the file"),
        },
        (*MASKS, NETWORK),
    ),
    "added": Fact(
        f"{ADDED}, and {MATRICES}, if any",
        {"files": Read("measure", "whoever has the file")},
    ),
    "signature": Fact(
        "its signature over the list of silos in the sum",
        {"secure": Read("survivors", SILOS)},
        (SOFTWARE, KEYS),
    ),
    "opening": Fact(
        "one share for each silo, which unmasks the sum and nothing else",
        {"secure": Read("unmask", COORDINATOR)},
        MASKS,
    ),
    "results": Fact(
        "results on held-out examples, and if the head is fitted again on validation examples: counts (right, wrong, "
        "for each label) or regression moments; with noise in a sum",
        {"secure": Read("evaluate, masked", SUMMED), "open": Read("evaluate", COORDINATOR)},
        (*MASKS, NETWORK),
    ),
    "end": Fact("confirmation that it wiped its session state", _in_runs("finish", COORDINATOR)),
}
"""Everything that leaves, by name, in the order of a run; `{least}` is the minimum number of silos in a sum."""

SHOWN: Mapping[Metrics, str] = {
    "none": "leave no silo",
    "sum": "are shown as a sum over silos only",
    "silo": "are shown silo by silo",
}
"""How metrics are shown: completes a sentence that begins with "metrics"."""


def seen(mode: Mode, *, past: bool = False, least: str = "") -> str:
    """Return a clause that says who sees which statistics in a mode.

    Args:
        past: whether the run is over.
        least: minimum number of silos in a sum, to mention it.
    """
    reader = "whoever merges" if mode == "files" else COORDINATOR
    statistics = (
        f"sums over {f'at least {least} ' if least else ''}silos only" if mode == "secure" else "each silo's statistics"
    )
    return f"{reader} {'saw' if past else 'sees'} {statistics}"


def holds(colluding: int) -> str:
    """Return the sentence that says under which assumption a silo's part of a sum stays hidden.

    Args:
        colluding: maximum number of silos that collude with the coordinator.
    """
    if colluding == 0:
        return "This holds as long as no silo colludes with the coordinator, even if the coordinator lies to the silos."
    silos = "1 silo colludes" if colluding == 1 else f"{colluding} silos collude"
    return f"This holds as long as at most {silos} with the coordinator, even if the coordinator lies to the silos."


def results(metrics: Metrics, *, secure: bool, noise: bool) -> str:
    """Return a sentence that says what the coordinator saw of held-out results."""
    if metrics == "none":
        return "No results left a silo."
    if metrics == "silo":
        return "Each silo's held-out results, as counts in the clear."
    if secure:
        return f"The sum of the silos' held-out results{', with noise' if noise else ''}."
    return "Each silo's held-out results as counts; the report shows only their sum."
