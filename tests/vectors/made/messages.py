"""Messages and their bytes on the wire."""

from __future__ import annotations

import numpy as np

from gramfuse_protocol.messages import npy, wire
from gramfuse_protocol.messages.phases import (
    EvaluateRequest,
    MaskedReply,
    Message,
    SurvivorsRequest,
    UnmaskReply,
    UploadReply,
)
from tests.vectors.made.sources import Json


def messages() -> list[Message]:
    about: Json = {"plan": "0123456789abcdef" * 4, "session": "fedcba9876543210" * 2}
    deltas = {"delta:é": np.array([[1.5, -2.0], [0.0, 1e-3]], np.float32), "delta:one": np.array(7.0, np.float32)}
    return [
        SurvivorsRequest(**about, round=2, sum_of="statistics", survivors=("south", "north", "east")),
        EvaluateRequest(**about, candidate="regmean", arrays=deltas),
        MaskedReply(
            **about,
            silo="north",
            sum_of="metrics",
            piece=3,
            arrays={"masked": np.array([1, 2**64 - 1, 2**32], np.uint64)},
        ),
        UploadReply(
            **about,
            silo="north",
            piece=0,
            arrays={"gram:none": np.zeros((0,), np.float32), "delta:one[0:1]": np.array([-0.0], np.float32)},
        ),
        UnmaskReply(**about, silo="north", sum_of="metrics", shares={"west": "ab" * 66, "east": "cd" * 66}),
    ]


def packed(message: Message) -> Json:
    frame = wire.pack(message)
    return {
        "direction": type(message).__name__,
        "phase": message.phase,
        "body": message.model_dump(mode="json"),
        "arrays": [
            [name, str(array.dtype), list(array.shape), array.tobytes().hex()] for name, array in message.arrays.items()
        ],
        "header": frame.header,
        "buffers": [buffer.tobytes().hex() for buffer in frame.buffers],
        "npy": [npy.encode(buffer).hex() for buffer in frame.buffers],
    }
