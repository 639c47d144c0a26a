"""One model fine-tuned on the pooled data of all silos."""

from __future__ import annotations

from typing import Literal

from gramfuse_server.merging.methods.registry import (
    DIFFERENT_TASKS,
    MASKED,
    UNTRAINED,
    MethodSums,
    Silos,
    method,
    one_of,
)


@method(
    name="joint",
    label="joint",
    words="fine-tuned on the pooled examples of all silos, impossible if silos keep their data",
    options=one_of("start", "silos", "cold", "silos starts as they do, with a fitted head; cold from the base"),
    needs=("data",),
    refusals=(UNTRAINED, DIFFERENT_TASKS, MASKED),
)
def joint(silos: Silos, start: Literal["silos", "cold"]) -> MethodSums:
    """Measure one model fine-tuned on all silos' data."""
    cold = start == "cold"
    return MethodSums(silos.train_jointly(cold=cold), ("cold",) if cold else ())
