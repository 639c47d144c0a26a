"""What leaves a silo, and who can read it: stated once, and said in the same words wherever people read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gramfuse_client.guard.disclosure import disclose
from gramfuse_protocol.contract.layout import Layout, Tensor
from gramfuse_protocol.contract.who_sees_what import FACTS, STATISTICS_SAY, Mode, Read, holds, seen
from gramfuse_protocol.messages.phases import REPLIES
from tests.pages import SILOS, Checked, card, open_run, page, plan_of, secure_run

ROOT = Path(__file__).parents[2]
LAYOUT = Layout(groups=(), tensors=(Tensor(name="bias", shape=(2,), merge="mean"),), frozen=())
LEAST = "`minimum-survivors`"


def row(name: str) -> str:
    """Return a fact as a row of the README's table: what leaves in secure mode, when, and who can read it."""
    fact = FACTS[name]
    read = fact.read["secure"]
    return f"| {fact.what} | {read.when} | {read.readers.format(least=LEAST)} |"


def full_row(name: str) -> str:
    """Return a fact as a row of the threat model's table: in all modes, with the assumptions."""
    fact = FACTS[name]
    cells = (_cell(fact.read.get(mode)) for mode in ("secure", "open", "files"))
    return f"| {fact.what} | {' | '.join(cells)} | {', '.join(fact.assumptions)} |"


def _cell(read: Read | None) -> str:
    return "does not leave" if read is None else f"{read.when}: {read.readers.format(least=LEAST)}"


def leaving(mode: Mode) -> Iterator[str]:
    """Yield the names of the facts of a mode, in the order of a run."""
    yield from (name for name, fact in FACTS.items() if mode in fact.read)


def test_readme_and_threat_model_have_every_fact_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## What leaves a silo\n")[1].split("\n## ")[0]
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert rows[2:] == [row(name) for name in leaving("secure")]
    model = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    table = model.split("## What leaves a silo\n")[1].split("\n## ")[0]
    assert [line for line in table.splitlines() if line.startswith("|")][2:] == [full_row(name) for name in FACTS]


def test_every_assumption_is_one_of_the_threat_model() -> None:
    model = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    for fact in FACTS.values():
        for assumption in fact.assumptions:
            assert f". **{assumption}" in model, assumption


@pytest.mark.parametrize("mode", ["secure", "open"])
def test_every_message_that_leaves_is_a_fact_and_every_fact_that_leaves_is_a_message(mode: Mode) -> None:
    found = disclose(SILOS[0], plan_of(secure=mode == "secure"), LAYOUT)
    phases = {departure.phase for departure in found.departures} - {"any"}
    said = {phase for name in leaving(mode) for phase in FACTS[name].read[mode].when.replace(",", "").split()}
    assert phases <= said
    assert said - phases <= {"never", "and", "all", "after", "it"}


def test_every_phase_of_the_protocol_is_in_a_fact() -> None:
    named = {
        word for fact in FACTS.values() for read in fact.read.values() for word in read.when.replace(",", "").split()
    }
    assert set(REPLIES) - {"refusal"} <= named


def test_page_card_and_check_say_it_in_these_words() -> None:
    cases: list[tuple[Any, Mode]] = [(secure_run(), "secure"), (open_run(), "open")]
    for (report, plan), mode in cases:
        shown = Checked(page(report, plan)).text
        assert seen(mode) in shown
        assert seen(mode, past=True) in card(plan, SILOS, report["models"][-1])
        claims = " ".join(disclose(SILOS[0], plan, LAYOUT).claims)
        assert (STATISTICS_SAY in shown) is (STATISTICS_SAY in claims) is (mode == "open")
        for text in (shown, claims):
            assert (holds(plan.privacy.colluding) in text) is (mode == "secure")
