"""Nodes: which silo each one is, and those that refuse, go away or are no silos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.app import Error, RecordDict

from gramfuse_client.app import SiloApp
from gramfuse_client.silo_file import Silo
from gramfuse_protocol.contract.node_key import generate
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import FederationError, GramfuseError, RefusalError
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import REPLIES, Refusal
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_server.run import delivery
from gramfuse_server.run.patience import Patience
from tests.exchange.open.runs import (
    SILOS,
    Honest,
    Scripted,
    assert_identical,
    exchange,
    failure,
    left,
    refused,
    simulated,
    weights_of,
)


def test_a_silo_with_another_base_model_is_named_and_the_run_ends(
    honest: Honest, pico_project: Any, pico_gpt2: Path, in_process_grid: Any, place: Path
) -> None:
    project = pico_project(silos=3)
    project.replace(project.silo("silo-b"), 'device = "cpu"', f'device = "cpu"\nbase = "{pico_gpt2}"')
    grid = in_process_grid(simulated(project, honest.plan, project.directory / "state"))
    message = failure(RefusalError, grid, honest, place)
    assert "silo 'silo-b'" in message
    assert "silo-a" not in message
    assert "ModelError" in message
    assert str(pico_gpt2) not in message  # what a silo keeps where is not the coordinator's to know
    assert {phase for _, phase in grid.sent} == {"join"}


def test_a_silo_that_has_not_approved_the_plan_is_named_and_the_run_ends(
    honest: Honest, pico_project: Any, in_process_grid: Any, place: Path
) -> None:
    project = pico_project(silos=3)
    silos = simulated(project, honest.plan, project.directory / "state")
    silos["silo-c"] = SiloApp(lambda _: Silo.read(project.silo("silo-c")))
    grid = in_process_grid(silos)
    message = failure(RefusalError, grid, honest, place)
    assert "silo-c" in message
    assert "approved" in message
    assert str(project.directory) not in message
    assert {phase for _, phase in grid.sent} == {"join"}


@dataclass(frozen=True)
class Keyed:
    """A plan that names node keys, and those keys as a SuperLink has them."""

    plan: Plan
    public: dict[str, bytes]

    @staticmethod
    def of(honest: Honest) -> Keyed:
        lines = {name: generate()[1] for name in (*SILOS, "stranger")}
        roster = tuple(entry.model_copy(update={"node_key": lines[entry.name]}) for entry in honest.plan.silo)
        pem = Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        public = {name: load_ssh_public_key(line.encode()).public_bytes(*pem) for name, line in lines.items()}
        return Keyed(honest.plan.model_copy(update={"silo": roster}), public)


def test_a_node_is_the_silo_whose_key_it_has(honest: Honest, in_process_grid: Any, place: Path) -> None:
    keyed = Keyed.of(honest)
    stranger = Scripted("stranger", honest.layout, honest.statistics["silo-a"])
    grid = in_process_grid({"stranger": stranger, **honest.scripted()}, keys=keyed.public)
    exchange(grid, honest, place / "run", plan=keyed.plan, patience=Patience(authenticated=True))
    assert_identical(weights_of(place / "run"), honest.weights)
    assert "stranger" not in {node for node, _ in grid.sent}  # another plan's silo is not even asked


@pytest.mark.parametrize("phase", ["join", "train", "upload"])
def test_a_message_from_one_silos_connection_in_anothers_name_is_refused(
    honest: Honest, in_process_grid: Any, place: Path, phase: str
) -> None:
    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict:
        content = deliver()
        if (visit.node, visit.phase) != ("silo-b", phase):
            return content
        reply = unpack(from_record(content), REPLIES)
        return to_record(pack(reply.model_copy(update={"silo": "silo-c"})))

    keyed = Keyed.of(honest)
    grid = in_process_grid(honest.scripted(), keys=keyed.public, fault=fault)
    with pytest.raises(FederationError, match=r"silo 'silo-b' answered as .*'silo-c'"):
        exchange(grid, honest, place / "run", plan=keyed.plan, patience=Patience(authenticated=True))


@pytest.mark.parametrize("back", [True, False])
def test_a_silo_that_went_away_is_waited_for(
    honest: Honest, in_process_grid: Any, place: Path, back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "REMINDER_SECONDS", 0.1)
    events: list[dict[str, Any]] = []

    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        if (visit.node, visit.phase, visit.number) == ("silo-b", "upload", 1):
            grid.away.add("silo-b")
            return Error(5, "Node Unavailable")
        return deliver()

    def observe(event: dict[str, Any]) -> None:
        events.append(event)
        if back and event["state"] == "waiting":
            grid.away.clear()

    keyed = Keyed.of(honest)
    grid = in_process_grid(honest.scripted(), keys=keyed.public, fault=fault)
    settings: dict[str, Any] = {"plan": keyed.plan, "patience": Patience(grace=30 if back else 0.5, authenticated=True)}
    if back:
        exchange(grid, honest, place / "run", observer=observe, **settings)
        assert_identical(weights_of(place / "run"), honest.weights)
    else:
        with pytest.raises(FederationError, match=r"'silo-b' disconnected in phase 'upload'"):
            exchange(grid, honest, place / "run", observer=observe, **settings)
    waited = [event for event in events if event["state"] == "waiting"]
    assert {(event["silo"], event["phase"], event["away"]) for event in waited} == {("silo-b", "upload", True)}


@pytest.mark.parametrize("tries", [2, 4])
def test_a_node_that_was_started_anew_is_asked_again(
    honest: Honest, in_process_grid: Any, place: Path, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Flower drops what a node had fetched when it ended, and tells only whoever asks before it is back.
    monkeypatch.setattr(delivery, "LOOK_SECONDS", 0.05)

    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | None:
        if (visit.node, visit.phase) != ("silo-b", "upload") or visit.number >= tries:
            return deliver()
        grid.starts["silo-b"] += 1
        return None

    grid = in_process_grid(honest.scripted(), fault=fault)
    if tries <= 3:
        exchange(grid, honest, place / "run")
        assert_identical(weights_of(place / "run"), honest.weights)
        assert grid.sent.count(("silo-b", "upload")) == grid.sent.count(("silo-a", "upload")) + tries - 1
    else:
        with pytest.raises(FederationError, match=r"'silo-b' .*'upload' after 3 tries: its node"):
            exchange(grid, honest, place / "run")


def test_nodes_without_keys_are_not_silos_where_nodes_are_authenticated(
    honest: Honest, in_process_grid: Any, place: Path
) -> None:
    grid = in_process_grid(honest.scripted())
    with pytest.raises(FederationError, match="0 of 3 silos connected"):
        exchange(
            grid,
            honest,
            place / "run",
            plan=Keyed.of(honest).plan,
            patience=Patience(wait=0.1, authenticated=True),
        )
    assert not grid.sent


def test_the_report_of_a_run_that_failed_says_how_far_each_silo_came(
    honest: Honest, in_process_grid: Any, place: Path
) -> None:
    keyed = Keyed.of(honest)

    def states(plan: Plan, fault: Any = None, minimum: int = 3, **more: Any) -> tuple[dict[str, str], dict[str, str]]:
        grid = in_process_grid(honest.scripted(), keys=keyed.public, fault=fault)
        grid.away |= {"silo-b"} if "patience" in more else set()
        privacy = plan.privacy.model_copy(update={"minimum_survivors": minimum})
        with pytest.raises(GramfuseError) as caught:
            exchange(grid, honest, place / "run", plan=plan.model_copy(update={"privacy": privacy}), **more)
        report = left(place, caught.value)
        assert report["name"] == honest.report["name"]
        assert report["base"] == honest.report["base"]
        return {s["name"]: s["state"] for s in report["silos"]}, {s["name"]: s["reason"] for s in report["lost"]}

    def refuses(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        reply = unpack(from_record(deliver()), REPLIES)
        if (visit.node, visit.phase) == ("silo-c", "join"):
            said = {"error": "RefusalError", "exit_code": 13, "reason": "the operator said no"}
            return to_record(pack(Refusal(plan=reply.plan, session=reply.session, silo="silo-c", **said)))
        return Error(5, "it is gone") if (visit.node, visit.phase) == ("silo-a", "upload") else to_record(pack(reply))

    found, lost = states(keyed.plan, patience=Patience(wait=0.1, authenticated=True))
    assert found == {"silo-a": "connected", "silo-b": "absent", "silo-c": "connected"}
    assert lost == {}
    found, lost = states(honest.plan, refuses)
    assert found == {"silo-a": "joined", "silo-b": "joined", "silo-c": "lost"}
    assert "the operator said no" in lost["silo-c"]
    found, lost = states(honest.plan, refuses, minimum=2)
    assert found == {"silo-a": "lost", "silo-b": "trained", "silo-c": "lost"}
    assert lost.keys() == {"silo-a", "silo-c"}
    assert "it is gone" in lost["silo-a"]


def test_nodes_beyond_the_roster_that_refuse_do_not_stop_the_others(
    honest: Honest, in_process_grid: Any, place: Path
) -> None:
    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict:
        content = deliver()
        if visit.node != "stranger":
            return content
        return to_record(pack(refused(unpack(from_record(content), REPLIES), "stranger")))

    stranger = Scripted("stranger", honest.layout, honest.statistics["silo-a"])
    grid = in_process_grid({"stranger": stranger, **honest.scripted()}, fault=fault)
    report = exchange(grid, honest, place / "run")
    assert_identical(weights_of(place / "run"), honest.weights)
    assert [sent for sent in grid.sent if sent[0] == "stranger"] == [("stranger", "join")]
    assert set(report["bytes"]) == set(report["bytes_to_silos"]) == set(SILOS)
