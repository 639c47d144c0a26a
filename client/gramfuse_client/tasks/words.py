"""What kinds of task have in common in what they tell of labels."""

from __future__ import annotations

from collections.abc import Mapping

from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.text import quoted


def counted(counts: Mapping[str, int], what: str) -> str:
    """Say how often each of some things occurs, the first twelve by name."""
    said = [f"{quoted(label, 60)} {count:,}" for label, count in counts.items()]
    return ", ".join(said[:12]) + (f", and {len(said) - 12} more {what}" if said[12:] else "")


def of_labels(task: Task, found: Mapping[str, int], more: str = "") -> str:
    """Say how many examples each label has, of those that this silo annotates.

    Args:
        found: by label.
        more: what else there is to say of them.
    """
    said = counted({task.labels[i]: found[task.labels[i]] for i in task.annotated}, "labels") + more
    missing = len(task.labels) - len(task.annotated)
    return f"{said}; {missing} labels are not this silo's to annotate" if missing else said
