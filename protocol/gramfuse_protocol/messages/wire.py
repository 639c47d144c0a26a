"""Conversion between a message and a frame: a header and a few large buffers.

Header: canonical JSON, `{"arrays": [[name, dtype, shape], …], "body": {…}, "phase": "…"}`. Buffers: the arrays'
little-endian bytes in C order, concatenated in the order of the header and cut every `BUFFER_BYTES` bytes, also within
an array. The transport is free in how it sends the header and the numbered buffers. The sender is not trusted: sizes
are bounded before anything is parsed or multiplied; names, dtypes, shapes and the total length are checked before a
view is made; a message may have only the arrays that its type allows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from gramfuse_protocol.bounds import DIMENSIONS, ENTRIES, TENSORS, check_keys, parse_json
from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.messages.phases import Body
from gramfuse_protocol.text import QUOTE_LIMIT, one_line, printable, quoted

BUFFER_BYTES = 32 * 2**20
"""Size of every buffer except the last: large enough that there are few, small enough to copy cheaply."""

NAME_CHARACTERS = 640
"""Maximum length of an array's name: a tensor's name and a slice."""


DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "uint64": np.dtype("<u8"),
}

Bytes = NDArray[np.uint8]
B = TypeVar("B", bound=Body)


@dataclass(frozen=True)
class Frame:
    """A message in transit.

    Args:
        header: UTF-8 text.
        buffers: flat uint8 arrays.
    """

    header: str
    buffers: tuple[Bytes, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of header and buffers."""
        return len(self.header.encode("utf-8")) + sum(buffer.nbytes for buffer in self.buffers)

    @property
    def digest(self) -> str:
        """SHA-256 over the header's bytes and then the buffers, in hexadecimal."""
        hasher = hashlib.sha256(self.header.encode("utf-8"))
        for buffer in self.buffers:
            hasher.update(buffer.data)
        return hasher.hexdigest()


def pack(message: Body) -> Frame:
    """Convert a message to a frame; arrays must be float32, float64 or uint64."""
    index = [[name, str(array.dtype), list(array.shape)] for name, array in message.arrays.items()]
    return Frame(_header(message, index), tuple(_cut(message.arrays.values())))


def _header(message: Body, index: list[list[Any]]) -> str:
    header = {"phase": message.phase, "body": message.model_dump(mode="json"), "arrays": index}
    return canonical_json(header).decode("utf-8")


def unpack(frame: Frame, types: Mapping[str, type[B]]) -> B:
    """Convert a frame to a message.

    Args:
        types: the allowed message types by phase; `REQUESTS` at a silo, `REPLIES` at the coordinator.

    Raises:
        FederationError: if the frame is not what `pack` returns for a message of one of `types`.
    """
    try:
        header, model = _parse_header(frame.header, types)
        arrays = _arrays(model, header["arrays"], frame.buffers)
        message = model.model_validate_json(json.dumps(header["body"]))
        if _header(message, header["arrays"]) != frame.header:
            raise ValueError("the header is not in canonical form")
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = one_line(".".join(map(str, problem["loc"])) or "the body", QUOTE_LIMIT)
        raise _unreadable(f"{where}: {one_line(problem['msg'], QUOTE_LIMIT)}") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _unreadable(str(error)) from None
    return message.model_copy(update={"arrays": arrays})


def _unreadable(why: str) -> FederationError:
    return FederationError(f"a message cannot be read: {why[:QUOTE_LIMIT]}; do both sides run the same version?")


def _parse_header(text: str, types: Mapping[str, type[B]]) -> tuple[dict[str, Any], type[B]]:
    """Parse a header; returns the document and the type of its body."""
    if not isinstance(text, str):
        raise TypeError("the header is not text")
    characters = max(model.characters for model in types.values())
    items = max(model.items for model in types.values())
    header = parse_json(text, characters, items)
    if not isinstance(header, dict) or header.keys() != {"arrays", "body", "phase"}:
        raise ValueError("the header does not have exactly the keys arrays, body and phase")
    if not isinstance(header["phase"], str) or header["phase"] not in types:
        raise ValueError(f"phase {str(header['phase'])[:64]!r} is not allowed here")
    model = types[header["phase"]]
    check_keys(header["body"], model)
    if len(text) > model.characters:
        raise ValueError(f"the header has {len(text):,} characters; the limit is {model.characters:,}")
    return header, model


def _cut(arrays: Iterable[NDArray[Any]]) -> Iterator[Bytes]:
    """Yield the arrays' bytes in buffers of BUFFER_BYTES; a buffer within one array is a view of it."""
    pending: list[Bytes] = []
    size = 0
    for array in arrays:
        data = np.ascontiguousarray(array, DTYPES[str(array.dtype)]).reshape(-1).view(np.uint8)
        while data.size:
            part, data = data[: BUFFER_BYTES - size], data[BUFFER_BYTES - size :]
            pending.append(part)
            size += part.size
            if size == BUFFER_BYTES:
                yield _join(pending)
                pending, size = [], 0
    if pending:
        yield _join(pending)


def _join(parts: list[Bytes]) -> Bytes:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _arrays(model: type[B], index: list[list[Any]], buffers: tuple[Bytes, ...]) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    if any(buffer.dtype != np.uint8 or buffer.ndim != 1 for buffer in buffers):
        raise ValueError("a buffer is not a flat array of bytes")
    total = sum(buffer.size for buffer in buffers)
    sizes = [buffer.size for buffer in buffers]
    if any(size != BUFFER_BYTES for size in sizes[:-1]) or not all(0 < size <= BUFFER_BYTES for size in sizes[-1:]):
        raise ValueError(f"a buffer has the wrong size; all but the last have {BUFFER_BYTES:,} bytes")
    start = 0
    if not isinstance(index, list) or len(index) > 2 * TENSORS:
        raise ValueError("the index of arrays is not a list, or is too long")
    for name, dtype_name, shape in index:
        if not isinstance(name, str) or name in arrays or len(name) > NAME_CHARACTERS or not printable(name):
            raise ValueError("an array's name is not printable text, is too long, or occurs twice")
        if not model.may_carry(name, dtype_name):
            raise ValueError(f"phase {model.phase!r} does not allow a {quoted(dtype_name)} array {quoted(name)}")
        if not isinstance(shape, list) or len(shape) > DIMENSIONS or not all(map(_is_size, shape)):
            raise ValueError(f"array {quoted(name)} has an invalid shape")
        dtype = DTYPES[dtype_name]
        size = math.prod(shape) * dtype.itemsize
        if start + size > total:
            raise ValueError(f"array {name!r} extends beyond the {total} bytes received")
        arrays[name] = _read(buffers, start, size).view(dtype).reshape(shape)
        start += size
    if start != total:
        raise ValueError(f"{total - start} of the bytes received belong to no array")
    return arrays


def _is_size(size: Any) -> bool:
    """Return whether this is a valid dimension of an array."""
    return type(size) is int and 0 <= size <= ENTRIES


def _read(buffers: tuple[Bytes, ...], start: int, size: int) -> Bytes:
    parts = []
    while size:
        buffer, offset = divmod(start, BUFFER_BYTES)
        part = buffers[buffer][offset : offset + size]
        parts.append(part)
        start, size = start + part.size, size - part.size
    joined = _join(parts) if parts else np.empty(0, np.uint8)
    # Data that are not aligned to eight bytes must be copied before they can be viewed as float64.
    return joined if joined.ctypes.data % 8 == 0 else joined.copy()
