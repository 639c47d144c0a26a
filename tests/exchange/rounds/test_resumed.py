"""Rounds that go on where they stopped, and requests that belong to another round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gramfuse_client.exchange.participant import Participant
from gramfuse_protocol.errors import RefusalError
from gramfuse_protocol.messages.phases import JoinReply, JoinRequest, Refusal, TrainReply, TrainRequest, UploadRequest
from gramfuse_server.run_directory import checkpoint_text, read_checkpoint
from tests.exchange.rounds.runs import Site, Stopped, assert_close
from tests.reports import read_back

STOPS = {
    "open": "1 upload end, 1 evaluate end, 2 train start, 2 train end, 2 upload end, 2 evaluate end, 2 write end",
    "secure": "1 unmask end, 1 unmask-metrics end, 2 train end, 2 keys end, 2 masked end, 2 evaluate end",
}
"""Round, phase, and whether before or after it."""


@pytest.mark.parametrize("mode", ["open", "secure"])
def test_a_coordinator_that_is_killed_at_any_step_of_any_round_goes_on_to_the_same_end(
    site: Callable[..., Site], trainings: Counter[str], mode: str
) -> None:
    names, secure = (3, True) if mode == "secure" else (2, False)
    exact = ('privacy.metrics-epsilon="none"',) if secure else ()  # noise would be other noise
    whole = site(*exact, silos=names, secure=secure, name="whole")
    expected = whole.run()
    here = site(*exact, silos=names, secure=secure)
    trainings.clear()

    def stop_at(stop: str) -> Callable[[dict[str, Any]], None]:
        def watch(event: dict[str, Any]) -> None:
            if f"{event['round']} {event['phase']} {event['state']}" == stop:
                raise Stopped

        return watch

    resume = False
    for stop in STOPS[mode].split(", "):
        with pytest.raises(Stopped):
            here.run(watch=stop_at(stop), resume=resume)
        resume = True
    report = here.run(resume=True)
    assert_close(here.weights, whole.weights, 0)
    assert [one["models"] for one in report["rounds"]] == [one["models"] for one in expected["rounds"]]
    assert set(trainings.values()) == {1}
    assert len(trainings) == 2 * names
    starts = {name: {digest for silo, digest in here.starts if silo == name} for name in here.plan.names}
    assert {len(digests) for digests in starts.values()} == {1}
    assert [path.name for path in here.out.parent.iterdir() if path.name != "state"] == ["run"]


def test_another_start_than_before_is_refused(site: Callable[..., Site], trainings: Counter[str]) -> None:
    here = site()

    def watch(event: dict[str, Any]) -> None:
        if (event["phase"], event["round"], event["state"]) == ("upload", 2, "start"):
            raise Stopped

    with pytest.raises(Stopped):
        here.run(watch=watch)
    partial = here.out.with_name("run.partial")
    start = load_file(partial / "start-2.safetensors")
    save_file({name: array * np.float32(2) for name, array in start.items()}, partial / "start-2.safetensors")
    done = read_checkpoint(here.out)
    for key in ("train-2", "session-2"):
        del done[key]  # as if they had been trained, and the coordinator did not know
    (partial / "checkpoint.json").write_text(checkpoint_text(done))
    with pytest.raises(RefusalError, match=r"second, different .* train .*exchange 2"):
        here.run(resume=True)
    assert set(trainings.values()) == {1}
    report = read_back(here.out.with_name("run.failed"))
    assert [one["round"] for one in report["rounds"]] == [1]
    failure = {"error": "RefusalError", "phase": "train", "round": 2, "exit_code": 13, "resumable": True}
    assert report["failure"].items() >= failure.items()
    assert "lost" in {silo["state"] for silo in report["silos"]} <= {"lost", "joined"}
    first = report["rounds"][0]["bytes"]["silo-a"]
    assert report["bytes"]["silo-a"]["upload"] == first["upload"]
    assert report["bytes"]["silo-a"]["join"] == 2 * first["join"]
    assert not report.keys() & {"models", "solve"}, "there is no merge of the last round"
    save_file(start, partial / "start-2.safetensors")
    here.run(resume=True)
    assert set(trainings.values()) == {1}


def refused(here: Site, request: Any, name: str = "silo-a") -> str:
    reply = Participant(here.silo(name)).answer(request)
    assert isinstance(reply, Refusal), reply
    assert reply.about == request.about
    return reply.reason


def test_what_does_not_fit_a_round_is_refused(site: Callable[..., Site]) -> None:
    here = site()
    silo = here.silo("silo-a")
    about: dict[str, Any] = {"plan": here.plan.digest, "session": "a" * 32}
    join = JoinRequest(**about, plan_text=here.plan.to_toml(), layout=here.layout.to_json())
    assert "fewer sessions" in refused(here, join.model_copy(update={"round": 3}))
    assert not (silo.state / here.plan.digest).exists()
    assert isinstance(Participant(silo).answer(join), JoinReply)
    model = {piece.name: np.zeros(piece.block.shape, np.float32) for piece in here.layout.deltas}
    assert "not in the layout" in refused(here, TrainRequest(**about, arrays=model))
    later = {**about, "round": 2}
    wrong = {**model, next(iter(model)): np.full(next(iter(model.values())).shape, np.nan, np.float32)}
    assert "NaN" in refused(here, TrainRequest(**later, arrays=wrong))
    assert "fewer sessions" in refused(here, TrainRequest(**about, round=3, arrays=model))
    assert refused(here, UploadRequest(**later, piece=0, piece_bytes=1000)) == "not trained"
    assert isinstance(Participant(silo).answer(TrainRequest(**later, arrays=model)), TrainReply)
    assert refused(here, UploadRequest(**about, piece=0, piece_bytes=1000)) == "not trained"


def test_a_session_belongs_to_one_round(site: Callable[..., Site]) -> None:
    here = site(silos=3, secure=True)
    silo = here.silo("silo-a")
    about: dict[str, Any] = {"plan": here.plan.digest, "session": "a" * 32}
    join = JoinRequest(**about, plan_text=here.plan.to_toml(), layout=here.layout.to_json())
    assert isinstance(Participant(silo).answer(join), JoinReply)
    assert "exchange 2" in refused(here, join.model_copy(update={"round": 2}))
    assert "session is over" in refused(here, TrainRequest(**about))
