"""Conversion between frames and Flower records: the only module of the protocol that imports Flower."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage

from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.messages.npy import Bytes, decode, encode
from gramfuse_protocol.messages.phases import PHASE_OF_TYPE, REQUESTS, Message
from gramfuse_protocol.messages.wire import Frame, unpack


def to_record(frame: Frame) -> RecordDict:
    """Convert a frame to Flower records."""
    arrays = {
        key: Array("uint8", (buffer.size,), "numpy.ndarray", encode(buffer))
        for key, buffer in zip(_keys(len(frame.buffers)), frame.buffers, strict=True)
    }
    return RecordDict({"header": ConfigRecord({"json": frame.header}), "arrays": ArrayRecord(arrays)})


def from_record(content: RecordDict) -> Frame:
    """Convert Flower records to a frame.

    Raises:
        FederationError: if the records are not exactly what `to_record` returns.
    """
    arrays = content.array_records.get("arrays", {})
    header = content.config_records.get("header", {})
    if set(content) != {"header", "arrays"} or set(header) != {"json"} or not isinstance(header["json"], str):
        raise FederationError("a message cannot be read: it does not have gramfuse's records")
    keys = _keys(len(arrays))
    if sorted(arrays) != keys:
        raise FederationError("a message cannot be read: its buffers are not numbered consecutively")
    return Frame(header["json"], tuple(_buffer(arrays[key]) for key in keys))


def _buffer(array: Array) -> Bytes:
    """Return the bytes of one buffer, after checking that its record describes them correctly."""
    buffer = decode(array.data)
    if (array.dtype, array.shape, array.stype) != ("uint8", (buffer.size,), "numpy.ndarray"):
        raise FederationError("a message cannot be read: a record contradicts its buffer")
    return buffer


def request_of(message: FlowerMessage) -> Message:
    """Convert a Flower message to a request.

    Raises:
        FederationError: if its type is not part of the protocol, or its content is not valid for the type.
    """
    kind = message.metadata.message_type
    phase = PHASE_OF_TYPE.get(kind)
    if phase is None:
        raise FederationError(
            f"received a message of unknown type {kind[:100]!r}; the protocol has {', '.join(PHASE_OF_TYPE)}",
            reason="received a message of unknown type",
        )
    try:
        return unpack(from_record(message.content), {phase: REQUESTS[phase]})
    except Exception as error:  # whatever foreign bytes raise, the message is unreadable
        why = str(error) if isinstance(error, FederationError) else f"a message cannot be read: {error!r:.300}"
        raise FederationError(why, reason="received a message that cannot be read") from error


def _keys(count: int) -> list[str]:
    return [f"{number:06}" for number in range(count)]
