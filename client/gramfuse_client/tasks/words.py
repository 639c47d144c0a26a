"""Descriptions of label counts, shared by several kinds of task."""

from __future__ import annotations

from collections.abc import Mapping

from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.text import quoted


def list_counts(counts: Mapping[str, int], kind: str) -> str:
    """List names with their counts: the first twelve, and how many more of that kind there are."""
    entries = [f"{quoted(label, 60)} {count:,}" for label, count in counts.items()]
    return ", ".join(entries[:12]) + (f", and {len(entries) - 12} more {kind}" if entries[12:] else "")


def list_label_counts(task: Task, counts: Mapping[str, int], more: str = "") -> str:
    """List the number of examples of each label that this silo annotates.

    Args:
        counts: number of examples by label.
        more: text to append to the list.
    """
    text = list_counts({task.labels[i]: counts[task.labels[i]] for i in task.annotated}, "labels") + more
    missing = len(task.labels) - len(task.annotated)
    return f"{text}; labels that this silo does not annotate: {missing}" if missing else text
