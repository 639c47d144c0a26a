"""The ensemble of all silos' models."""

from __future__ import annotations

from gramfuse_server.merging.methods.registry import DIFFERENT_TASKS, CandidateSums, Silos, method


@method(
    name="ensemble",
    label="ensemble",
    words="the ensemble of all silos' models, with averaged answers",
    needs=("models",),
    refusals=(DIFFERENT_TASKS,),
)
def ensemble(silos: Silos) -> CandidateSums:
    """Measure the mean of all models' logits, or the majority vote of their generated texts."""
    return CandidateSums(silos.ask_together())
