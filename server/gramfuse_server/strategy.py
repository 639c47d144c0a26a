"""RegMean as a Flower strategy, for those who have their own ServerApp and ClientApp.

    # in the ServerApp
    RegMean(alpha=0.9).start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=1)

    # in the ClientApp, under @app.train(), after fine-tuning
    statistics = collect_statistics(model, batches, layout, base=base, examples=len(data))
    return Message(statistics_record(statistics, layout), reply_to=message)

It is FedAvg but for what the clients send and how it is put together. The planned exchange of the gramfuse app,
with pieces, spool and checks against a locked plan, is `gramfuse_server.exchange`.
"""

from __future__ import annotations

from collections.abc import Iterable
from logging import INFO
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from gramfuse_protocol.errors import ContributionError, FederationError
from gramfuse_protocol.layout import Layout, Slice
from gramfuse_protocol.messages import StatisticsBody
from gramfuse_protocol.statistics import Statistics, check_slices
from gramfuse_protocol.text import SAID, one_line
from gramfuse_protocol.wire import unpack
from gramfuse_server.accumulator import Accumulator
from gramfuse_server.records import from_record
from gramfuse_server.solve import Step


class RegMean(FedAvg):
    """Merges fine-tuned models by the RegMean closed form (Jin et al., ICLR 2023).

    Args:
        alpha: share of the off-diagonal of each Gram matrix that is kept, in [0, 1].
        weighting: `uniform`, or `examples` to weigh each silo by its number of examples.
        **fedavg: what `flwr.serverapp.strategy.FedAvg` takes: `fraction_train`, `min_train_nodes`, …

    Attributes:
        steps: how each group of the last round was solved.
    """

    def __init__(
        self, alpha: float = 0.9, weighting: Literal["uniform", "examples"] = "uniform", **fedavg: Any
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
        if weighting not in ("uniform", "examples"):
            raise ValueError(f"weighting must be 'uniform' or 'examples', not {weighting!r}")
        super().__init__(**fedavg)
        self.alpha = alpha
        self.weighting = weighting
        self.steps: tuple[Step, ...] = ()
        self._arrays = ArrayRecord()

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> RegMean: alpha %s | weighting %s", self.alpha, self.weighting)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the current arrays to every sampled node, and remember them as this round's base."""
        self._arrays = arrays
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies one by one and merge them.

        Raises:
            ContributionError: naming the node and the tensor, if a contribution does not fit its layout, is not
                finite, or has another layout than the others.
        """
        # The order in which floating-point numbers are added must not depend on who answers first.
        answered = sorted(
            (reply for reply in replies if not self._failed(reply)), key=lambda reply: reply.metadata.src_node_id
        )
        accumulator: Accumulator | None = None
        for reply in answered:
            source = f"node {reply.metadata.src_node_id}"
            try:
                body = unpack(from_record(reply.content), {StatisticsBody.phase: StatisticsBody})
            except FederationError as error:
                raise ContributionError(f"{source}: {error}; expected gramfuse_client.statistics_record") from None
            layout = Layout.parse(body.layout, f"layout of {source}")
            if accumulator is None:
                accumulator = Accumulator(layout, alpha=self.alpha, weighting=self.weighting)
            elif layout.digest != accumulator.layout.digest:
                raise ContributionError(f"{source}: its layout differs from that of the nodes before it")
            check_slices((Slice(block, 0, block.entries) for block in layout.blocks), body.arrays, source)
            accumulator.fold(Statistics(body.examples, body.tokens, body.arrays), source)
        if accumulator is None:
            return None, None
        merged = accumulator.merge()
        self.steps = merged.steps
        arrays = ArrayRecord(dict(self._arrays))
        for name, delta in merged.deltas.items():
            if name not in arrays:
                raise ContributionError(f"tensor {name!r} of the layout is not among the initial arrays")
            base = arrays[name].numpy()
            if base.shape != delta.shape:
                raise ContributionError(
                    f"tensor {name!r} has shape {delta.shape}, the initial arrays have {base.shape}"
                )
            merged_array = (base.astype(np.float64) + delta).astype(base.dtype)
            if not np.isfinite(merged_array).all():
                raise ContributionError(f"tensor {name!r}: the merged values are beyond what {base.dtype} can hold")
            arrays[name] = Array(merged_array)
        metrics = self.train_metrics_aggr_fn([reply.content for reply in answered], self.weighted_by_key)
        return arrays, metrics

    def _failed(self, reply: Message) -> bool:
        if reply.has_error():
            log(INFO, "\t> node %d failed: %s", reply.metadata.src_node_id, one_line(reply.error.reason, SAID))
        return bool(reply.has_error())
