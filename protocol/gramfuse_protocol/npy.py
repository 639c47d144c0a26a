"""A flat buffer as NumPy's .npy file format, version 1.0, which is what Flower's arrays hold.

`numpy.load` would do for honest senders only: it follows the header into archives, pickles and sizes that are not
there. Here a buffer is bytes, one-dimensional, and exactly as long as the data that came.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from gramfuse_protocol.errors import FederationError

Bytes = NDArray[np.uint8]


def encode(buffer: Bytes) -> bytes:
    """Return a flat uint8 buffer as a .npy file."""
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (buffer.size,)})
    return b"".join((header.getvalue(), buffer.data))


def decode(data: bytes) -> Bytes:
    """Return the buffer that a .npy file holds, as a read-only view.

    Raises:
        FederationError: if it is not what `encode` makes.
    """
    file = io.BytesIO(data)
    try:
        if npy.read_magic(file) != (1, 0):
            raise ValueError("not version 1.0")
        shape, _, dtype = npy.read_array_header_1_0(file)
    except (ValueError, SyntaxError) as error:
        raise FederationError(f"a message cannot be read: a buffer is no .npy file: {error}") from None
    if dtype != np.uint8 or shape != (len(data) - file.tell(),):
        raise FederationError(
            f"a message cannot be read: a buffer says that it is {dtype} {shape}; expected flat bytes"
        )
    return np.frombuffer(data, np.uint8, offset=file.tell())
