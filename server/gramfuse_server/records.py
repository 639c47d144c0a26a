"""Frames as Flower records, at the coordinator."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from gramfuse_protocol.wire import Frame


def to_record(frame: Frame) -> RecordDict:
    """Put a frame into Flower's records."""
    arrays = {f"{n:06}": Array(buffer) for n, buffer in enumerate(frame.buffers)}
    return RecordDict({"header": ConfigRecord({"json": frame.header}), "arrays": ArrayRecord(arrays)})


def from_record(content: RecordDict) -> Frame:
    """Take a frame out of Flower's records, which are emptied on the way so that memory holds it once."""
    arrays = content.array_records["arrays"]
    buffers = tuple(arrays.pop(key).numpy() for key in sorted(arrays))
    return Frame(str(content.config_records["header"]["json"]), buffers)
