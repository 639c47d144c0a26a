"""Temporary."""

import numpy as np

from gramfuse_protocol.encoding import encode
from gramfuse_protocol.scales import METRICS_SCALE


def noisy_words(plan, task, sums, random):
    """Temporary."""
    return encode(np.nan_to_num(sums).reshape(-1), METRICS_SCALE[task.task], len(plan.silo), "metrics")
