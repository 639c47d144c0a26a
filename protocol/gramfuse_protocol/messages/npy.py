"""Flat buffers in NumPy's .npy file format, version 1.0, which Flower's arrays contain.

A buffer has exactly one such file: the first 128 bytes follow from the buffer's size. `numpy.load` is not safe with
untrusted input: it evaluates the header and follows it into archives, pickles and false sizes. Here the header is not
parsed, but compared with the one that these bytes must have.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.errors import FederationError

Bytes = NDArray[np.uint8]

HEADER_BYTES = 128
"""Size of magic, version and header together; NumPy aligns the data to 64 bytes."""

_MAGIC = b"\x93NUMPY\x01\x00"


def encode(buffer: Bytes) -> bytes:
    """Encode a flat uint8 buffer as a .npy file."""
    return b"".join((_header(buffer.size), buffer.data))


def decode(data: bytes) -> Bytes:
    """Decode a .npy file to its buffer, a read-only view.

    Raises:
        FederationError: if it is not what `encode` returns.
    """
    if len(data) < HEADER_BYTES or data[:HEADER_BYTES] != _header(len(data) - HEADER_BYTES):
        raise FederationError("a message cannot be read: a buffer is not a .npy file (version 1.0) of flat bytes")
    return np.frombuffer(data, np.uint8, offset=HEADER_BYTES)


def _header(size: int) -> bytes:
    description = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}".encode("ascii")
    length = HEADER_BYTES - len(_MAGIC) - 2
    return _MAGIC + length.to_bytes(2, "little") + description.ljust(length - 1) + b"\n"
