"""Sessions of one plan: repeated answers, second sums, and other data."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

from gramfuse_client.state.state import State
from gramfuse_protocol.errors import FailureError
from gramfuse_protocol.messages.phases import Refusal, UnmaskRequest
from gramfuse_protocol.messages.wire import pack
from tests.exchange.secure.coordinator import STEPS, Coordinator, assert_over, at, exchanged, session_of
from tests.exchange.secure.runs import NAMES, A, B, Site


def test_what_was_answered_is_answered_again_to_the_last_bit_and_in_the_end_no_secret_is_left(
    script: Coordinator, place: Path
) -> None:
    shutil.copytree(script.place / "state", place / "state")
    released = {
        share
        for step in ("unmask", "unmask-metrics")
        for r in script.replies[step].values()
        for s in r
        for share in s.shares.values()
    }
    for name in NAMES:
        for step in STEPS:
            for request, before in zip(script.requests[step][name], script.replies[step][name], strict=True):
                reply = script.ask(name, request, place)
                if step.startswith("masked"):
                    assert (reply.error, "sum is over" in reply.reason) == ("RefusalError", True)
                else:
                    assert pack(reply).digest == pack(before).digest, step
        (file,) = session_of(script, place, name).iterdir()
        assert json.loads(file.read_text())["member"] is None
        assert not [secret for secret in script.secrets - released if secret in file.read_text()]


def test_once_a_sum_was_signed_no_other_session_of_its_plan_begins(script: Coordinator, place: Path) -> None:
    again = Coordinator(script.site, script.plan, place, "ee" * 16)
    at(script, "unmask", place, A)
    reply = again.ask(A, again.honest("join", A)[0])
    assert (reply.error, "contributed" in reply.reason) == ("RefusalError", True)
    for step in ("join", "unmask"):  # the session itself goes on, and can be resumed
        assert not isinstance(script.ask(A, script.requests[step][A][0], place), Refusal)

    shutil.rmtree(place / "state")
    at(script, "survivors", place, A)
    again.do("join", [A])


def test_a_second_sum_under_the_same_plan_is_over_the_same_silos_or_none(script: Coordinator, place: Path) -> None:
    site = replace(script.site, repeat=True)
    shutil.copytree(script.place / "evaluate" / "state", place / "state")
    again = Coordinator(site, script.plan, place, "ee" * 16)
    for step in STEPS:  # the same silos: nothing can be learned from it, and nothing is masked with the same masks
        again.do(step)
    first, second = (c.replies["masked"][A][0].arrays["masked"] for c in (script, again))
    assert not (first == second).any()
    assert_over(script, place, A)  # beginning another session ends the one before

    fewer = Coordinator(site, script.plan, place, "dd" * 16)
    fewer.names = NAMES[:4]
    for step in STEPS[:5]:
        fewer.do(step)
    for name in fewer.names:
        reply = fewer.ask(name, fewer.honest("survivors", name)[0])
        assert (reply.error, "over other silos" in reply.reason) == ("SecurityError", True)
    fewer.requests = script.requests
    unmask = UnmaskRequest(**fewer.about, sum_of="statistics", signatures={A: "00" * 64})
    assert isinstance(fewer.ask(A, unmask), Refusal)


def with_other_data(site: Site, place: Path) -> Site:
    """The same silos, of which silo-a has one example more; they contribute in another session too."""
    directory = shutil.copytree(site.project.directory, place / "project", ignore=shutil.ignore_patterns("*.pem"))
    project = copy.copy(site.project)
    object.__setattr__(project, "directory", directory)
    shutil.copytree(site.project.directory / "state", directory / "state", dirs_exist_ok=True)
    with project.train(A).open("a") as file:
        file.write('{"text": "the old cat", "label": "animals"}\n')
    return replace(site, project=project, repeat=True)


def test_other_data_are_not_contributed_under_the_same_plan(script: Coordinator, place: Path) -> None:
    """Nobody is told why, and it stays so, in whatever session, until the silo's owner clears it."""
    at(script, "unmask", place, *NAMES)
    site = with_other_data(script.site, place)
    c = Coordinator(site, script.plan, place)
    c.do("join", [A])
    again = Coordinator(site, script.plan, place, "ee" * 16)
    for request in (c.honest("train", A)[0], again.honest("join", A)[0], script.requests["unmask"][A][0]):
        reply = c.ask(A, request)
        assert (reply.error, reply.reason) == ("FailureError", failed_in(request.phase))
    assert State(place / "state" / A, script.plan.digest).attempts.clear() == 1
    again.site = replace(script.site, repeat=True)  # the data as they were
    for step in ("join", "train"):
        again.do(step, [A])


def failed_in(phase: str) -> str:
    """All that a coordinator reads of a failure."""
    return FailureError("", phase=phase).reason


def test_data_that_change_while_the_masked_vector_is_under_way_do_not_take_its_place(
    script: Coordinator, place: Path
) -> None:
    """The vector was masked; then silo-a trains on other data, the session goes on, and another one is tried."""
    at(script, "survivors", place, *NAMES)
    site = with_other_data(script.site, place)
    assert not isinstance(Coordinator(site, script.plan, place).ask(A, script.requests["train"][A][0]), Refusal)
    for name in NAMES:
        assert not isinstance(script.ask(name, script.requests["survivors"][name][0], place), Refusal)
    again = Coordinator(site, script.plan, place, "ee" * 16)
    for step in STEPS[:5]:
        again.do(step, [n for n in NAMES if (step, n) != ("train", A)])
    reply = again.ask(A, again.honest("survivors", A)[0])
    assert (reply.error, reply.reason) == ("FailureError", failed_in("survivors"))


def test_what_the_silo_file_does_not_allow_is_refused_at_join(script: Coordinator, place: Path) -> None:
    c = Coordinator(script.site, script.plan, place)
    join = c.honest("join", A)[0]
    other = script.site.plan("privacy.minimum-survivors=5")
    keys = {silo.name: silo.public_key for silo in c.plan.silo}
    swapped = c.plan.with_keys(exchanged(keys, A, B))  # type: ignore[arg-type]
    wider = script.site.layout.model_copy(update={"frozen": ()})
    for request, error in (
        (join.model_copy(update={"plan": other.digest, "plan_text": other.to_toml()}), "RefusalError"),
        (join.model_copy(update={"plan_text": other.to_toml()}), "FederationError"),
        (join.model_copy(update={"layout": wider.to_json()}), "FederationError"),
    ):
        assert c.ask(A, request).error == error
    taken = Coordinator(script.site, swapped, place)  # this silo approved it, and it names another key
    reply = taken.ask(A, taken.honest("join", A)[0])
    assert (reply.error, "another key" in reply.reason) == ("RefusalError", True)
    assert not (place / "state" / A).exists()
    script.site.silo(A, c.plan, place).identity()
    for step in STEPS[1:]:
        for request in script.requests[step][A]:
            assert (c.ask(A, request).error, c.ask(A, request).reason) == ("FederationError", "not joined")
