"""One model fine-tuned on the pooled data of all silos."""

from __future__ import annotations

from gramfuse_server.merging.methods.registry import DIFFERENT_TASKS, MASKED, MethodSums, Silos, method


@method(
    name="joint",
    label="joint",
    words="fine-tuned on the pooled examples of all silos, impossible if silos keep their data",
    needs=("data",),
    refusals=(DIFFERENT_TASKS, MASKED),
)
def joint(silos: Silos) -> MethodSums:
    """Measure the base model fine-tuned on all silos' data."""
    return MethodSums(silos.train_jointly())
