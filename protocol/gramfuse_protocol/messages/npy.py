"""A flat buffer as NumPy's .npy file format, version 1.0, which is what Flower's arrays hold.

There is one such file for a buffer: its first 128 bytes follow from its size. `numpy.load` would do for honest senders
only: it evaluates whatever header comes, and follows it into archives, pickles and sizes that are not there. Here
nothing of a header is parsed: it is compared with the one that these bytes must have.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.errors import FederationError

Bytes = NDArray[np.uint8]

HEADER_BYTES = 128
"""Of magic, version and header together; NumPy aligns the data to 64."""

_MAGIC = b"\x93NUMPY\x01\x00"


def encode(buffer: Bytes) -> bytes:
    """Return a flat uint8 buffer as a .npy file."""
    return b"".join((_header(buffer.size), buffer.data))


def decode(data: bytes) -> Bytes:
    """Return the buffer that a .npy file holds, as a read-only view.

    Raises:
        FederationError: if it is not what `encode` makes.
    """
    if len(data) < HEADER_BYTES or data[:HEADER_BYTES] != _header(len(data) - HEADER_BYTES):
        raise FederationError("a message cannot be read: a buffer is no .npy file of flat bytes, version 1.0")
    return np.frombuffer(data, np.uint8, offset=HEADER_BYTES)


def _header(size: int) -> bytes:
    described = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}".encode("ascii")
    room = HEADER_BYTES - len(_MAGIC) - 2
    return _MAGIC + room.to_bytes(2, "little") + described.ljust(room - 1) + b"\n"
