"""What leaves, how much and how often, and training that is not repeated."""

from __future__ import annotations

import logging
import stat
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.supercore.task_identity import TaskIdentity

from gramfuse_client.app import SiloApp
from gramfuse_client.exchange import participant as participant_module
from gramfuse_client.guard.policy import check_bytes
from gramfuse_protocol.errors import FederationError, RefusalError
from gramfuse_protocol.files import exclusive
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import (
    REPLIES,
    EvaluateReply,
    JoinReply,
    Message,
    Refusal,
    TrainReply,
    UploadReply,
)
from gramfuse_protocol.messages.wire import pack, unpack
from tests.client.policy.silos import OTHER_SESSION, PATH, Site, no_trace, quotes_nothing, refused, willing


@pytest.mark.parametrize("secure", [True, False])
def test_a_contribution_of_more_bytes_than_may_leave_is_refused_before_anything_is_done(
    secure: bool, site: Callable[..., Site]
) -> None:
    here = site()
    # A contribution in the clear and one that is masked; what really leaves has these sizes elsewhere in the tests.
    size = 8 * here.layout.sum_entries if secure else here.layout.contribution_bytes
    privacy = here.plan.privacy.model_copy(update={"secure_aggregation": secure})
    plan = here.plan.model_copy(update={"privacy": privacy})
    check_bytes(willing(maximum_bytes=size), plan, here.layout)
    check_bytes(willing(), plan, here.layout)
    with pytest.raises(RefusalError) as caught:
        check_bytes(willing(maximum_bytes=size - 1), plan, here.layout)
    assert str(caught.value).startswith(f"{PATH}: ")
    assert f"'limits.maximum-bytes' is {size - 1:,}" in str(caught.value)
    quotes_nothing(caught.value.reason, [str(PATH), str(size), f"{size:,}", str(size - 1), f"{size - 1:,}"])
    if not secure:
        here.edit("[limits]", f"[limits]\nmaximum-bytes = {size - 1}")
        refused(here, here.join(), RefusalError)
        assert no_trace(here)
        here.edit(f"maximum-bytes = {size - 1}", f"maximum-bytes = {size}")
        assert isinstance(here.answer(here.join()), JoinReply)


def test_what_was_contributed_is_contributed_again_in_its_own_session_only_unless_the_silo_file_allows_it(
    site: Callable[..., Site],
) -> None:
    here = site()
    here.answer(here.join())
    here.answer(here.train())
    assert isinstance(here.answer(here.join(session=OTHER_SESSION)), JoinReply), "nothing left so far"
    first = here.answer(here.upload())
    assert isinstance(first, UploadReply)
    for _ in range(2):
        reply = refused(here, here.join(session=OTHER_SESSION), RefusalError)
        assert "contributed" in reply.reason
    assert isinstance(here.answer(here.join()), JoinReply), "an interrupted session goes on"
    again = here.answer(here.upload())
    assert isinstance(again, UploadReply)
    assert {name: array.tobytes() for name, array in again.arrays.items()} == {
        name: array.tobytes() for name, array in first.arrays.items()
    }
    here.edit("[limits]", "[limits]\nrepeat-contributions = true")
    assert isinstance(here.answer(here.join(session=OTHER_SESSION)), JoinReply)


def test_nothing_is_uploaded_before_training(site: Callable[..., Site]) -> None:
    here = site()
    assert isinstance(here.answer(here.join()), JoinReply)
    assert refused(here, here.upload(), FederationError).reason == "not trained"


def test_pieces_beyond_the_contribution_are_refused_and_those_within_make_it_up(site: Callable[..., Site]) -> None:
    here = site()
    here.answer(here.join())
    here.answer(here.train())
    pieces = here.layout.pieces(10_000)
    assert len(pieces) > 2
    received = 0
    for n, piece in enumerate(pieces):
        reply = here.answer(here.upload(n, 10_000))
        assert isinstance(reply, UploadReply)
        assert list(reply.arrays) == [part.name for part in piece]
        assert all(array.dtype == np.float32 for array in reply.arrays.values())
        received += sum(array.nbytes for array in reply.arrays.values())
    assert received == here.layout.contribution_bytes
    refused(here, here.upload(len(pieces), 10_000), FederationError)
    refused(here, here.upload(2**30, 10_000), FederationError)


def test_no_metrics_leave_if_the_plan_says_none(site: Callable[..., Site]) -> None:
    here = site('privacy.metrics="none"')
    assert isinstance(here.answer(here.join()), JoinReply)
    refused(here, here.evaluate(), FederationError)


def test_a_model_that_does_not_fit_the_layout_is_not_evaluated(site: Callable[..., Site]) -> None:
    here = site()
    for asked in (here.join(), here.train(), here.upload()):
        here.answer(asked)
    request = here.evaluate()
    assert isinstance(here.answer(request), EvaluateReply)
    name, array = next(iter(request.arrays.items()))
    for wrong in (array.reshape(-1)[:-1], array * np.nan):
        reply = here.answer(request.model_copy(update={"arrays": {**request.arrays, name: wrong}}))
        assert isinstance(reply, Refusal)
        assert reply.error == "ContributionError"
    reply = here.answer(request.model_copy(update={"arrays": {**request.arrays, "delta:not.of.this.model": array}}))
    assert isinstance(reply, Refusal)


@pytest.mark.parametrize("request_of", [Site.join, Site.train, Site.upload, Site.evaluate])
def test_what_was_uploaded_in_one_session_does_not_leave_in_another(
    request_of: Callable[[Site], Message], site: Callable[..., Site]
) -> None:
    here = site()
    for request in (here.join(), here.train(), here.upload()):
        assert not isinstance(here.answer(request), Refusal)
    refused(here, request_of(here).model_copy(update={"session": "b" * 32}), RefusalError)
    assert not isinstance(here.answer(here.upload()), Refusal)


@pytest.mark.parametrize(
    "secret",
    ["Anna Example, born in 1950", "/srv/patients/train.jsonl"],
)
def test_an_unexpected_exception_becomes_a_refusal_that_holds_nothing_of_it(
    secret: str, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = site()

    def fail(*_: object) -> None:
        raise KeyError(secret)

    monkeypatch.setattr(participant_module, "load", fail)
    for key in ("_run_id", "_node_id", "_task_id"):  # what Flower sets in a process that makes messages
        monkeypatch.setattr(TaskIdentity, key, 1)
    here.answer(here.join())
    message = FlowerMessage(to_record(pack(here.train())), 101, "train")
    with caplog.at_level(logging.ERROR):
        left = SiloApp(lambda _: here.silo)(message, Context(1, 101, {}, RecordDict(), {}))
    reply = unpack(from_record(left.content), REPLIES)
    assert isinstance(reply, Refusal)
    assert reply.exit_code != 0
    quotes_nothing(reply.model_dump_json(), [secret, "KeyError", "Traceback"])
    assert secret in caplog.text, "the silo's own log has the whole story"


def test_training_is_not_repeated_for_the_same_plan_and_data(site: Callable[..., Site]) -> None:
    here = site()
    here.answer(here.join())
    first = here.answer(here.train())
    assert isinstance(first, TrainReply)
    before = (here.statistics.read_bytes(), here.statistics.stat().st_mtime_ns, here.statistics.stat().st_ino)
    again = here.answer(here.train())
    # Another run of the same plan joins anew; its training is the one that was done.
    here.answer(here.join(session=OTHER_SESSION))
    other = here.answer(here.train(OTHER_SESSION))
    assert again == first
    assert isinstance(other, TrainReply)
    assert (other.examples, other.tokens) == (first.examples, first.tokens)
    after = (here.statistics.read_bytes(), here.statistics.stat().st_mtime_ns, here.statistics.stat().st_ino)
    assert after == before


def test_training_is_repeated_when_the_data_change(site: Callable[..., Site]) -> None:
    here = site()
    here.answer(here.join())
    first = here.answer(here.train())
    before = here.statistics.read_bytes()
    with (here.silo.directory / here.silo.file.data.train).open("a") as file:
        file.write('{"text": "the old cat", "label": "animals"}\n')
    second = here.answer(here.train())
    assert isinstance(first, TrainReply)
    assert isinstance(second, TrainReply)
    assert second.examples == first.examples + 1
    assert here.statistics.read_bytes() != before


def test_state_is_private_to_its_owner(site: Callable[..., Site]) -> None:
    here = site()
    for request in (here.join(), here.train(), here.upload(), here.evaluate()):
        assert not isinstance(here.answer(request), Refusal)
    files = [path for path in here.silo.state.rglob("*") if path.is_file()]
    assert {"plan.toml", "layout.json", "statistics.safetensors"} <= {path.name for path in files}
    assert not [path for path in files if path.name.endswith(".partial")]
    for path in (here.silo.state, *here.silo.state.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_request_for_one_plan_does_not_reach_the_statistics_of_another(site: Callable[..., Site]) -> None:
    here = site()
    here.answer(here.join())
    here.answer(here.train())
    elsewhere = replace(here, plan=here.plan.override(["merge.alpha=0.5"]))
    assert refused(elsewhere, elsewhere.upload(), FederationError).reason == "not joined"


def test_a_worker_that_is_still_at_it_is_waited_for(site: Callable[..., Site]) -> None:
    # A node that was killed and started anew gets its request again, while the worker of the first time goes on.
    place = site()
    place.answer(place.join())
    with exclusive(place.silo.state / "lock"):
        second = threading.Thread(target=place.answer, args=[place.train()])
        second.start()
        second.join(0.5)
        assert second.is_alive()
    second.join(60)
    assert place.statistics.exists()
