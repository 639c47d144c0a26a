"""Frames as Flower records, at a silo."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.layout import Layout
from gramfuse_protocol.messages import StatisticsBody
from gramfuse_protocol.npy import decode, encode
from gramfuse_protocol.statistics import Statistics
from gramfuse_protocol.wire import Frame, pack


def to_record(frame: Frame) -> RecordDict:
    """Put a frame into Flower's records."""
    arrays = {
        f"{n:06}": Array("uint8", (buffer.size,), "numpy.ndarray", encode(buffer))
        for n, buffer in enumerate(frame.buffers)
    }
    return RecordDict({"header": ConfigRecord({"json": frame.header}), "arrays": ArrayRecord(arrays)})


def from_record(content: RecordDict) -> Frame:
    """Take a frame out of Flower's records.

    Raises:
        FederationError: if the records are not what `to_record` makes.
    """
    try:
        arrays = content.array_records["arrays"]
        header = content.config_records["header"]["json"]
    except KeyError as error:
        raise FederationError(f"a message cannot be read: it has no {error}") from None
    return Frame(str(header), tuple(decode(arrays[key].data) for key in sorted(arrays)))


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
