"""Faults that change what a silo sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import RecordDict

from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import REPLIES
from gramfuse_protocol.messages.wire import pack, unpack
from tests.exchange.open.runs import Fault


def lying(phase: str, change: Callable[[Any], Any], silo: str = "silo-b", *, once: bool = False) -> Fault:
    """A fault: what `silo` sends in `phase` is changed as a message, or, if that is not one any more, as a record."""

    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict:
        content = deliver()
        if (visit.node, visit.phase) != (silo, phase) or (once and visit.number > 1):
            return content
        changed = change(unpack(from_record(content), REPLIES))
        return changed if isinstance(changed, RecordDict) else to_record(pack(changed))

    return fault


def with_array(change: Callable[[np.ndarray], np.ndarray | None], pick: str = "delta:") -> Callable[[Any], Any]:
    """Change the first array whose name starts so; None takes it away."""

    def apply(reply: Any) -> Any:
        arrays = dict(reply.arrays)
        name = next(name for name in arrays if name.startswith(pick))
        changed = change(arrays.pop(name).copy())
        return reply.model_copy(update={"arrays": arrays if changed is None else {**arrays, name: changed}})

    return apply


def value_at(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def apply(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[-1] = value
        return array

    return apply


def another(**update: Any) -> Callable[[Any], Any]:
    return lambda reply: reply.model_copy(update=update)
