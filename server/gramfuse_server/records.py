"""Frames as Flower records, at the coordinator."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.npy import Bytes, decode, encode
from gramfuse_protocol.wire import Frame


def to_record(frame: Frame) -> RecordDict:
    """Put a frame into Flower's records."""
    arrays = {
        key: Array("uint8", (buffer.size,), "numpy.ndarray", encode(buffer))
        for key, buffer in zip(_keys(len(frame.buffers)), frame.buffers, strict=True)
    }
    return RecordDict({"header": ConfigRecord({"json": frame.header}), "arrays": ArrayRecord(arrays)})


def from_record(content: RecordDict) -> Frame:
    """Take a frame out of Flower's records.

    Raises:
        FederationError: if the records are not exactly what `to_record` makes; nothing travels beside a frame.
    """
    arrays = content.array_records.get("arrays", {})
    header = content.config_records.get("header", {})
    if set(content) != {"header", "arrays"} or set(header) != {"json"} or not isinstance(header["json"], str):
        raise FederationError("a message cannot be read: its records are not those of gramfuse")
    keys = _keys(len(arrays))
    if sorted(arrays) != keys:
        raise FederationError("a message cannot be read: its buffers are not numbered as those of gramfuse")
    return Frame(header["json"], tuple(_buffer(arrays[key]) for key in keys))


def _buffer(array: Array) -> Bytes:
    """Return the bytes of one buffer; its record says the same of them as they do."""
    buffer = decode(array.data)
    if (array.dtype, array.shape, array.stype) != ("uint8", (buffer.size,), "numpy.ndarray"):
        raise FederationError("a message cannot be read: a record says something else of a buffer than its bytes")
    return buffer


def _keys(count: int) -> list[str]:
    return [f"{number:06}" for number in range(count)]
