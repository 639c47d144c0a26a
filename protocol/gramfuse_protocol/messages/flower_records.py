"""Frames as Flower records, and out of them: the one place in the protocol that knows Flower."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage

from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.messages.npy import Bytes, decode, encode
from gramfuse_protocol.messages.phases import PHASES, REQUESTS, Message
from gramfuse_protocol.messages.wire import Frame, unpack


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


def request_of(message: FlowerMessage) -> Message:
    """Return the request that a message from Flower is.

    Raises:
        FederationError: if its type is not of the protocol, or it is not what that type carries.
    """
    kind = message.metadata.message_type
    phase = PHASES.get(kind)
    if phase is None:
        raise FederationError(
            f"a message of type {kind[:100]!r} came; the protocol has {', '.join(PHASES)}",
            reason="a message came whose type is not in the protocol",
        )
    try:
        return unpack(from_record(message.content), {phase: REQUESTS[phase]})
    except Exception as error:  # whatever foreign bytes do, they are what could not be read
        why = str(error) if isinstance(error, FederationError) else f"a message cannot be read: {error!r:.300}"
        raise FederationError(why, reason="a message came that cannot be read") from error


def _keys(count: int) -> list[str]:
    return [f"{number:06}" for number in range(count)]
