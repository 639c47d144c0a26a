"""A coordinator that is killed, or lost too many silos, and goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_protocol.errors import FederationError, RunDirectoryError
from gramfuse_server.run_directory import RunDirectory
from tests.exchange.secure.runs import NAMES, A, B, C, D, Run, Site, Watched, distance, gone, no_fault


class Killed(BaseException):
    """As kill -9 is: nothing is tidied up after it."""


POINTS = [
    (phase, state)
    for phase in ("keys", "shares", "masked", "survivors", "unmask", "merge", "evaluate", "masked-metrics",
                  "survivors-metrics", "unmask-metrics", "write")
    for state in ("start", "middle", "end")
    if state != "middle" or phase not in ("merge", "write")
]  # fmt: skip


def let_go(run: RunDirectory, *_: Any) -> None:
    """All that happens to a run directory when its process is killed: its lock is free."""
    run._locked.close()


def killer(phase: str, state: str) -> Callable[[dict[str, Any]], None]:
    """Kills the coordinator when it begins a phase, after the second answer in it, or when it ends it."""
    seen: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        if event["state"] == "start":
            seen[:] = [event["phase"]]
        else:
            seen.append(event["state"])
        point = {1: "start"}.get(len(seen), "end" if event["state"] == "end" else "middle" if len(seen) == 3 else "")
        if (seen[0], point) == (phase, state):
            raise Killed

    return observe


@pytest.mark.parametrize("lost", [None, ("masked", 2)], ids=str)
def test_a_coordinator_that_is_killed_at_every_step_goes_on_to_the_same_end(
    site: Site,
    in_process_grid: Any,
    place: Path,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
    lost: tuple[str, int] | None,
) -> None:
    """Killed and resumed at each point in turn, in one and the same run."""
    monkeypatch.setattr(RunDirectory, "__exit__", let_go)
    whole = Run(site, site.plan(silos=4), place / "whole")
    fault = gone({B: lost}) if lost else no_fault
    expected = whole.start(in_process_grid, fault=fault)
    watched.trained.clear()
    watched.masked.clear()
    run = Run(site, whole.plan, place / "killed")
    fault = gone({B: lost}) if lost else no_fault
    for number, point in enumerate(POINTS):
        with pytest.raises(Killed):
            run.start(in_process_grid, fault=fault, resume=number > 0, observer=killer(*point))
        assert not run.out.exists()
    report = run.start(in_process_grid, fault=fault, resume=True)
    for name, delta in whole.deltas.items():
        assert run.deltas[name].tobytes() == delta.tobytes(), name
    for key in ("models", "silos", "solve", "examples", "unmeasured"):
        assert report[key] == expected[key], key
    assert [silo["name"] for silo in report["lost"]] == [silo["name"] for silo in expected["lost"]] == [B] * bool(lost)
    assert watched.trained == dict.fromkeys(NAMES[:4], 1)
    assert set(watched.masked.values()) == {1}
    assert all(len(replies) == 1 for replies in run.answers.values())
    assert not (run.out / "checkpoint.json").exists()


@pytest.mark.parametrize("point", [("join", "start"), ("train", "middle"), ("train", "end")])
def test_before_the_silos_have_trained_there_is_nothing_to_resume(
    site: Site, in_process_grid: Any, place: Path, point: tuple[str, str]
) -> None:
    run = Run(site, site.plan(silos=4), place)
    with pytest.raises(Killed):
        run.start(in_process_grid, observer=killer(*point))
    assert not list(place.glob("run*")), "whoever ends a run wants no report of it"
    with pytest.raises(RunDirectoryError, match="nothing to resume"):
        run.start(in_process_grid, resume=True)


def test_a_run_that_lost_too_many_goes_on_when_they_are_back(
    site: Site, in_process_grid: Any, place: Path, watched: Watched
) -> None:
    run = Run(site, site.plan(), place)
    with pytest.raises(FederationError):
        run.start(in_process_grid, fault=gone({B: ("unmask", 1), D: ("unmask", 1)}))
    assert run.out.with_name("run.failed").exists()
    report = run.start(in_process_grid, resume=True)
    assert not run.out.with_name("run.failed").exists()
    assert distance(run.deltas, site.merged(run.plan, NAMES)) <= 1e-6
    assert report["lost"] == []
    assert set(watched.masked.values()) == set(watched.trained.values()) == {1}


def test_a_silo_that_was_lost_before_the_run_was_resumed_is_in_the_report(
    site: Site, in_process_grid: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDirectory, "__exit__", let_go)
    run = Run(site, site.plan(silos=4), place)
    with pytest.raises(Killed):
        run.start(in_process_grid, fault=gone({B: ("keys", 1)}), observer=killer("shares", "end"))
    report = run.start(in_process_grid, resume=True)  # silo-b is back, too late
    assert [silo["name"] for silo in report["silos"]] == [A, C, D]
    ((lost, reason),) = [(silo["name"], silo["reason"]) for silo in report["lost"]]
    assert lost == B
    assert "'keys'" in reason
    assert "Flower error 5" in reason
