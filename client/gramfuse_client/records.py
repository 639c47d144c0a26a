"""Frames as Flower records, at a silo."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from gramfuse_protocol.layout import Layout
from gramfuse_protocol.messages import StatisticsBody
from gramfuse_protocol.statistics import Statistics
from gramfuse_protocol.wire import Frame, pack


def to_record(frame: Frame) -> RecordDict:
    """Put a frame into Flower's records."""
    arrays = {f"{n:06}": Array(buffer) for n, buffer in enumerate(frame.buffers)}
    return RecordDict({"header": ConfigRecord({"json": frame.header}), "arrays": ArrayRecord(arrays)})


def from_record(content: RecordDict) -> Frame:
    """Take a frame out of Flower's records."""
    arrays = content.array_records["arrays"]
    buffers = tuple(arrays[key].numpy() for key in sorted(arrays))
    return Frame(str(content.config_records["header"]["json"]), buffers)


def statistics_record(statistics: Statistics, layout: Layout, **metrics: float) -> RecordDict:
    """Return the content of a train reply as `gramfuse_server.RegMean` takes it.

    Args:
        metrics: what else to report; the strategy averages it by the number of examples.
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
