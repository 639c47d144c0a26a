"""One label of several for each image: counted as `gramfuse_protocol.tasks.classification` has it."""

from __future__ import annotations

from gramfuse_protocol.tasks.classification import Classification
from gramfuse_protocol.tasks.registry import register


@register
class ImageClassification(Classification):
    """One label of several, of an image."""

    name = "image-classification"
    summed = "how many held-out images of each label got which label"
    partial_labels = False
    options = frozenset()
