"""Contributions, counts and metrics that do not fit the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gramfuse_protocol.errors import ContributionError, FederationError, GramfuseError
from gramfuse_protocol.statistics.contribution import Statistics
from tests.exchange.open.lies import another, lying, value_at, with_array
from tests.exchange.open.runs import PIECE_BYTES, Honest, exchange, failure, left, unmeasured


def extra(reply: Any) -> Any:
    return reply.model_copy(update={"arrays": {**reply.arrays, "delta:a.back.door": np.zeros(3, np.float32)}})


CONTRIBUTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "NaN in a weight": (with_array(value_at(np.nan)), "delta:"),
    "Inf in a weight": (with_array(value_at(np.inf)), "delta:"),
    "-Inf in a weight": (with_array(value_at(-np.inf)), "delta:"),
    "NaN in a Gram matrix": (with_array(value_at(np.nan), "gram:"), "gram:"),
    "a weight of another shape": (with_array(lambda a: a[:-1]), "delta:"),
    "a weight stored flat": (with_array(lambda a: a.reshape(-1)), "delta:"),
    "a Gram matrix of one more feature": (with_array(lambda a: np.append(a, a[:1]), "gram:"), "gram:"),
    "an empty Gram matrix": (with_array(lambda a: a[:0], "gram:"), "gram:"),
    "a missing weight": (with_array(lambda _: None), "delta:"),
    "a missing Gram matrix": (with_array(lambda _: None, "gram:"), "gram:"),
    "no array at all": (another(arrays={}), "gram:"),
    "an unknown tensor": (extra, "delta:a.back.door"),
    "a weight in float64": (with_array(lambda a: a.astype(np.float64)), "delta:"),
}


@pytest.mark.parametrize("lie", CONTRIBUTIONS)
def test_a_contribution_that_does_not_fit_names_silo_and_tensor(
    honest: Honest, in_process_grid: Any, place: Path, lie: str
) -> None:
    change, tensor = CONTRIBUTIONS[lie]
    names = [block.name for block in honest.layout.blocks if block.name.startswith(tensor)]
    grid = in_process_grid(honest.scripted(), fault=lying("upload", change))
    # An array of a dtype that the phase never has is refused with the message that it came in.
    message = failure(FederationError if "float64" in lie else ContributionError, grid, honest, place)
    assert "silo 'silo-b'" in message
    assert repr(names[0] if names else tensor) in message
    assert grid.sent.count(("silo-b", "upload")) == 1
    assert not [phase for _, phase in grid.sent if phase == "evaluate"]


def test_a_lie_in_a_later_piece_is_found_and_names_the_slice(honest: Honest, in_process_grid: Any, place: Path) -> None:
    pieces = honest.layout.pieces(PIECE_BYTES)
    number = next(n for n, piece in enumerate(pieces) if n > 2 and piece[0].name != piece[0].block.name)

    def change(reply: Any) -> Any:
        return with_array(value_at(np.nan), "")(reply) if reply.piece == number else reply

    grid = in_process_grid(honest.scripted(), fault=lying("upload", change))
    message = failure(ContributionError, grid, honest, place, PIECE_BYTES)
    assert "silo 'silo-b'" in message
    assert repr(pieces[number][0].name) in message


@pytest.mark.parametrize("metrics", ["none", "sum"])
def test_a_merge_that_float32_cannot_hold_ends_the_run_and_names_the_tensor(
    honest: Honest, in_process_grid: Any, place: Path, metrics: str
) -> None:
    """Every value that one silo sends is finite, and still the closed form goes beyond what the model can hold."""
    rng = np.random.default_rng(0)
    silos = honest.scripted()
    true = silos["silo-b"].statistics
    blocks = {
        name: rng.choice([-3.3e38, 3.3e38], block.shape).astype(np.float32)
        if name.startswith("delta:")
        else block * np.float32(1000)
        for name, block in true.blocks.items()
    }
    silos["silo-b"].statistics = Statistics(true.examples, true.tokens, blocks)
    plan = honest.plan.override([f"privacy.metrics={metrics}"]).pinned(honest.plan.pins, honest.layout.digest)
    with pytest.raises(ContributionError) as caught:
        exchange(in_process_grid(silos), honest, place / "run", plan=plan)
    assert any(repr(tensor.name) in str(caught.value) for tensor in honest.layout.tensors)
    report = left(place, caught.value)
    assert report["failure"].items() >= {"phase": "merge", "round": 1, "resumable": False}.items()
    assert {silo["state"] for silo in report["silos"]} == {"trained"}
    assert not list(place.iterdir())


def test_a_piece_that_was_not_asked_for_is_refused(honest: Honest, in_process_grid: Any, place: Path) -> None:
    kept: list[Any] = []

    def change(reply: Any) -> Any:
        kept.append(reply)
        return kept[max(0, len(kept) - 2)]  # each piece but the first is the one before it again

    grid = in_process_grid(honest.scripted(), fault=lying("upload", change))
    message = failure(FederationError, grid, honest, place, PIECE_BYTES)
    assert "silo 'silo-b'" in message
    assert "piece 0" in message
    assert "piece 1" in message


def group_counts(change: Callable[[dict[str, int]], None]) -> Callable[[Any], Any]:
    def apply(reply: Any) -> Any:
        tokens = dict(reply.tokens)
        change(tokens)
        return reply.model_copy(update={"tokens": tokens})

    return apply


COUNTS: dict[str, tuple[Callable[[Any], Any], type[GramfuseError]]] = {
    "an unknown group": (group_counts(lambda t: t.update({"back.door": 1})), ContributionError),
    "a missing group": (group_counts(lambda t: t.pop(next(iter(t))) and None), ContributionError),
    "a negative count": (group_counts(lambda t: t.update({next(iter(t)): -1})), FederationError),
    "no examples": (another(examples=0), FederationError),
    "a negative number of examples": (another(examples=-3), FederationError),
}


@pytest.mark.parametrize("lie", COUNTS)
def test_counts_that_do_not_fit_name_the_silo(honest: Honest, in_process_grid: Any, place: Path, lie: str) -> None:
    change, kind = COUNTS[lie]
    grid = in_process_grid(honest.scripted(), fault=lying("train", change))
    assert "silo 'silo-b'" in failure(kind, grid, honest, place)
    assert not [phase for _, phase in grid.sent if phase == "upload"]


METRICS: dict[str, Callable[[Any], Any]] = {
    "another shape": with_array(lambda a: a[:2], "sums"),
    "one more dimension": with_array(lambda a: a[None], "sums"),
    "float32": with_array(lambda a: a.astype(np.float32), "sums"),
    "NaN": with_array(value_at(np.nan), "sums"),
    "Inf": with_array(value_at(np.inf), "sums"),
    "counts below zero": with_array(value_at(-1000), "sums"),
    "as many below zero as the others have": with_array(lambda a: value_at(-40)(a * 0), "sums"),
    "none": another(arrays={}),
    "of another model": another(candidate="silo-a"),
}


@pytest.mark.parametrize("lie", METRICS)
def test_metrics_that_do_not_fit_name_the_silo(honest: Honest, in_process_grid: Any, place: Path, lie: str) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("evaluate", METRICS[lie]))
    assert "silo 'silo-b'" in unmeasured(grid, honest, place)
