"""A coordinator that reads a silo's data by what the silo refuses.

It sends models that overflow, or give no number, only where one word stands, and asks word by word. A silo has one
answer for whatever fails, gives it once, and sticks to it: in other sessions and after a restart, until its owner
clears it. What it can know before it touches its data it says before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gramfuse_client.exchange import participant
from gramfuse_client.guard import policy
from gramfuse_protocol.messages import phases as m
from tests.adversarial.liar import METRICS, NONCE, STATISTICS, Detector, Liar, copied, regression

MakeLiar = Callable[..., Liar]
A, B = "silo-a", "silo-b"
SECOND = "ee" * 16


def assert_failed(reply: Any) -> None:
    assert isinstance(reply, m.Refusal), reply
    assert (reply.error, reply.exit_code) == ("FailureError", 20)
    assert "failed in phase" in reply.reason
    assert not any(character.isdigit() for character in reply.reason), "no count crosses"


def words_of(liar: Liar, name: str, file: str = "train.jsonl") -> set[str]:
    lines = liar.project.train(name).with_name(file).read_text().splitlines()
    return {word for line in lines for word in json.loads(line)["text"].split()}


def test_a_start_that_overflows_for_one_word_is_one_question_and_no_more(liar: MakeLiar, detector: Detector) -> None:
    """It hoped to learn each word of the training texts; it learns whether one of its choice is there, once."""
    lied = liar("merge.rounds=2", base=detector.path, silos=3, minimum_examples=5, examples=6)
    about, later = lied.about(), lied.about(number=2)
    lied.contribute(about)
    word = min(words_of(lied, A))
    model = detector.model(lied.zero(), word, 5e19, also=True)
    assert not isinstance(lied.measure(A, about, model), m.Refusal)
    lied.join(A, later)
    for other in sorted(words_of(lied, B))[:3]:  # another start than what it was given is no start
        reply = lied.train(A, later, detector.model(lied.zero(), other, 5e19, also=True))
        assert (reply.error, "starting model" in reply.reason) == ("RefusalError", True)
    assert_failed(lied.train(A, later, model))
    for session in (None, SECOND):
        again = lied.about(session, 2)
        assert_failed(lied.join(A, again))
        assert_failed(lied.train(A, again, model))
        assert_failed(lied.ask(A, m.KeysRequest(**again, cohort=lied.names)))


def test_a_round_that_this_silo_did_not_come_to_is_not_begun(liar: MakeLiar, detector: Detector) -> None:
    """It skips the first round, in which silos contribute, and asks about words at once."""
    lied = liar("merge.rounds=2", base=detector.path, silos=3)
    later = lied.about(number=2)
    lied.join(A, later)
    reply = lied.train(A, later, detector.model(lied.zero(), min(words_of(lied, A)), 5e19))
    assert (reply.error, "previous session" in reply.reason) == ("RefusalError", True)
    assert not lied.state(A, 2).trained
    lied.contribute(lied.about())
    later = lied.about(SECOND, 2)
    lied.join(A, later)
    reply = lied.train(A, later, lied.zero())  # contributed, but given no model
    assert (reply.error, "previous session" in reply.reason) == ("RefusalError", True)


@pytest.mark.parametrize("size", [1e30, 1e19, 3e4])
def test_a_prediction_that_is_no_number_is_counted_and_not_refused(
    liar: MakeLiar, detector: Detector, size: float
) -> None:
    """Regression: no number for a word that stands in silo-a's held-out texts and not in silo-b's."""
    lied = liar(base=detector.path, silos=3, change=regression)
    about = lied.about()
    lied.contribute(about)
    word = min(words_of(lied, A, "held-out.jsonl") - words_of(lied, B, "held-out.jsonl"), default=None)
    assert word is not None
    model = detector.model(lied.zero(), word, size)
    model["delta:bert.encoder.layer.0.output.dense.weight"][:, 0] += np.float32(1e20)
    for candidate in lied.plan.privacy.candidates:
        headers = set()
        for name in lied.names:
            reply = lied.measure(name, about, model, candidate)
            assert isinstance(reply, m.EvaluateReply), reply
            headers.add(reply.model_copy(update={"silo": ""}).model_dump_json())
        assert len(headers) == 1
    lied.honest(METRICS, about)


def test_a_prediction_beyond_the_range_tells_no_count(liar: MakeLiar) -> None:
    """A trillion for every example: the range error said Σp² over the limit, and so how many examples there are."""
    lied = liar(silos=3, change=regression)
    for n, name in enumerate(lied.names):
        file = lied.project.train(name).with_name("held-out.jsonl")
        file.write_text("".join(file.read_text().splitlines(True)[: 9 - 2 * n]))
    about = lied.about()
    lied.contribute(about)
    model = lied.zero()
    model["delta:classifier.bias"] = np.full_like(model["delta:classifier.bias"], 1e12)
    for candidate in lied.plan.privacy.candidates:
        for name in lied.names:
            assert not isinstance(lied.measure(name, about, model, candidate), m.Refusal)
    lied.honest(METRICS, about)


def test_training_that_leaves_the_range_says_neither_where_nor_how_far(liar: MakeLiar) -> None:
    """Weights in their thousands: training fails, before anything is masked, and nothing can be asked again."""
    lied = liar("training.learning-rate=1000.0", silos=3)
    about = lied.about()
    lied.honest(("join",), about)
    replies = [lied.train(name, about) for name in lied.names]
    for reply in replies:
        assert_failed(reply)
    assert len({reply.reason for reply in replies}) == 1
    for session in (NONCE, SECOND):
        assert_failed(lied.train(A, lied.about(session)))
        assert_failed(lied.join(A, lied.about(session)))


def test_a_failure_lasts_until_the_owner_clears_it_and_that_is_in_the_ledger(liar: MakeLiar) -> None:
    """Too few examples, by the silo's own file: the coordinator reads neither the count nor the limit."""
    from click.testing import CliRunner

    from gramfuse_cli.main import cli
    from gramfuse_client.guard.ledger import Ledger

    lied = liar(silos=3, minimum_examples=1000)
    about = lied.about()
    lied.honest(("join",), about)
    assert_failed(lied.train(A, about))
    lied.limits = {}
    assert_failed(lied.train(A, about))
    silo = lied.silo(A)
    file = silo.path.with_name("owner.toml")
    file.write_text(silo.path.read_text().replace('name = "silo-a"', f'name = "silo-a"\nstate = "{silo.state}"', 1))
    text = file.read_text()
    first, *rest = [line for line in text.splitlines() if not line.startswith("state = ") or str(silo.state) in line]
    file.write_text("\n".join((first, *rest)) + "\n")
    done = CliRunner().invoke(cli, ["silo", "clear", str(file), "--plan", lied.plan.digest])
    assert done.exit_code == 0, done.output
    assert [line.entry.kind for line in Ledger(silo.ledger, A).lines()] == ["clear"]
    assert not isinstance(lied.train(A, about), m.Refusal)


def test_a_crash_is_no_failure_and_another_request_does_not_take_its_place(
    liar: MakeLiar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut while it measures: the same request goes on, another model under the name does not."""
    lied = liar(silos=3)
    about = lied.about()
    lied.contribute(about)

    def power_cut(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(participant, "load", power_cut)
        with pytest.raises(KeyboardInterrupt):
            lied.measure(A, about, lied.zero())
    reply = lied.measure(A, about, lied.filled(0.01))
    assert reply.error == "SecurityError"
    assert not isinstance(lied.measure(B, about, lied.zero()), m.Refusal)

    with monkeypatch.context() as patch:
        patch.setattr(participant, "load", power_cut)
        with pytest.raises(KeyboardInterrupt):
            lied.measure("silo-c", about, lied.zero())
    assert not isinstance(lied.measure("silo-c", about, lied.zero()), m.Refusal)


@pytest.mark.parametrize("damage", [b"", b'{"sums": NaN}', bytes(range(256))])
def test_a_state_with_bad_content_is_a_failure(liar: MakeLiar, tmp_path: Path, damage: bytes) -> None:
    """Whatever stands in what the silo keeps, each phase has one answer to it."""
    lied = liar(silos=3)
    about = lied.about()
    lied.contribute(about)
    for candidate in lied.plan.privacy.candidates:
        for name in lied.names:
            lied.measure(name, about, lied.zero(), candidate)
    state = lied.state(A)
    session = state.session(NONCE).directory / "session.json"
    for number, file in enumerate(
        (session, state.directory / "measured.json", state.directory / "attempts.json",
         state.directory / "contributed.json", state.directory / "statistics.safetensors")
    ):  # fmt: skip
        harmed = copied(lied, tmp_path / f"harmed-{number}")
        (harmed.place / file.relative_to(lied.place)).write_bytes(damage)
        for step in ("train", *STATISTICS, *METRICS[:2]):
            reply = harmed.step(step, about, A, harmed.names)
            if isinstance(reply, m.Refusal):
                assert reply.error in ("FailureError", "SecurityError", "RefusalError"), (file.name, step)
                assert not any(character.isdigit() for character in reply.reason), (file.name, step, reply.reason)


def test_what_is_known_before_the_data_is_said_before_and_nothing_is_noted(
    liar: MakeLiar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours and disk: the silo says why, its data were not touched, and it takes part when it can."""
    lied = liar(silos=3)
    about = lied.about()
    lied.honest(("join",), about)

    def untouched(*_: Any) -> None:
        raise AssertionError("the data were read")

    with monkeypatch.context() as patch:
        patch.setattr(participant, "load", untouched)
        patch.setattr(policy.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
        reply = lied.train(A, about)
        assert (reply.error, "no space left" in reply.reason) == ("RefusalError", True)
    closed = Liar(lied.project, lied.place, lied.plan, lied.layout, train_hours=_never())
    with monkeypatch.context() as patch:
        patch.setattr(participant, "load", untouched)
        assert closed.train(A, about).error == "RefusalError"
    assert lied.state(A).attempts.read() == ()
    lied.contribute(about)
    with monkeypatch.context() as patch:
        patch.setattr(participant, "load", untouched)
        assert closed.measure(A, about, lied.zero()).error == "RefusalError", "hours are for measuring too"
    assert not isinstance(lied.measure(A, about, lied.zero()), m.Refusal)


def _never() -> Any:
    from gramfuse_client.silo_file import Hours

    hour = (datetime.now().hour + 12) % 24
    return Hours.parse(f"{hour:02}:00-{hour:02}:01")


def test_of_a_layout_that_is_not_the_plans_nothing_is_parsed(liar: MakeLiar, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hoped to keep a silo busy with a large document of its own; it gets a refusal by the digest."""
    lied = liar()
    monkeypatch.setattr(participant.Layout, "parse", lambda *_: pytest.fail("a strange layout was parsed"))
    for text in (lied.layout.to_json() + " ", "[" * 1000, "{}"):
        reply = lied.ask(A, m.JoinRequest(**lied.about(), plan_text=lied.plan.to_toml(), layout=text))
        assert (reply.error, reply.reason) == ("FederationError", "layout digest differs")
    assert not lied.silo(A).state.exists()


def test_a_label_that_reads_like_a_full_disk_makes_no_failure_a_crash(liar: MakeLiar) -> None:
    """It hoped that a label that its plan quotes back would have the silo answer again and again."""
    full = "No space left on device"

    def strange(project: Any) -> None:
        project.replace(project.plan, "labels = [", f'labels = ["{full}", ')
        project.replace(project.train(A), '"label": "', '"label": "un')

    lied = liar(silos=3, change=strange)
    lied.join(A, lied.about())
    assert_failed(lied.train(A, lied.about()))
    assert full in caught(lied, A)
    assert [attempt.outcome for attempt in lied.state(A).attempts.read()] == ["failed"]
    assert_failed(lied.ask(A, m.KeysRequest(**lied.about(), cohort=lied.names)))


def caught(lied: Liar, name: str) -> str:
    """What the silo's own data say is wrong."""
    from gramfuse_client.data.examples import load
    from gramfuse_protocol.errors import DataError

    with pytest.raises(DataError) as error:
        load(lied.silo(name), lied.plan.task_of(name))
    return str(error.value)
