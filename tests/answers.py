"""A classifier's answers, as tests write them."""

from __future__ import annotations

from typing import Any

import numpy as np

from gramfuse_protocol.tasks.classification import Answers
from gramfuse_protocol.tasks.rows import LOSS


def sure(truth: Any, predicted: Any) -> Answers:
    """Answers of a classifier that has no doubt."""
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    return Answers(truth, predicted, np.where(truth == predicted, 0.0, LOSS), np.ones(len(truth)))
