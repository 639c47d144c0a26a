"""Answers that belong to another session, plan, silo or phase, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_protocol.errors import FederationError, RefusalError
from gramfuse_protocol.messages.phases import JoinReply, UploadReply
from tests.exchange.open.lies import another, lying
from tests.exchange.open.runs import Honest, failure, failure_of, refused, unmeasured

IDENTITIES: dict[str, Callable[[Any], Any]] = {
    "another session": another(session="f" * 32),
    "another plan": another(plan="f" * 64),
    "another silo of the roster": another(silo="silo-a"),
    "a silo that the roster does not name": another(silo="silo-z"),
}


@pytest.mark.parametrize("phase", ["train", "upload", "evaluate"])
@pytest.mark.parametrize("lie", IDENTITIES)
def test_an_answer_that_belongs_elsewhere_names_the_silo(
    honest: Honest, in_process_grid: Any, place: Path, lie: str, phase: str
) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying(phase, IDENTITIES[lie]))
    end = unmeasured if phase == "evaluate" else failure_of(FederationError)
    assert "silo 'silo-b'" in end(grid, honest, place)
    assert grid.sent.count(("silo-b", phase)) == 1


@pytest.mark.parametrize("lie", ["another session", "another plan"])
def test_an_answer_to_join_that_belongs_elsewhere_names_the_node(
    honest: Honest, in_process_grid: Any, place: Path, lie: str
) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("join", IDENTITIES[lie]))
    assert f"node {grid.number('silo-b')}" in failure(FederationError, grid, honest, place)


def as_phase(phase: str) -> Callable[[Any], Any]:
    """The same silo's answer to something else."""

    def apply(reply: Any) -> Any:
        about = {"plan": reply.plan, "session": reply.session, "silo": reply.silo}
        if phase == "join":
            return JoinReply(**about)
        return UploadReply(**about, piece=0, arrays={})

    return apply


@pytest.mark.parametrize(
    ("asked", "answered"), [("train", "join"), ("train", "upload"), ("upload", "join"), ("evaluate", "upload")]
)
def test_an_answer_of_another_phase_names_the_silo(
    honest: Honest, in_process_grid: Any, place: Path, asked: str, answered: str
) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying(asked, as_phase(answered)))
    message = (unmeasured if asked == "evaluate" else failure_of(FederationError))(grid, honest, place)
    for part in ("silo 'silo-b'", repr(asked), repr(answered)):
        assert part in message


def test_two_nodes_cannot_be_one_silo(honest: Honest, in_process_grid: Any, place: Path) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("join", another(silo="silo-a")))
    message = failure(FederationError, grid, honest, place)
    assert "silo-a" in message
    assert "two nodes" in message
    assert {phase for _, phase in grid.sent} == {"join"}


def test_a_node_cannot_take_a_name_that_the_roster_does_not_have(
    honest: Honest, in_process_grid: Any, place: Path
) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("join", another(silo="silo-z")))
    message = failure(FederationError, grid, honest, place)
    assert "silo-z" in message
    assert f"node {grid.number('silo-b')}" in message
    assert {phase for _, phase in grid.sent} == {"join"}


@pytest.mark.parametrize("phase", ["train", "upload", "evaluate"])
def test_a_refusal_ends_the_run_or_the_measuring_with_the_silos_name_and_reason(
    honest: Honest, in_process_grid: Any, place: Path, phase: str
) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying(phase, lambda reply: refused(reply, "silo-b")))
    message = (unmeasured if phase == "evaluate" else failure_of(RefusalError))(grid, honest, place)
    for part in ("silo 'silo-b'", repr(phase), "the data is bad", "DataError"):
        assert part in message
    assert grid.sent.count(("silo-b", phase)) == 1


@pytest.mark.parametrize("phase", ["train", "upload", "evaluate"])
def test_a_silo_cannot_refuse_in_anothers_name(honest: Honest, in_process_grid: Any, place: Path, phase: str) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying(phase, lambda reply: refused(reply, "silo-a")))
    end = unmeasured if phase == "evaluate" else failure_of(RefusalError)
    assert "silo 'silo-b'" in end(grid, honest, place)
