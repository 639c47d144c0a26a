"""Equal to the open merge, whoever drops out and whatever is lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gramfuse_protocol.errors import GramfuseError, RefusalError
from gramfuse_server.merging.accumulator import Accumulator, rounded
from tests.exchange.secure.runs import NAMES, PHASES, A, Answer, B, C, D, E, Run, Site, distance, gone, left

# Equal to the open merge


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_secure_merge_is_the_open_merge_in_any_order_of_arrival(
    site: Site, in_process_grid: Any, place: Path, weighting: str
) -> None:
    results = {}
    for mode in ("true", "false"):
        plan = site.plan(f"merge.weighting={weighting}", f"privacy.secure-aggregation={mode}", silos=4)
        results[mode] = run = Run(site, plan, place / mode, 4096)
        report = run.start(in_process_grid, lag=random.Random(5))
        assert report["unmeasured"] is None
        assert report["lost"] == []
    secure, opened = results["true"], results["false"]
    start = {name: p.detach().numpy() for name, p in site.base.model.named_parameters()}
    assert distance(secure.deltas, opened.deltas, start) <= 1e-6
    assert distance(secure.deltas, opened.deltas) <= 1e-6
    assert distance(opened.deltas, rounded(site.merged(opened.plan, NAMES[:4]))) == 0
    for one, other in zip(secure.report["models"], opened.report["models"], strict=True):
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-5)
        assert one["labels"] == other["labels"]
    assert [m["metrics"]["examples"] for m in secure.report["models"]] == [80, 80]
    assert secure.report["examples"] == opened.report["examples"] == 100 * sum(12 + 2 * n for n in range(4))
    assert secure.report["silos"] == [{"name": name, "examples": None} for name in NAMES[:4]]
    pieces = -(-8 * site.layout.sum_entries // 4096)
    assert pieces > 5
    assert secure.grid.sent.count((A, "masked")) == pieces + 1
    assert "upload" not in {phase for _, phase in secure.grid.sent}
    assert set(secure.shares().values()) == {4}
    assert not list((secure.out).glob("spool*"))


# Drop-outs


@pytest.mark.parametrize(
    ("phase", "number", "refuses"),
    [(phase, 1, False) for phase in ("train", "keys", "shares", "survivors", "unmask")]
    + [(phase, 1, True) for phase in ("join", "survivors", "unmask")]
    + [("masked", number, refuses) for number in (1, 3) for refuses in (False, True)]
    + [("join", 1, False), ("evaluate", 2, False)],
)
def test_one_silo_may_drop_out_in_any_phase(
    site: Site, in_process_grid: Any, place: Path, phase: str, number: int, refuses: bool
) -> None:
    run = Run(site, site.plan(), place)
    report = run.start(in_process_grid, fault=gone({C: (phase, number)}, refuses=refuses))
    left_before = phase in ("join", "train", "keys", "shares", "masked")
    survivors = [name for name in NAMES if name != C or not left_before]
    assert [silo["name"] for silo in report["silos"]] == survivors
    ((lost, reason),) = [(lost["name"], lost["reason"]) for lost in report["lost"]]
    assert lost == C
    if refuses or phase != "join":  # before it has joined, a silo is known by its node alone
        assert f"silo {C!r}" in reason
        assert repr(phase) in reason
        assert ("the operator said no" if refuses else "Flower error 5") in reason
    assert [event["silo"] for event in run.events if event["state"] == "lost"][-1:] == (
        [C] if phase != "join" or refuses else [f"node {run.grid.number(C)}"]
    )
    assert distance(run.deltas, site.merged(run.plan, survivors)) <= 1e-6
    assert report["unmeasured"] is None
    assert [model["metrics"]["examples"] for model in report["models"]] == [80, 80]
    assert not [sent for sent in run.grid.sent[run.grid.sent.index((A, "evaluate")) :] if sent[0] == C and left_before]


@pytest.mark.parametrize(
    ("phases", "refuses"),
    [
        *((("train", "train"), r) for r in (False, True)),
        *(((phase, phase), phase in ("shares", "masked")) for phase in PHASES),
        (("keys", "unmask"), False),
        (("masked", "survivors"), True),
    ],
)
def test_two_losses_of_five_end_the_run_and_reveal_nothing(
    site: Site, in_process_grid: Any, place: Path, phases: tuple[str, str], refuses: bool
) -> None:
    run = Run(site, site.plan(), place)
    with pytest.raises(RefusalError if refuses and len(set(phases)) == 1 else GramfuseError) as caught:
        run.start(in_process_grid, fault=gone({B: (phases[0], 1), D: (phases[1], 1)}, refuses=refuses))
    assert all(repr(name) in str(caught.value) for name in (B, D))
    assert {event["silo"] for event in run.events if event["state"] == "lost"} == {B, D}
    assert not run.out.exists()
    report = left(run, caught.value)
    assert {lost["name"] for lost in report["lost"]} == {B, D}
    # The coordinator asks all that are left before it counts them.
    assert report["failure"]["phase"] == phases[-1] == run.grid.sent[-1][1]
    assert report["failure"]["resumable"] == (run.place / "run.partial").exists() == ("train" not in phases)
    states = {silo["name"]: silo["state"] for silo in report["silos"]}
    assert tuple(states) == NAMES
    assert {name for name, state in states.items() if state == "lost"} == {B, D}
    assert {states[name] for name in (A, C, E)} <= ({"joined", "trained"} if "train" in phases else {"trained"})
    assert report["bytes"][A].keys() <= {phase for _, phase in run.grid.sent} == report["bytes_to_silos"][A].keys()
    assert report["failure"]["phase"] in report["seconds"]
    assert not report.keys() & {"models", "solve", "examples"}
    threshold = run.plan.threshold
    assert threshold == 4
    # To take a mask off, t shares of its seed or key are needed; the statistics' are asked for last of all.
    assert max(run.shares().values(), default=0) < threshold
    assert "evaluate" not in {phase for _, phase in run.grid.sent}


# Faults of every kind


@dataclass(frozen=True)
class Loss:
    """A silo's n-th message of a phase gets lost, before or after the silo did its part; for good, or once."""

    silo: str
    phase: str
    number: int
    delivered: bool
    for_good: bool
    code: int


def losses_of(silos: Sequence[str]) -> st.SearchStrategy[list[Loss]]:
    numbers = {"masked": 4, "survivors": 2, "unmask": 2, "evaluate": 2}
    loss = st.sampled_from(["join", "train", *PHASES, "evaluate"]).flatmap(
        lambda phase: st.builds(
            Loss,
            silo=st.sampled_from(silos),
            phase=st.just(phase),
            number=st.integers(1, numbers.get(phase, 1)),
            delivered=st.booleans(),
            for_good=st.integers(0, 3).map(lambda n: n == 0),
            code=st.sampled_from([3, 5, 8]),
        )
    )
    return st.lists(loss, max_size=6, unique_by=lambda loss: (loss.silo, loss.phase))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.data(), seed=st.integers(0, 2**32))
def test_whatever_gets_lost_the_sum_is_exactly_that_of_the_survivors(
    site: Site, in_process_grid: Any, tmp_path_factory: pytest.TempPathFactory, plan: Any, seed: int
) -> None:
    losses = plan.draw(losses_of(NAMES[:4]))
    left: set[str] = set()
    met: set[str] = set()

    def fault(visit: Any, deliver: Answer) -> RecordDict | Error:
        found = [
            loss for loss in losses if (loss.silo, loss.phase, loss.number) == (visit.node, visit.phase, visit.number)
        ]
        if visit.node not in left and not found:
            return deliver()
        loss = found[0] if found else Loss(visit.node, visit.phase, 0, False, True, 5)
        if loss.delivered and visit.node not in left:
            deliver()
        if loss.for_good:
            left.add(visit.node)
        met.add(visit.node)
        return Error(loss.code, "lost")

    words: list[np.ndarray] = []
    load_sum = Accumulator.load
    run = Run(site, site.plan(silos=4), tmp_path_factory.mktemp("faults"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accumulator, "load", lambda self, w, n: (words.append(w.copy()), load_sum(self, w, n)))
        try:
            report = run.start(in_process_grid, fault=fault, lag=random.Random(seed))
        except GramfuseError:
            assert len(left) > 1, "one silo may be lost"
            assert not run.out.exists()
            assert max((n for (sum_of, _), n in run.shares().items() if sum_of == "statistics"), default=0) <= 2
        else:
            survivors = [silo["name"] for silo in report["silos"]]
            assert {lost["name"] for lost in report["lost"]} == left
            assert len(survivors) >= 3
            np.testing.assert_array_equal(words[0], site.words(run.plan, survivors))
            assert report["examples"] == sum(site.statistics[name].examples for name in survivors)
            if len(left) <= 1:
                assert report["unmeasured"] is None
            for model in report["models"]:
                assert model["metrics"]["examples"] in {20 * n for n in range(3, 5)}
    assert all(len(replies) == 1 for replies in run.answers.values()), "an answer changed when it was asked for again"
