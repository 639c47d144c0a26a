"""What comes out of rounds: silos go on from the merged model, round after round, open and secure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, RecordDict

from gramfuse_cli.show.results import show_report
from gramfuse_client.state.state import State
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.messages.phases import UnmaskReply
from gramfuse_server.report.schema import Measured, Report
from tests.exchange.rounds.runs import Answer, Done, Site, assert_close, by_hand
from tests.reports import read_back


def test_two_rounds_are_two_exchanges_the_second_from_where_the_first_ended(done: Done) -> None:
    names = done.site.plan.names
    assert done.trainings == {f"{name} {number}": 1 for name in names for number in (1, 2)}
    assert_close(done.site.weights, by_hand(done.site, (names, names)), 1e-7)


def test_the_report_has_each_round_and_what_all_of_them_took(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    here, report, names = done.site, done.report, done.site.plan.names
    first, second = report["rounds"]
    assert (first["round"], second["round"]) == (1, 2)
    assert first["survivors"] == second["survivors"] == list(names)
    for one in (first, second):
        assert [model["name"] for model in one["models"]] == [*names, "simple", "regmean"]
        assert one["unmeasured"] is None
        assert {step["outcome"] for step in one["solve"]} == {"clean"}
    assert report["models"] == second["models"]
    for key in ("bytes", "bytes_to_silos"):
        for name in names:
            for phase, count in report[key][name].items():
                assert count == first[key][name][phase] + second[key][name][phase]
    model = 4 * sum(piece.block.entries for piece in here.layout.deltas)
    for name in names:
        assert first["bytes_to_silos"][name]["train"] < 1000 < model <= second["bytes_to_silos"][name]["train"]
    assert report["seconds"]["train"] == pytest.approx(first["seconds"]["train"] + second["seconds"]["train"], abs=2e-3)
    assert {path.name for path in here.out.iterdir()} == {
        "SHA256SUMS", "layout.json", "model", "plan.toml", "report.html", "report.json", "transcript.jsonl",
    }  # fmt: skip
    assert read_back(here.out) == report
    show_report(Report.read(report), here.out, False)
    shown = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    merges = [f"{name}, round {number}" for number in (1, 2) for name in ("simple average", "RegMean")]
    assert shown == [*merges[:2], *(f"{name} alone" for name in names), *merges[2:]]
    begun = [(event["phase"], event["round"], event["rounds"]) for event in here.events if event["state"] == "start"]
    assert [(phase, number) for phase, number, rounds in begun if phase == "train"] == [("train", 1), ("train", 2)]
    assert {rounds for _, _, rounds in begun} == {2}
    entries = [json.loads(line)["entry"] for line in here.silo(names[0]).ledger.read_text().splitlines()]
    assert [(entry["phase"], entry["round"]) for entry in entries] == [
        *((phase, 1) for phase in ("join", "train", "upload", *["evaluate"] * 2)),
        *((phase, 2) for phase in ("join", "train", "upload", *["evaluate"] * 2, "finish")),
    ]


def test_what_is_measured_are_whole_models_in_every_round(done: Done) -> None:
    """Differences are from the base, and not from what a round started from: also those of silos' own models."""
    here, sent = done.site, done.sent
    base = load_base(here.plan, here.project.directory).model.state_dict()
    own = State(here.state / "silo-a", here.plan.digest, 2).contribution()
    laboratory = here.laboratory(2, here.plan.names)
    models = [laboratory.deltas(name) for name in here.plan.names]
    assert sent[1, "start"] == {}
    assert {name for _, name in sent} == {"start", "simple", "regmean"}, "silos' own models are sent to nobody"
    for name, array in sent[2, "regmean"].items():
        np.testing.assert_array_equal(sent[2, "start"][name], sent[1, "regmean"][name])
        parameter = name.removeprefix("delta:")
        np.testing.assert_allclose(base[parameter].numpy() + array, here.weights[parameter], atol=1e-7)
        np.testing.assert_allclose(models[0][parameter], sent[2, "start"][name] + own.block(name), atol=1e-7)
        mean = np.mean([model[parameter] for model in models], axis=0)
        np.testing.assert_allclose(sent[2, "simple"][name], mean, atol=1e-7)


def test_much_of_a_contribution_is_the_same_in_every_round(done: Done) -> None:
    """Why a secure sum is over the same silos in each: the difference of two sums would hold one silo's Gram matrix."""
    states = (State(done.site.state / "silo-a", done.site.plan.digest, number) for number in (1, 2))
    first, second = (state.contribution() for state in states)
    group = done.site.layout.groups[0].name
    np.testing.assert_allclose(first.block(f"gram:{group}"), second.block(f"gram:{group}"), rtol=1e-5, atol=1e-6)
    assert first.tokens == second.tokens


def test_secure_rounds_are_the_open_ones(site: Callable[..., Site]) -> None:
    secure = site(silos=4, secure=True)
    opened = site("privacy.secure-aggregation=false", silos=4, secure=True, name="open")
    reports = [one.run(simulated=one.laboratory) for one in (secure, opened)]
    assert_close(secure.weights, opened.weights, 1e-6)
    for one, other in zip(reports[0]["rounds"], reports[1]["rounds"], strict=True):
        assert one["unmeasured"] is other["unmeasured"] is None
        pairs = list(zip(one["models"], other["models"], strict=True))
        for masked, plain in pairs:
            assert Measured.read(masked).without_noise.metrics == pytest.approx(plain["metrics"], rel=1e-6)
        for masked, plain in pairs[-2:]:
            assert masked["metrics"] != plain["metrics"], "what was summed has noise"
            assert masked["intervals"].keys() == plain["metrics"].keys()
            assert masked["privacy"]["total"]["releases"] == 4
    said = [reply for _, reply in secure.replies if isinstance(reply, UnmaskReply)]
    opening = {(reply.round, reply.sum_of) for reply in said}
    assert opening == {(number, of) for number in (1, 2) for of in ("statistics", "metrics")}
    assert len({(reply.session, reply.round) for reply in said}) == len({reply.session for reply in said}) == 2
    assert not list(secure.state.rglob("*.masked*"))
    for path in secure.state.rglob("session.json"):
        assert json.loads(path.read_text())["ended"] is not None
        assert json.loads(path.read_text())["member"] is None
    assert all(path.stat().st_mode & 0o077 == 0 for path in secure.state.rglob("*"))


def test_in_the_open_a_silo_that_was_lost_may_come_back(site: Callable[..., Site]) -> None:
    here = site("privacy.minimum-survivors=2")

    def fault(visit: Any, deliver: Answer) -> RecordDict | Error:
        if visit.node == "silo-b" and visit.phase == "upload" and not here.events[-1]["round"] > 1:
            return Error(5, "it is away")
        return deliver()

    report = here.run(fault=fault)
    first, second = report["rounds"]
    assert first["survivors"] == ["silo-a", "silo-c"]
    assert [lost["name"] for lost in first["lost"]] == ["silo-b"]
    assert second["survivors"] == ["silo-a", "silo-b", "silo-c"]
    assert report["lost"] == second["lost"] == []
    assert_close(here.weights, by_hand(here, (("silo-a", "silo-c"), here.plan.names)), 1e-7)
