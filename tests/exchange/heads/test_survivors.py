"""Who is in which sum: statistics may lack silos of the head's sums, and a second fit may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Error, RecordDict

from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.errors import FederationError, MergeError
from gramfuse_protocol.messages.phases import UnmaskReply
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_server.merging.head_accumulator import HeadAccumulator
from gramfuse_server.run.conductor import Conductor
from tests.exchange.rounds.runs import Answer, Models, Site, assert_close


def gone(*silos: str, phase: str, work: str, here: Site) -> Callable[[Any, Answer], RecordDict | Error]:
    """A fault: silos are away in a phase of a stage."""

    def fault(visit: Any, deliver: Answer) -> RecordDict | Error:
        if visit.node in silos and visit.phase == phase and here.events[-1].get("work", "train") == work:
            return Error(5, "it is away")
        return deliver()

    return fault


@pytest.mark.parametrize("phase", ["train", "masked"])
def test_a_silo_that_drops_out_after_the_head_was_fitted_is_left_out_and_nothing_can_be_subtracted(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    loaded: list[Accumulator] = []
    load = Accumulator.load

    def keep(self: Accumulator, words: Any, silos: int) -> None:
        load(self, words, silos)
        loaded.append(self)

    monkeypatch.setattr(Accumulator, "load", keep)
    here = site(silos=4, secure=True)
    report = here.run(fault=gone("silo-d", phase=phase, work="train", here=here))
    assert [one["survivors"] for one in report["rounds"]] == [
        ["silo-a", "silo-b", "silo-c", "silo-d"],
        ["silo-a", "silo-b", "silo-c"],
    ]
    assert [lost["name"] for lost in report["lost"]] == ["silo-d"]
    assert report["rounds"][1]["examples"] == 0  # nothing counts the examples of these three
    assert report["examples"] == report["rounds"][0]["examples"]
    assert [silo["name"] for silo in report["silos"]] == ["silo-a", "silo-b", "silo-c", "silo-d"]
    card = (here.out / "model" / "README.md").read_text(encoding="utf-8")
    assert "at 3 silos (silo-a, silo-b, silo-c)" in card
    assert "the examples of 4 silos (silo-a, silo-b, silo-c, silo-d)" in card
    assert "only in the fitted head" in (here.out / "report.html").read_text(encoding="utf-8")
    (sums,) = loaded
    weight, *counts = sums.counts
    assert weight == 3
    assert not any(counts)
    assert here.layout.head is not None
    weights = {linear.weight for _, linear in here.layout.linear()}
    assert here.layout.head.weight not in weights
    assert weights


def test_the_head_is_not_fitted_again_without_a_silo_of_the_first_fit(site: Callable[..., Site]) -> None:
    here = site("merge.refit=true", silos=4, secure=True)
    report = here.run(fault=gone("silo-d", phase="train", work="train", here=here))
    assert [one["work"] for one in report["rounds"]] == ["fit", "train"]
    assert report["merged"] == "regmean"
    assert "silo-d" in report["unfitted"]


@pytest.mark.parametrize(
    ("secure", "phase", "work"), [(False, "train", "refit"), (True, "train", "refit"), (True, "evaluate", "train")]
)
def test_without_a_silo_that_a_second_fit_needs_the_merge_is_the_result(
    site: Callable[..., Site], secure: bool, phase: str, work: str
) -> None:
    here, models = site("merge.refit=true", "privacy.minimum-survivors=4", silos=4, secure=secure), Models()
    report = here.run(fault=gone("silo-b", phase=phase, work=work, here=here), change=models)
    assert report["merged"] == "regmean"
    assert ("silo-b" if work == "refit" else "silo-") in report["unfitted"]  # the others also lack the merge then
    assert [model["kind"] for model in report["models"]] == (["simple", "regmean"] if work == "refit" else [])
    assert report["rounds"][-1]["work"] == "train"
    assert {step["outcome"] for step in report["solve"]} == {"clean"}
    base = load_base(here.plan, here.project.directory).model.state_dict()
    merged = {
        name[6:]: base[name[6:]].numpy() + delta
        for name, delta in models.sent.get((2, "regmean"), {}).items()
        if name.startswith("delta:classifier")
    }
    assert bool(merged) == (work == "refit")  # if it was away, it was sent the simple average and nothing after it
    if merged:
        assert_close({name: here.weights[name] for name in merged}, merged, 1e-6)


def test_silos_sign_no_second_sum_of_a_head_over_others(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The coordinator goes on without a silo, which the honest one never does: silos refuse.
    here = site("merge.refit=true", silos=4, secure=True)
    monkeypatch.setattr(Conductor, "_survivors_of_subject", lambda self: ())
    report = here.run(fault=gone("silo-d", phase="keys", work="refit", here=here))
    assert report["merged"] == "regmean"
    assert not [reply for _, reply in here.replies if isinstance(reply, UnmaskReply) and reply.round == 3]


def test_weights_by_examples_need_the_same_silos(site: Callable[..., Site]) -> None:
    here = site('merge.weighting="examples"', silos=4, secure=True)
    with pytest.raises(FederationError, match="silo-d"):
        here.run(fault=gone("silo-d", phase="train", work="train", here=here))
    report = here.run(resume=True)
    assert report["examples"] == 4 * 24


def test_sums_that_allow_no_second_head_end_the_run_with_the_merge(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = HeadAccumulator.fit

    def fail(self: HeadAccumulator) -> Any:
        if self.seen:
            raise MergeError("the features do not vary")
        return fit(self)

    monkeypatch.setattr(HeadAccumulator, "fit", fail)
    report = site("merge.refit=true", secure=True).run()
    assert report["merged"] == "regmean"
    assert "do not vary" in report["unfitted"]
