"""Pieces, their order, and what gets lost on the way."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, RecordDict

import gramfuse_client.exchange.local_model
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.project import Project
from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.app import coordinate
from gramfuse_server.run import delivery
from gramfuse_server.run.secure_sums import UPLOADS
from tests.exchange.open.runs import (
    LOST,
    PIECE_BYTES,
    SILOS,
    Honest,
    Scripted,
    assert_identical,
    exchange,
    failure,
    failure_of,
    simulated,
    unmeasured,
    weights_of,
)

# Pieces, order, and what gets lost


def test_many_pieces_give_the_weights_of_one(honest: Honest, in_process_grid: Any, place: Path) -> None:
    grid = in_process_grid(simulated(honest.project, honest.plan, place / "state"))
    report = exchange(grid, honest, place / "run")
    pieces = -(-honest.layout.contribution_bytes // PIECE_BYTES)
    assert pieces > 10
    assert grid.sent.count(("silo-b", "upload")) == pieces
    assert_identical(weights_of(place / "run"), honest.weights)
    assert report["models"][-1] == honest.report["models"][-1]
    assert not (place / "run" / "spool").exists()


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_nodes_and_answers_changes_nothing(
    honest: Honest, in_process_grid: Any, place: Path, seed: int
) -> None:
    rng = random.Random(seed)
    nodes = list(honest.scripted().items())
    rng.shuffle(nodes)
    grid = in_process_grid(dict(nodes), lag=rng)
    report = exchange(grid, honest, place / "run", 8000)
    assert_identical(weights_of(place / "run"), honest.weights)
    assert report["models"] == honest.report["models"][-2:]
    assert report["silos"] == honest.report["silos"]


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_made_in_the_order_of_the_roster(honest: Honest, in_process_grid: Any, place: Path, seed: int) -> None:
    """1e30 + 1 − 1e30 is 0 in that order alone."""
    rng = random.Random(seed)
    nodes = list(honest.scripted().items())
    for name, delta in zip(SILOS, (1e30, 1, -1e30), strict=True):
        silo = dict(nodes)[name]
        biases = {t.name: np.full(t.shape, delta, np.float32) for t in honest.layout.tensors if t.merge == "mean"}
        blocks = {**silo.statistics.blocks, **{f"delta:{bias}": array for bias, array in biases.items()}}
        silo.statistics = Statistics(24, silo.statistics.tokens, blocks)
    rng.shuffle(nodes)
    exchange(in_process_grid(dict(nodes), lag=rng), honest, place / "run")
    merged, base = weights_of(place / "run"), honest.base.model.state_dict()
    for name in biases:
        np.testing.assert_array_equal(merged[name], base[name].numpy(), err_msg=name)


@pytest.mark.parametrize("code", LOST)
def test_what_is_lost_is_asked_again_and_nobody_trains_twice(
    honest: Honest, in_process_grid: Any, place: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    trainings = []
    finetune = gramfuse_client.exchange.local_model.finetune

    def counted(*arguments: Any, **more: Any) -> None:
        trainings.append(arguments)
        finetune(*arguments, **more)

    monkeypatch.setattr(gramfuse_client.exchange.local_model, "finetune", counted)
    lost = []

    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        if visit.number == 1 and visit.node == "silo-a":  # the request does not arrive
            lost.append(visit.phase)
            return Error(code, "lost on the way there")
        if visit.number <= 2 and visit.node == "silo-b":  # the silo does its work, and the reply does not arrive
            deliver()
            lost.append(visit.phase)
            return Error(code, "lost on the way back")
        return deliver()

    grid = in_process_grid(simulated(honest.project, honest.plan, place / "state"), fault=fault)
    report = coordinate(grid, honest.plan, honest.layout, honest.project.directory, place / "run").document()
    assert sorted(lost) == sorted(["join", "train", "upload", "evaluate", "finish"] * 3)
    assert grid.sent.count(("silo-b", "train")) == grid.sent.count(("silo-b", "upload")) == 3
    assert len(trainings) == 3
    assert_identical(weights_of(place / "run"), honest.weights)
    assert report["models"] == honest.report["models"][-2:]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("code", LOST)
@pytest.mark.parametrize("phase", ["join", "train", "upload", "evaluate"])
def test_three_losses_in_a_row_end_the_run(
    honest: Honest, in_process_grid: Any, place: Path, phase: str, code: int
) -> None:
    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        if (visit.node, visit.phase) == ("silo-b", phase):
            return Error(code, "it is gone")
        return deliver()

    grid = in_process_grid(honest.scripted(), fault=fault)
    message = (unmeasured if phase == "evaluate" else failure_of(FederationError))(grid, honest, place)
    assert grid.sent.count(("silo-b", phase)) == delivery.ATTEMPTS == 3
    for part in (repr(phase), f"error {code}", "it is gone"):
        assert part in message
    # Before it has joined, a silo is known by its node alone.
    assert ("silo 'silo-b'" if phase != "join" else f"node {grid.number('silo-b')}") in message


def test_a_request_that_flower_does_not_take_is_sent_again(
    honest: Honest, in_process_grid: Any, place: Path, tmp_path: Path
) -> None:
    grid = in_process_grid(honest.scripted())
    grid.untaken.update({("silo-a", "train"): 2, ("silo-b", "upload"): 1, ("silo-c", "join"): 2})
    exchange(grid, honest, place / "run")
    assert_identical(weights_of(place / "run"), honest.weights)

    grid = in_process_grid(honest.scripted())
    grid.untaken["silo-b", "train"] = delivery.ATTEMPTS
    message = failure(FederationError, grid, honest, tmp_path)
    assert all(part in message for part in ("silo 'silo-b'", "phase 'train'", "3 tries", "Flower"))


def test_a_run_that_lost_a_silo_after_training_goes_on_where_it_stopped(
    honest: Honest, in_process_grid: Any, place: Path
) -> None:
    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        return Error(5, "it is gone") if (visit.node, visit.phase) == ("silo-c", "upload") else deliver()

    silos = honest.scripted()
    with pytest.raises(FederationError, match="silo-c"):
        exchange(in_process_grid(silos, fault=fault), honest, place / "run")
    grid = in_process_grid(silos)
    report = exchange(grid, honest, place / "run", resume=True)
    assert not [sent for sent in grid.sent if sent[1] == "train"]
    assert {silo for silo, phase in grid.sent if phase == "upload"} == {"silo-c"}
    assert_identical(weights_of(place / "run"), honest.weights)
    assert report["models"] == honest.report["models"][-2:]
    assert [path.name for path in place.iterdir()] == ["run"]


def test_a_silo_whose_app_raises_is_not_asked_again(honest: Honest, in_process_grid: Any, place: Path) -> None:
    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict:
        if (visit.node, visit.phase) == ("silo-b", "train"):
            raise ValueError("boom")
        return deliver()

    grid = in_process_grid(honest.scripted(), fault=fault)
    message = failure(FederationError, grid, honest, place)
    assert "silo 'silo-b'" in message
    assert "'train'" in message
    assert grid.sent.count(("silo-b", "train")) == 1


# Each silo once: silos whose contributions are unit vectors


FIVE = tuple(f"silo-{letter}" for letter in "abcde")


@pytest.mark.parametrize("seed", range(4))
def test_every_silo_counts_exactly_once_whatever_gets_lost(
    pico_project: Any, in_process_grid: Any, place: Path, seed: int
) -> None:
    """Silo i differs from the base in the i-th element of every bias and the i-th row of every weight, by 1, and
    weighs 2^i in every Gram matrix. So each element of the result tells how often its silo was counted, and that
    the others were.
    """
    project = pico_project(silos=5)
    project.replace(project.plan, "alpha = 0.9", "alpha = 1.0")
    project.replace(project.plan, '"*" = "full"', '"*" = "diagonal"')
    plan, layout = Project.read(project.directory).locked()
    rng = random.Random(seed)

    def unit(i: int) -> Statistics:
        blocks = {f"gram:{g.name}": np.full(g.d_in, 2.0**i, np.float32) for g in layout.groups}
        for tensor in layout.tensors:
            delta = np.zeros(tensor.shape, np.float32)
            if tensor.merge == "regmean":
                delta[:, i] = 1  # the weights of an nn.Linear are stored (d_out, d_in)
            else:
                delta[i % tensor.shape[0]] += 1
            blocks[f"delta:{tensor.name}"] = delta
        return Statistics(10 + i, dict.fromkeys((g.name for g in layout.groups), 5), blocks)

    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        # At most every second message of a silo is lost, so that no request is lost three times.
        if visit.number % 2 == 0 or rng.random() < 0.5:
            return deliver()
        if rng.random() < 0.5:
            deliver()
        return Error(rng.choice(LOST), "lost")

    nodes = [(name, Scripted(name, layout, unit(i))) for i, name in enumerate(FIVE)]
    rng.shuffle(nodes)
    grid = in_process_grid(dict(nodes), fault=fault, lag=rng)
    honest = Honest(project, plan, layout, place / "run", {}, [], {}, {}, load_base(plan, project.directory))
    report = exchange(grid, honest, place / "run", 3000)
    assert len(grid.sent) > len(layout.pieces(3000)) * 5 + 5 * 4
    assert grid.most_under_way["upload"] == UPLOADS == 2
    assert {step["outcome"] for step in report["solve"]} == {"clean"}

    base = honest.base.model.state_dict()
    merged = weights_of(place / "run")
    share = 2.0 ** np.arange(5) / 31
    for tensor in layout.tensors:
        delta = merged[tensor.name] - base[tensor.name].numpy()
        expected = np.zeros(tensor.shape)
        if tensor.merge == "regmean":
            expected[:, :5] = share
        else:
            np.add.at(expected, np.arange(5) % tensor.shape[0], 1 / 5)
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-6, err_msg=tensor.name)
