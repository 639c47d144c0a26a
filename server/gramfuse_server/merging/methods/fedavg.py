"""Federated averaging: each round, silos train from the average of the previous round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gramfuse_server.merging.methods.registry import (
    UNTRAINED,
    MethodSums,
    NotAllowed,
    Silos,
    method,
    number,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gramfuse_protocol.held_out.metrics import Sums
    from gramfuse_server.merging.methods.arithmetic import Differences

REFUSALS = (
    UNTRAINED,
    NotAllowed(
        lambda plan: plan.model.head == "own",
        "Flower's FedAvg averages whole models, but heads stay at their silos here; leave it out",
    ),
    NotAllowed(
        lambda plan: any(silo.labels for silo in plan.silo),
        "silos annotate different labels ('labels' of a [[silo]]), and Flower's FedAvg would also average the outputs "
        "for labels that a silo does not annotate; leave it out",
    ),
)


@method(
    name="fedavg",
    label="fedavg",
    words="federated averaging: each round, silos train from the average of the previous round",
    paper="McMahan et al., AISTATS 2017",
    options=number(
        "rounds", 5, 1000, "with Flower's FedAvg, 5 rounds by default, each with the plan's full local training"
    ),
    needs=("data",),
    refusals=REFUSALS,
)
def fedavg(silos: Silos, rounds: int) -> MethodSums:
    """Run FedAvg, and measure the average after each round."""
    measured: list[Mapping[str, Sums]] = []

    def after(number: int, deltas: Differences) -> None:
        measured.append(silos.measure(deltas))
        silos.tell(f"fedavg, round {number} of {rounds}")

    sent = silos.federate(rounds, after)
    by_round = tuple(silos.metrics(sums) for sums in measured)
    ranked = silos.ranked_by
    note = f"{ranked} after each round: {', '.join(f'{metrics[ranked]:.3f}' for metrics in by_round)}"
    about = f"{rounds} round{'s' if rounds > 1 else ''}"
    return MethodSums(measured[-1], (about,), {"rounds": by_round, "bytes": sent, "note": note})
