"""A silo that lies loses its own part, and nobody else's."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from gramfuse_protocol.errors import FederationError, SecurityError
from gramfuse_protocol.messages.flower_records import to_record
from gramfuse_protocol.messages.phases import MaskedReply, MaskedRequest
from gramfuse_protocol.messages.wire import pack
from gramfuse_protocol.secure_sum.member import advertise, check_advert
from gramfuse_protocol.secure_sum.statements import Advert, advert_statement
from gramfuse_server.run import delivery
from gramfuse_server.run_directory import partial_of
from tests.adversarial.hostile_silo.lies import BEFORE_THE_SUM, KEYS, LIES, MASKED, MORE_LIES, answered
from tests.adversarial.hostile_silo.runs import NAMES, A, B, C, D, Federation, Run, Stopped
from tests.grid import InProcessGrid


@pytest.mark.parametrize("what", LIES)
def test_a_silo_that_lies_is_lost_and_nobody_else_and_a_resumed_run_goes_on_without_it(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    phase, lie = LIES[what]
    run = Run(federation, tmp_path / "place", phase, lie)
    with pytest.raises(Stopped):
        run.go(stop="merge" if phase != "evaluate" else "masked")
    report = run.go(resume=True)
    assert [silo["name"] for silo in report["silos"]] == [A, B, C, *(() if phase in BEFORE_THE_SUM else (D,))]
    lost = {entry["name"]: entry["reason"] for entry in report["lost"]}
    assert set(lost) == {D}
    assert len(lost[D]) < 1000
    assert report["unmeasured"] is None
    assert not list(tmp_path.rglob("pickle-was-loaded"))
    assert not partial_of(run.out).exists()


def test_a_silo_that_releases_wrong_shares_is_lost_and_the_sum_is_opened_without_them(
    federation: Federation, tmp_path: Path
) -> None:
    """It hopes that the sum can never be opened. Its own vector is in it, so it stays; three of four are enough."""
    wrong = answered(lambda reply: reply.model_copy(update={"shares": dict.fromkeys(reply.shares, "01" * 65 + "00")}))
    run = Run(federation, tmp_path / "place", "unmask", wrong)
    run.liar = A  # the shares of the first three are those that are used
    with pytest.raises(Stopped):
        run.go(stop="merge")
    report = run.go(resume=True)
    assert [silo["name"] for silo in report["silos"]] == list(NAMES)
    assert [entry["name"] for entry in report["lost"]] == [A]
    assert report["unmeasured"] is None


@pytest.mark.parametrize("what", MORE_LIES)
def test_whatever_a_silo_answers_the_post_says_that_it_is_no_answer(
    federation: Federation, tmp_path: Path, what: str
) -> None:
    """As above, without the run around it: the answer of a node, and what the coordinator's post makes of it."""
    lie, run = MORE_LIES[what], Run(federation, tmp_path)

    def node(message: Message, _: Any) -> Message:
        return Message(lie(run, to_record(pack(MASKED))), reply_to=message)

    request = MaskedRequest(plan="0" * 64, session="f" * 32, sum_of="statistics", piece=0, piece_bytes=320)
    grid = InProcessGrid({D: node})
    noted: list[dict[str, Any]] = []
    office = delivery.Post(grid, noted.append)
    began = time.process_time()
    ((silo, _, found),) = office.exchange({D: grid.number(D)}, {D: [request]}, 1)
    assert (silo, type(found)) == (D, FederationError)
    assert "cannot be read" in str(found)
    assert len(str(found)) < 1000
    assert time.process_time() - began < 2
    assert [entry for entry in noted if "from" in entry] == []


def test_the_honest_answer_is_one(federation: Federation) -> None:
    grid = InProcessGrid({D: lambda message, _: Message(to_record(pack(MASKED)), reply_to=message)})
    request = MaskedRequest(plan="0" * 64, session="f" * 32, sum_of="statistics", piece=0, piece_bytes=320)
    ((_, _, found),) = delivery.Post(grid, lambda entry: None).exchange({D: grid.number(D)}, {D: [request]}, 1)
    assert isinstance(found, MaskedReply)


@pytest.mark.parametrize("what", KEYS)
def test_keys_that_no_honest_silo_has_are_refused_though_they_are_signed(federation: Federation, what: str) -> None:
    roster, nonce, identity = federation.plan.roster, "f" * 32, federation.identity(D)
    good = advertise(roster, nonce, D, NAMES, identity, secrets.token_bytes).advert
    check_advert(roster, nonce, good)
    document = good.model_dump(mode="json")
    KEYS[what](document)
    advert = Advert.model_validate(document)
    signature = identity.sign(advert_statement(roster.plan, nonce, advert.fields)).hex()
    with pytest.raises(SecurityError, match="key"):
        check_advert(roster, nonce, advert.model_copy(update={"signature": signature}))


def test_what_flower_cannot_put_together_is_the_senders_loss(federation: Federation, tmp_path: Path) -> None:
    """A node's objects are parsed by Flower as they are pulled: an array without its chunks raises there."""

    class Broken(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> list[Any]:
            for message_id in message_ids:
                visit, _ = self._under_way.get(message_id, (None, None))
                if visit and (visit.node, visit.phase) == (D, "masked"):
                    raise KeyError("arraychunk_ids")
            return super().pull_messages(message_ids)

    run = Run(federation, tmp_path / "place")
    run.grid = Broken
    report = run.go()
    assert [silo["name"] for silo in report["silos"]] == [A, B, C]
    assert [entry["name"] for entry in report["lost"]] == [D]


def test_a_superlink_that_is_gone_is_no_silos_loss(federation: Federation, tmp_path: Path) -> None:
    class Gone(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> list[Any]:
            raise ConnectionError("connection refused")

        def get_nodes(self) -> Any:
            if self.sent:
                raise ConnectionError("connection refused")
            return super().get_nodes()

    run = Run(federation, tmp_path / "place")
    run.grid = Gone
    with pytest.raises(ConnectionError):
        run.go()
