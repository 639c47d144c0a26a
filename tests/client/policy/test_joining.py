"""Who joins: plans, models, layouts and data that are refused, and when."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import torch

from gramfuse_client.exchange import participant as participant_module
from gramfuse_protocol.errors import FailureError, FederationError, ModelError, RefusalError
from gramfuse_protocol.messages.phases import JoinReply, Message, Refusal, UploadReply
from tests.client.policy.silos import Site, no_trace, quotes_nothing, refused


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


def test_data_that_shrink_below_the_minimum_after_joining_are_not_trained_on(site: Callable[..., Site]) -> None:
    here = site()
    here.answer(here.join())
    path = here.silo.directory / here.silo.file.data.train
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    refused(here, here.train(), FailureError)
    assert not here.statistics.exists()
