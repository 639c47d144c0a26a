"""Secure rounds are over the same silos and go on from the same model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, RecordDict

from gramfuse_protocol.errors import FederationError, GramfuseError
from gramfuse_protocol.messages.phases import EvaluateRequest, TrainReply, TrainRequest, UnmaskReply
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_server.run.conductor import Conductor
from tests.exchange.rounds.runs import Answer, Site


def gone(*silos: str, phase: str, number: int, here: Site) -> Callable[[Any, Answer], RecordDict | Error]:
    """A fault: silos are away in a phase of a round."""

    def fault(visit: Any, deliver: Answer) -> RecordDict | Error:
        if visit.node in silos and visit.phase == phase and here.events[-1]["round"] == number:
            return Error(5, "it is away")
        return deliver()

    return fault


def test_secure_rounds_are_over_the_same_silos(site: Callable[..., Site], trainings: Counter[str]) -> None:
    here = site(silos=4, secure=True)
    lost = gone("silo-d", phase="keys", number=1, here=here)
    for phase in ("keys", "masked"):
        later = gone("silo-b", phase=phase, number=2, here=here)

        def fault(visit: Any, deliver: Answer, later: Any = later) -> RecordDict | Error:
            return later(visit, lambda: lost(visit, deliver))

        with pytest.raises(
            FederationError, match=r"silo-b'.*\n.*round 2 needs exactly .*: silo-a, silo-b, silo-c\. Bring"
        ):
            here.run(fault=fault, resume=phase == "masked")
    before = len(here.replies)
    report = here.run(resume=True)
    assert [one["survivors"] for one in report["rounds"]] == [["silo-a", "silo-b", "silo-c"]] * 2
    assert [lost["name"] for lost in report["lost"]] == ["silo-d"]
    assert set(trainings.values()) == {1}
    assert "silo-d 2" not in trainings
    assert report["unmeasured"] is None
    assert not [reply for _, reply in here.replies[before:] if isinstance(reply, TrainReply)]


def test_silos_sign_no_sum_over_others_in_a_later_round(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site(silos=4, secure=True)
    monkeypatch.setattr(Conductor, "_survivors_of_subject", lambda self: ())  # a coordinator that does not care
    with pytest.raises(GramfuseError, match="statistics over other silos"):
        here.run(fault=gone("silo-d", phase="masked", number=2, here=here))
    assert not [reply for _, reply in here.replies if isinstance(reply, UnmaskReply) and reply.round == 2]


def goes_on_from(request: Any) -> bool:
    """Whether a request brings the model of the first round that the second starts from."""
    start = isinstance(request, TrainRequest) and request.round == 2
    return start or (isinstance(request, EvaluateRequest) and (request.round, request.candidate) == (1, "regmean"))


@pytest.mark.parametrize("fooled", [("silo-a",), ("silo-b", "silo-c", "silo-d")])
def test_silos_that_go_on_from_different_models_take_part_in_no_sum(
    site: Callable[..., Site], fooled: tuple[str, ...]
) -> None:
    """A model can be made from which silos have nothing to add; the sum would be the others' alone."""
    here = site(silos=4, secure=True)

    def change(name: str, request: Any) -> Any:
        if name in fooled and goes_on_from(request):
            arrays = {key: array * np.float32(0.5) for key, array in request.arrays.items()}
            return request.model_copy(update={"arrays": arrays})
        return request

    with pytest.raises(GramfuseError, match=f"the keys of silo '{fooled[0]}': not signed"):
        here.run(change=change)
    assert not [reply for _, reply in here.replies if reply.round == 2 and reply.phase in ("shares", "masked")]


def test_a_coordinator_that_does_not_check_keys_gets_no_shares_for_different_models(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site(silos=4, secure=True)
    unchecked = dict.fromkeys(("check_advert", "check_adverts"), lambda *_: None)
    monkeypatch.setattr(
        "gramfuse_server.run.secure_sums.secure_sum", SimpleNamespace(**{**vars(secure_sum), **unchecked})
    )

    def change(name: str, request: Any) -> Any:
        if name != "silo-a" and goes_on_from(request):
            arrays = {key: array * 0 for key, array in request.arrays.items()}
            return request.model_copy(update={"arrays": arrays})
        return request

    with pytest.raises(GramfuseError, match=r"silo 'silo-a' .* 'shares': .* silo 'silo-b'"):
        here.run(change=change)
    assert not [reply for _, reply in here.replies if reply.round == 2 and reply.phase in ("shares", "masked")]
