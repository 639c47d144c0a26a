"""Image classification: exactly one of several labels for each image; sums and metrics as in `classification`."""

from __future__ import annotations

from gramfuse_protocol.tasks.classification import Classification
from gramfuse_protocol.tasks.registry import register


@register
class ImageClassification(Classification):
    """Exactly one of several labels for an image."""

    name = "image-classification"
    summed = Classification.summed.replace("held-out examples", "held-out images")
    partial_labels = False
    options = frozenset()
