"""All silos' models asked at once."""

from __future__ import annotations

from gramfuse_server.merging.methods.registry import DIFFERENT_TASKS, CandidateSums, Silos, method


@method(
    name="ensemble",
    label="ensemble",
    words="all silos' models asked at once, and their answers averaged",
    needs=("models",),
    refusals=(DIFFERENT_TASKS,),
)
def ensemble(silos: Silos) -> CandidateSums:
    """Measure the mean of all models' logits, and the majority vote on what they generate."""
    return CandidateSums(silos.ask_together())
