"""A coordinator that has silos measure whatever it likes, as often as it likes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gramfuse_protocol.messages import phases as m
from tests.adversarial.liar import METRICS, NONCE, STATISTICS, Liar

MakeLiar = Callable[..., Liar]
A = "silo-a"
SECOND = "ee" * 16


def test_only_the_plans_candidates_are_measured_and_each_once(liar: MakeLiar) -> None:
    """Twenty-five models in one session was the attack: by their differences, it read single records."""
    lied = liar(silos=3)
    about = lied.about()
    lied.contribute(about)
    for candidate in lied.plan.privacy.candidates:
        assert isinstance(lied.measure(A, about, lied.zero(), candidate), m.EvaluateReply)
        assert isinstance(lied.measure(A, about, lied.zero(), candidate), m.EvaluateReply), "the same, once more"
    words = {name: of.words for name, of in lied.state(A).measurements.of(1).items()}
    for number in range(25):
        assert lied.measure(A, about, lied.zero(), f"q{number}").error in ("SecurityError", "RefusalError")
    again = {name: of.words for name, of in lied.state(A).measurements.of(1).items()}
    assert again == words
    assert len(words) == len(lied.plan.privacy.candidates)


@pytest.mark.parametrize("after", ["join", "train", *STATISTICS[:-1]])
def test_nothing_is_measured_before_the_contribution_was_released(liar: MakeLiar, after: str) -> None:
    """It asks for metrics first, to have them without a sum that hides them."""
    lied = liar(silos=3)
    about, steps = lied.about(), ("join", "train", *STATISTICS)
    lied.honest(steps[: steps.index(after) + 1], about)
    reply = lied.measure(A, about, lied.zero())
    assert (reply.error, reply.arrays) == ("RefusalError", {})
    assert lied.state(A).measurements.of(1) == {}


def test_metrics_that_leave_one_by_one_come_after_the_contribution_too(liar: MakeLiar) -> None:
    lied = liar('privacy.metrics="silo"', silos=3, metrics="silo")
    about = lied.about()
    lied.honest(("join", "train"), about)
    assert lied.measure(A, about, lied.zero()).error == "RefusalError"
    lied.honest(STATISTICS, about)
    assert isinstance(lied.measure(A, about, lied.zero()), m.EvaluateReply)
    assert lied.measure(A, about, lied.filled(0.01)).error == "SecurityError"
    again = lied.about(SECOND)
    assert (lied.join(A, again).error, lied.measure(A, again, lied.zero()).error) == ("RefusalError", "RefusalError")


def test_another_model_under_a_name_is_refused_in_every_session_of_the_round(liar: MakeLiar) -> None:
    """Silos that may contribute again measure the model that they measured before, with the noise it had."""
    lied = liar(silos=3, repeat_contributions=True)
    for session in (NONCE, SECOND):
        about = lied.about(session)
        lied.contribute(about)
        for candidate in lied.plan.privacy.candidates:
            for name in lied.names:
                assert isinstance(lied.measure(name, about, lied.zero(), candidate), m.EvaluateReply)
        kept = {name: lied.state(name).measurements.of(1) for name in lied.names}
        lied.honest(METRICS, about)
        assert kept == {name: lied.state(name).measurements.of(1) for name in lied.names}
        if session == NONCE:
            first = kept
    assert kept == first
    third = lied.about("dd" * 16)
    lied.contribute(third)
    assert lied.measure(A, third, lied.filled(0.01)).error == "SecurityError"


def test_a_sum_of_fewer_candidates_is_refused(liar: MakeLiar) -> None:
    """One candidate at a time, each in a sum of its own: their noise would be of one each, and so it would be less."""
    lied = liar(silos=3)
    about = lied.about()
    lied.contribute(about)
    assert isinstance(lied.measure(A, about, lied.zero(), "regmean"), m.EvaluateReply)
    request = m.MaskedRequest(**about, sum_of="metrics", candidates=("regmean",), piece=0, piece_bytes=2**20)
    assert lied.ask(A, request).error == "SecurityError"


def test_a_held_out_record_that_is_added_between_models_or_rounds_is_a_failure(liar: MakeLiar) -> None:
    """The owner adds a record between two measurements; their difference would be that record."""
    lied = liar(silos=3)
    about = lied.about()
    lied.contribute(about)
    assert isinstance(lied.measure(A, about, lied.zero(), "simple"), m.EvaluateReply)
    with lied.project.train(A).with_name("held-out.jsonl").open("a") as file:
        file.write('{"text": "the old cat", "label": "animals"}\n')
    reply = lied.measure(A, about, lied.zero(), "regmean")
    assert (reply.error, "phase evaluate" in reply.reason) == ("FailureError", True)
