"""One model fine-tuned on the pooled data of all silos."""

from __future__ import annotations

from gramfuse_protocol.tasks.registry import kind_of
from gramfuse_server.merging.methods.registry import DIFFERENT_TASKS, MethodSums, NotAllowed, Silos, method

MASKED = NotAllowed(
    lambda plan: any(silo.labels and kind_of(plan.task_of(silo.name)).exclusive for silo in plan.silo),
    "silos annotate different classes ('labels' of a [[silo]]), so a label of one silo does not rule out another "
    "silo's class; leave it out",
)


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
