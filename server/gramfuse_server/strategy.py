"""RegMean as a Flower strategy, for users with their own ServerApp and ClientApp.

    # in the ServerApp
    RegMean(alpha=0.9).start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=1)

    # in the ClientApp, under @app.train(), after fine-tuning
    statistics = collect_statistics(model, batches, layout, base=base, examples=len(data))
    return Message(statistics_record(statistics, layout), reply_to=message)

It differs from FedAvg only in what the clients send and how the server aggregates it. The planned exchange of the
gramfuse app, with pieces, spool and checks against a locked plan, is `gramfuse_server.run.exchange`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from logging import INFO, WARNING
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from gramfuse_protocol.contract.form import Slice
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.errors import ContributionError, FederationError, GramfuseError
from gramfuse_protocol.messages.flower_records import from_record
from gramfuse_protocol.messages.phases import StatisticsBody
from gramfuse_protocol.messages.wire import unpack
from gramfuse_protocol.statistics.contribution import Statistics, check_counts, check_slices
from gramfuse_protocol.text import QUOTE_LIMIT, one_line
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_server.report.schema import Step


class RegMean(FedAvg):
    """Merges fine-tuned models by the RegMean closed form (Jin et al., ICLR 2023).

    Example:
        >>> strategy = gramfuse.RegMean(alpha=0.9, min_train_nodes=3, min_available_nodes=3)
        >>> strategy.weighting
        'uniform'

    Args:
        alpha: share of the off-diagonal of each Gram matrix that is kept, in [0, 1].
        weighting: `uniform`, or `examples` to weigh each silo by its number of examples.
        **fedavg: passed to `flwr.serverapp.strategy.FedAvg`: `fraction_train`, `min_train_nodes`, …

    Attributes:
        steps: how each group of the last round was solved.
        lost: why replies of the last round were left out, by node id.
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
        self.lost: dict[int, str] = {}
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

        Replies that are not valid contributions, do not fit their layout, or use a layout other than the majority's
        are left out like failed ones; `lost` says why.

        Raises:
            ContributionError: if two layouts tie for the most nodes, or the layout does not fit the initial arrays.
        """
        # Floating-point addition must not depend on who answers first.
        answered = sorted(
            (reply for reply in replies if not self._failed(reply)), key=lambda reply: reply.metadata.src_node_id
        )
        self.lost = {}
        contributions: dict[int, tuple[Layout, Statistics]] = {}
        layouts: dict[str, Layout] = {}
        for reply in answered:
            node = reply.metadata.src_node_id
            try:
                contributions[node] = _read(reply, layouts)
            except Exception as error:  # noqa: BLE001  # untrusted bytes may raise anything; only their sender is lost
                self._lose(node, str(error) if isinstance(error, GramfuseError) else type(error).__name__)
        layout = _majority_layout({node: layout for node, (layout, _) in contributions.items()})
        if layout is None:
            return None, None
        accumulator = Accumulator(layout, alpha=self.alpha, weighting=self.weighting)
        for node, (node_layout, statistics) in contributions.items():
            if node_layout.digest != layout.digest:
                self._lose(node, f"node {node}: its layout differs from that of most nodes")
                continue
            accumulator.fold(statistics, f"node {node}")
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
            exact = base.astype(np.float64) + delta
            rounded = exact if np.issubdtype(base.dtype, np.floating) else np.rint(exact)
            merged_array = np.asarray(rounded.astype(base.dtype))  # NumPy turns 0-d results into scalars
            if not np.isfinite(merged_array).all():
                raise ContributionError(f"tensor {name!r}: the merged values exceed the range of {base.dtype}")
            arrays[name] = Array(merged_array)
        contents = [reply.content for reply in answered if reply.metadata.src_node_id not in self.lost]
        try:
            return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        except Exception as error:  # noqa: BLE001  # bad metrics cost the metrics, not the model
            log(WARNING, "\t> the nodes' metrics cannot be averaged: %s", type(error).__name__)
            return arrays, None

    def _lose(self, node: int, why: str) -> None:
        self.lost[node] = why
        log(WARNING, "\t> left out: %s", why)

    def _failed(self, reply: Message) -> bool:
        if reply.has_error():
            log(INFO, "\t> node %d failed: %s", reply.metadata.src_node_id, one_line(reply.error.reason, QUOTE_LIMIT))
        return bool(reply.has_error())


def _read(reply: Message, layouts: dict[str, Layout]) -> tuple[Layout, Statistics]:
    """Return the layout and statistics of a reply, checked.

    Args:
        layouts: cache of parsed layouts, by their text; updated.

    Raises:
        GramfuseError: naming the node and the tensor, if the reply is not a contribution or does not fit its layout.
    """
    source = f"node {reply.metadata.src_node_id}"
    about = RecordDict({key: record for key, record in reply.content.items() if key in ("header", "arrays")})
    try:
        body = unpack(from_record(about), {StatisticsBody.phase: StatisticsBody})
    except FederationError as error:
        raise ContributionError(f"{source}: {error}; expected gramfuse.statistics_record") from None
    if body.layout not in layouts:
        layouts[body.layout] = Layout.parse(body.layout, f"layout of {source}")
    layout = layouts[body.layout]
    check_slices((Slice(block, 0, block.entries) for block in layout.blocks), body.arrays, source)
    check_counts(layout, body.examples, body.tokens, source)
    return layout, Statistics(body.examples, body.tokens, body.arrays)


def _majority_layout(layouts: Mapping[int, Layout]) -> Layout | None:
    """Return the layout of most nodes, or None without nodes.

    Raises:
        ContributionError: if two layouts tie for the most nodes.
    """
    votes = Counter(layout.digest for layout in layouts.values()).most_common(2)
    if not votes:
        return None
    if len(votes) == 2 and votes[0][1] == votes[1][1]:
        raise ContributionError(
            f"nodes {', '.join(map(str, layouts))} have different layouts, and no layout has the most nodes"
        )
    return next(layout for layout in layouts.values() if layout.digest == votes[0][0])
