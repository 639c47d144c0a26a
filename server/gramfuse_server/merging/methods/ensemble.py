"""The ensemble of all silos' models."""

from __future__ import annotations

from gramfuse_server.merging.methods.registry import DIFFERENT_TASKS, MethodSums, Silos, method


@method(
    name="ensemble",
    label="ensemble",
    words="the ensemble of all silos' models, with averaged answers",
    needs=("models",),
    refusals=(DIFFERENT_TASKS,),
)
def ensemble(silos: Silos) -> MethodSums:
    """Measure the mean of all models' logits, or the majority vote of their generated texts."""
    return MethodSums(silos.ask_together())
