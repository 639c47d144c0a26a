"""FedAvg with Flower's own strategy, with silos in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from gramfuse_simulation.all_silos import AllSilos, Bench, Deltas

WEIGHT = "weight"
"""Metric that weights a reply's arrays."""


class LocalGrid(Grid):
    """A grid whose nodes are ClientApps in this process, called sequentially in order.

    Args:
        apps: one for each node; node ids count from 1.
    """

    def __init__(self, apps: Sequence[ClientApp]) -> None:
        self._nodes = {number: (app, Context(0, number, {}, RecordDict(), {})) for number, app in enumerate(apps, 1)}

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self._nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Call each node's app; its exceptions propagate."""
        replies = []
        for message in sorted(messages, key=lambda message: message.metadata.dst_node_id):
            app, context = self._nodes[message.metadata.dst_node_id]
            replies.append(app(message, context))
        return replies

    def set_run(self, run: Any) -> None:
        """Not needed."""
        raise NotImplementedError

    @property
    def run(self) -> Any:
        """Not needed."""
        raise NotImplementedError

    def create_message(self, *args: Any, **more: Any) -> Message:
        """Not needed: the strategy creates its messages itself."""
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not needed: the strategy uses send_and_receive."""
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not needed: the strategy uses send_and_receive."""
        raise NotImplementedError


def silo_app(bench: Bench, start: Mapping[str, np.ndarray[Any, Any]], first: Deltas, weight: float) -> ClientApp:
    """Return a ClientApp that fine-tunes the received model on a silo's data, and sends it back.

    Args:
        start: the base model's averaged parameters, by name.
        first: differences of the silo's own model from the base, its result of the first round.
        weight: of the silo in the mean.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, _: Context) -> Message:
        received = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
        number = int(message.content.config_records["config"]["server-round"])
        if number == 1:
            tuned = {name: np.add(array, first[name], dtype=np.float32) for name, array in received.items()}
        else:
            tuned = bench.finetune({name: array - start[name] for name, array in received.items()}, number)
        arrays = ArrayRecord({name: Array(np.asarray(tuned[name])) for name in received})
        metrics = MetricRecord({WEIGHT: weight})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def federated_average(laboratory: AllSilos, rounds: int, after: Callable[[int, Deltas], None]) -> dict[str, int]:
    """Run FedAvg, each round with the plan's full local training.

    The first round reuses the silos' trained models.

    Args:
        after: called after each round with its number and the averaged model, as differences from the base.

    Returns:
        The bytes that each silo sent: its model's arrays, once a round.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    algorithm 1, as implemented by `flwr.serverapp.strategy.FedAvg`.
    """
    start = laboratory.start()

    def measure(number: int, arrays: ArrayRecord) -> None:
        if number:  # before the first round there is nothing to measure
            after(number, {name: array.numpy().astype(np.float64) - start[name] for name, array in arrays.items()})

    benches = laboratory.benches
    grid = LocalGrid(
        [silo_app(bench, start, laboratory.deltas(name), laboratory.weight(name)) for name, bench in benches.items()]
    )
    count = len(benches)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count, weighted_by_key=WEIGHT)
    initial = ArrayRecord({name: Array(array) for name, array in start.items()})
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds, evaluate_fn=measure)
    sent = rounds * sum(array.nbytes for array in start.values())
    return dict.fromkeys(benches, sent)
