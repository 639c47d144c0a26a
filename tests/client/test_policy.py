"""What a silo refuses, and that a refusal tells the coordinator why but nothing of the silo's own."""

from __future__ import annotations

import itertools
import json
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.supercore.task_identity import TaskIdentity

from gramfuse_client.app import SiloApp
from gramfuse_client.exchange import participant as participant_module
from gramfuse_client.exchange.participant import Participant
from gramfuse_client.guard.policy import check_bytes, check_examples, check_hours, check_plan, refusals
from gramfuse_client.silo_file import Coordinator, Data, Limits, Silo, SiloFile
from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.node_key import generate
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Pins
from gramfuse_protocol.errors import FailureError, FederationError, ModelError, RefusalError, error_types
from gramfuse_protocol.files import exclusive
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import (
    REPLIES,
    EvaluateReply,
    EvaluateRequest,
    JoinReply,
    JoinRequest,
    Message,
    Refusal,
    TrainReply,
    TrainRequest,
    UploadReply,
    UploadRequest,
)
from gramfuse_protocol.messages.wire import pack, unpack

SESSION = "0123456789abcdef" * 2
OTHER_SESSION = "fedcba9876543210" * 2

PLAN = Plan.parse(
    f"""
    [plan]
    name = "pico"
    [model]
    base = "pico"
    sha256 = "{"1" * 64}"
    config = "{"3" * 64}"
    processor = "{"4" * 64}"
    task = "classification"
    labels = ["animals", "weather"]
    [merge]
    layout = "{"2" * 64}"
    [privacy]
    secure-aggregation = false
    metrics = "sum"
    [[silo]]
    name = "silo-a"
    """
)
WITH_SILO_METRICS = PLAN.override(['privacy.metrics="silo"']).pinned(Pins("1" * 64, "3" * 64, "4" * 64), "2" * 64)
UNLOCKED = PLAN.override(["merge.alpha=1.0"])
PATH = Path("private") / "silo-a.toml"


def willing(**changes: Any) -> Silo:
    """Return a silo that takes PLAN, but for what is changed; keys of [limits] go there."""
    limits = {key: changes.pop(key) for key in list(changes) if key in Limits.model_fields}
    file = {"name": "silo-a", "approved": (PLAN.digest, WITH_SILO_METRICS.digest, UNLOCKED.digest), **changes}
    data = Data(train="train.jsonl", held_out="held-out.jsonl")
    return Silo(PATH, SiloFile(data=data, limits=Limits(**{"open_uploads": True, "metrics": "sum", **limits}), **file))


def test_a_plan_within_the_silos_limits_is_accepted() -> None:
    check_plan(willing(), PLAN)
    check_plan(willing(metrics="silo"), WITH_SILO_METRICS)
    check_plan(willing(metrics="silo"), PLAN)
    check_examples(willing(minimum_examples=10), 10)


@pytest.mark.parametrize(
    ("silo", "plan", "key"),
    [
        (willing(approved=()), PLAN, "'approved'"),
        (willing(approved=("3" * 64,)), PLAN, "'approved'"),
        (willing(name="silo-b"), PLAN, "'name'"),
        (willing(), UNLOCKED, "plan lock"),
        (willing(open_uploads=False), PLAN, "'limits.open-uploads'"),
        (willing(metrics="none"), PLAN, "'limits.metrics'"),
        (willing(metrics="sum"), WITH_SILO_METRICS, "'limits.metrics'"),
    ],
    ids=[
        "nothing approved",
        "another plan approved",
        "not in the roster",
        "unlocked",
        "open",
        "no metrics",
        "sum only",
    ],
)
def test_a_plan_beyond_the_silo_file_is_refused_by_its_key(silo: Silo, plan: Plan, key: str) -> None:
    with pytest.raises(RefusalError) as caught:
        check_plan(silo, plan)
    assert str(caught.value).startswith(f"{PATH}: ")
    assert key in str(caught.value)
    quotes_nothing(caught.value.reason, [str(PATH), *silo.file.approved, silo.name])


@pytest.mark.parametrize(("asked", "allowed"), [*itertools.product(("mean", "diagonal", "full"), repeat=2)])
def test_a_secure_plan_gets_of_layers_without_context_what_the_silo_file_allows(asked: str, allowed: str) -> None:
    plan = PLAN.override([f'merge.context-free="{asked}"'])
    secure = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"secure_aggregation": True})})
    silo = willing(context_free=allowed)
    order = ("mean", "diagonal", "full")
    found = dict(refusals(silo, secure))
    assert ("vocabulary" in found) == (order.index(asked) > order.index(allowed))
    assert "vocabulary" not in dict(refusals(silo, plan)), "in open mode the coordinator sees all of it anyway"
    for error in (found[key] for key in found if key == "vocabulary"):
        assert isinstance(error, RefusalError)
        assert "'limits.context-free'" in str(error)
        assert f'context-free = "{asked}"' in str(error)
        quotes_nothing(error.reason, [str(PATH), silo.name])


def test_too_few_examples_are_refused_by_the_key_and_not_counted_for_the_coordinator() -> None:
    with pytest.raises(RefusalError) as caught:
        check_examples(willing(minimum_examples=58), 57)
    assert str(caught.value).startswith(f"{PATH}: 57 training examples")
    assert "'limits.minimum-examples' = 58" in str(caught.value)
    quotes_nothing(caught.value.reason, [str(PATH), "57", "58"])


@pytest.mark.parametrize(
    ("hours", "within", "outside"),
    [
        ("08:00-17:30", ["08:00", "12:00", "17:29:59.999999"], ["17:30", "23:00", "00:00", "07:59:59.999999"]),
        (
            "20:00-06:00",
            ["20:00", "23:59:59.999999", "00:00", "05:59:59.999999"],
            ["06:00", "12:00", "19:59:59.999999"],
        ),
        ("22:00-00:00", ["22:00", "23:59:59.999999"], ["00:00", "21:59:59.999999"]),
    ],
)
def test_a_silo_trains_from_the_start_of_its_hours_until_before_their_end(
    hours: str, within: list[str], outside: list[str]
) -> None:
    silo = willing(train_hours=hours)
    for moment in within:
        check_hours(silo, datetime.combine(datetime(2030, 1, 31), time.fromisoformat(moment)))
    for moment in outside:
        with pytest.raises(RefusalError) as caught:
            check_hours(silo, datetime.combine(datetime(2030, 1, 31), time.fromisoformat(moment)))
        assert str(caught.value) == f"{PATH}: it is {moment[:5]}; 'limits.train-hours' is {hours}"
        assert hours in caught.value.reason
        quotes_nothing(caught.value.reason, [str(PATH), silo.name])


def test_a_node_key_that_is_not_the_rosters_is_refused(tmp_path: Path) -> None:
    def silo(name: str, plan: Plan) -> Silo:
        coordinator = Coordinator(address="merge.example.org:9092")
        return Silo(tmp_path / name, willing(approved=(plan.digest,), coordinator=coordinator).file)

    keys = {name: generate() for name in ("silo-a", "other")}
    for name, (private, _) in keys.items():
        (tmp_path / f"{name}.key").touch(mode=0o600)
        (tmp_path / f"{name}.key").write_text(private)
    entry = PLAN.silo[0].model_copy(update={"node_key": keys["silo-a"][1]})
    plan = PLAN.model_copy(update={"silo": (entry,)})
    check_plan(silo("silo-a.toml", plan), plan)
    with pytest.raises(RefusalError) as caught:
        check_plan(silo("other.toml", plan), plan)
    assert f"another node key for 'silo-a' than {tmp_path / 'other.key'} holds" in str(caught.value)
    assert str(caught.value).endswith(f"here it is {keys['other'][1]}")
    quotes_nothing(caught.value.reason, [str(tmp_path), "silo-a", *(line.split()[1] for _, line in keys.values())])
    # Who connects in another way has no such key, and a plan may leave it out.
    check_plan(willing(approved=(plan.digest,)), plan)
    check_plan(silo("third.toml", PLAN), PLAN)


def test_limits_are_strict_unless_the_silo_file_loosens_them() -> None:
    strict = Silo(PATH, willing().file.model_copy(update={"limits": Limits()}))
    with pytest.raises(RefusalError, match=r"limits\.open-uploads"):
        check_plan(strict, PLAN)
    with pytest.raises(RefusalError, match=r"limits\.minimum-examples"):
        check_examples(strict, 99)


def quotes_nothing(reason: str, secrets: list[str]) -> None:
    """Assert that a reason, which crosses to the coordinator, holds none of the silo's own."""
    assert reason
    for secret in secrets:
        assert secret not in reason


@dataclass(frozen=True)
class Site:
    """A silo with pico data and a pico model that has approved a locked plan."""

    path: Path
    plan: Plan
    layout: Layout

    @property
    def silo(self) -> Silo:
        """The silo file as it is now."""
        return Silo.read(self.path)

    @property
    def statistics(self) -> Path:
        return self.silo.state / self.plan.digest / "statistics.safetensors"

    def answer(self, request: Message) -> Message:
        """Answer in a new process, as it were: nothing is remembered but what is on disk."""
        return Participant(self.silo).answer(request)

    def edit(self, old: str, new: str) -> None:
        text = self.path.read_text()
        assert old in text
        self.path.write_text(text.replace(old, new, 1))

    def join(self, **changes: Any) -> JoinRequest:
        return JoinRequest(
            **{
                "plan": self.plan.digest,
                "session": SESSION,
                "plan_text": self.plan.to_toml(),
                "layout": self.layout.to_json(),
                **changes,
            }
        )

    def train(self, session: str = SESSION) -> TrainRequest:
        return TrainRequest(plan=self.plan.digest, session=session)

    def upload(self, piece: int = 0, piece_bytes: int = 2**20) -> UploadRequest:
        return UploadRequest(plan=self.plan.digest, session=SESSION, piece=piece, piece_bytes=piece_bytes)

    def evaluate(self) -> EvaluateRequest:
        arrays = {piece.name: np.zeros(piece.block.shape, np.float32) for piece in self.layout.deltas}
        return EvaluateRequest(plan=self.plan.digest, session=SESSION, candidate="regmean", arrays=arrays)


@pytest.fixture
def site(pico_project: Callable[..., Any]) -> Callable[..., Site]:
    """Return a function that makes a Site; its arguments are settings of the plan."""

    def make(*settings: str) -> Site:
        project = pico_project(silos=1)
        plan = Plan.read(project.plan).override(["training.epochs=1", *settings])
        base = load_base(plan, project.directory)
        layout = plan_layout(plan, base)
        plan = plan.pinned(base.pins, layout.digest)
        site = Site(project.silo("silo-a"), plan, layout)
        site.edit("approved = []", f'approved = ["{plan.digest}"]')
        return site

    return make


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    # The most careless umask there is: what is private must be so by the code's own doing.
    before = os.umask(0)
    yield
    os.umask(before)


def no_trace(site: Site) -> bool:
    """Whether a silo keeps nothing of what it was asked, but for the lock under which it answers."""
    state = site.silo.state
    return not state.exists() or [path.name for path in state.rglob("*")] == ["lock"]


def refused(site: Site, request: Message, kind: type[Exception]) -> Refusal:
    """Return the refusal that a request must get, after a look at what it gives away."""
    reply = site.answer(request)
    assert isinstance(reply, Refusal)
    assert (reply.error, reply.plan, reply.session) == (kind.__name__, request.plan, request.session)
    assert reply.exit_code == error_types()[kind.__name__].exit_code
    assert not reply.arrays
    quotes_nothing(reply.reason, [str(site.path.parent), "/", "cat", "dog", ".jsonl"])
    return reply


def test_a_plan_that_is_not_approved_is_refused_and_leaves_no_trace(site: Callable[..., Site]) -> None:
    here = site()
    other = here.plan.override(["merge.alpha=0.5"]).pinned(here.plan.pins, here.plan.merge.layout)
    refused(here, here.join(plan=other.digest, plan_text=other.to_toml()), RefusalError)
    assert no_trace(here)


def test_an_approved_digest_does_not_cover_the_text_of_another_plan(site: Callable[..., Site]) -> None:
    here = site()
    other = here.plan.override(["merge.tokens=7"]).pinned(here.plan.pins, here.layout.digest)
    refused(here, here.join(plan_text=other.to_toml()), FederationError)
    assert no_trace(here)


def test_another_base_model_is_refused_however_alike_it_looks(
    site: Callable[..., Site], tmp_path: Path, pico_bert: Path
) -> None:
    from transformers import AutoModel, AutoTokenizer

    here = site()
    twin = AutoModel.from_pretrained(pico_bert)
    with torch.no_grad():
        weight = twin.encoder.layer[1].output.dense.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1.0))
    twin.save_pretrained(tmp_path / "twin")
    AutoTokenizer.from_pretrained(pico_bert).save_pretrained(tmp_path / "twin")
    here.edit('device = "cpu"', f'device = "cpu"\nbase = "{tmp_path / "twin"}"')
    refused(here, here.join(), ModelError)
    assert no_trace(here)


def test_another_architecture_is_refused(site: Callable[..., Site], pico_gpt2: Path) -> None:
    here = site()
    here.edit('device = "cpu"', f'device = "cpu"\nbase = "{pico_gpt2}"')
    refused(here, here.join(), ModelError)


def test_a_layout_that_is_not_the_plans_is_refused(site: Callable[..., Site]) -> None:
    here = site()
    wider = here.layout.model_copy(update={"frozen": ()})
    refused(here, here.join(layout=wider.to_json()), FederationError)
    assert no_trace(here)


def test_data_that_do_not_fit_the_plan_are_refused_without_being_quoted(site: Callable[..., Site]) -> None:
    here = site()
    row = {"text": "Anna Example, born in 1950", "label": "confidential-label"}
    with (here.silo.directory / here.silo.file.data.train).open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert isinstance(here.answer(here.join()), JoinReply)
    reply = here.answer(here.train())
    assert isinstance(reply, Refusal)
    assert (reply.error, reply.exit_code) == ("FailureError", 20)
    quotes_nothing(
        reply.model_dump_json(), ["Anna", "1950", "confidential-label", "train.jsonl", str(here.path.parent)]
    )


@pytest.mark.parametrize("request_of", [Site.train, Site.upload, Site.evaluate], ids=["train", "upload", "evaluate"])
def test_nothing_is_answered_before_joining(request_of: Callable[[Site], Message], site: Callable[..., Site]) -> None:
    here = site()
    assert refused(here, request_of(here), FederationError).reason == "not joined"
    assert no_trace(here)


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
    assert str(caught.value).startswith(f"{PATH}: a contribution under this plan has {size:,} bytes, and ")
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
        assert reply.reason == "this silo contributed under this plan before"
    assert isinstance(here.answer(here.join()), JoinReply), "an interrupted session goes on"
    again = here.answer(here.upload())
    assert isinstance(again, UploadReply)
    assert {name: array.tobytes() for name, array in again.arrays.items()} == {
        name: array.tobytes() for name, array in first.arrays.items()
    }
    here.edit("[limits]", "[limits]\nrepeat-contributions = true")
    assert isinstance(here.answer(here.join(session=OTHER_SESSION)), JoinReply)


def test_outside_of_its_hours_a_silo_neither_joins_nor_trains_and_what_it_has_may_leave(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        hour = 12

        @classmethod
        def now(cls) -> datetime:
            return datetime(2030, 1, 31, cls.hour)

    monkeypatch.setattr(participant_module, "datetime", Clock)
    here = site()
    here.edit("[limits]", '[limits]\ntrain-hours = "20:00-06:00"')
    refused(here, here.join(), RefusalError)
    assert no_trace(here)
    Clock.hour = 20
    assert isinstance(here.answer(here.join()), JoinReply)
    Clock.hour = 6
    refused(here, here.train(), RefusalError)
    assert not here.statistics.exists()
    Clock.hour = 5
    trained = here.answer(here.train())
    Clock.hour = 12
    assert here.answer(here.train()) == trained
    assert isinstance(here.answer(here.upload()), UploadReply)


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


@pytest.mark.parametrize(
    ("request_of", "withdrawal"),
    [
        (Site.train, ("approved = [", "approved = [] #")),
        (Site.upload, ("approved = [", "approved = [] #")),
        (Site.evaluate, ("approved = [", "approved = [] #")),
        (Site.upload, ("open-uploads = true", "open-uploads = false")),
        (Site.upload, ("open-uploads = true", "open-uploads = true\nmaximum-bytes = 1")),
    ],
    ids=["approval, train", "approval, upload", "approval, evaluate", "open uploads, upload", "bytes, upload"],
)
def test_what_the_operator_withdraws_after_joining_holds_from_then_on(
    request_of: Callable[[Site], Message], withdrawal: tuple[str, str], site: Callable[..., Site]
) -> None:
    here = site()
    for asked in (here.join(), here.train(), here.upload()):
        here.answer(asked)
    assert not isinstance(here.answer(request_of(here)), Refusal)
    here.edit(*withdrawal)
    refused(here, request_of(here), RefusalError)


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


def test_data_that_shrink_below_the_minimum_after_joining_are_not_trained_on(site: Callable[..., Site]) -> None:
    here = site()
    here.answer(here.join())
    path = here.silo.directory / here.silo.file.data.train
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    refused(here, here.train(), FailureError)
    assert not here.statistics.exists()


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
