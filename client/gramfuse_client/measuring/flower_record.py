"""Flower records for users' own ClientApps: a silo's statistics, and conversion of frames."""

from __future__ import annotations

from flwr.app import MetricRecord, RecordDict

from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import StatisticsBody
from gramfuse_protocol.messages.wire import pack
from gramfuse_protocol.statistics.contribution import Statistics

__all__ = ["from_record", "statistics_record", "to_record"]


def statistics_record(statistics: Statistics, layout: Layout, **metrics: float) -> RecordDict:
    """Return the content of a train reply for `gramfuse.RegMean`.

    Example:
        >>> statistics = gramfuse.collect_statistics(tuned, [batch], layout, base=start, examples=2)
        >>> record = gramfuse.statistics_record(statistics, layout, loss=0.25)
        >>> dict(record["metrics"])
        {'loss': 0.25, 'num-examples': 2}

    Args:
        metrics: further values to report; the strategy averages them, weighted by the number of examples.
    """
    body = StatisticsBody(
        layout=layout.to_json(),
        examples=statistics.examples,
        tokens=dict(statistics.tokens),
        arrays=dict(statistics.blocks),
    )
    content = to_record(pack(body))
    content["metrics"] = MetricRecord({**metrics, "num-examples": statistics.examples})
    return content
