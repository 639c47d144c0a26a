"""How large the outputs of a head are on public data: the limit for a head that is fitted in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from gramfuse_model.loading.base_model import Base
from gramfuse_model.parameters import applied
from gramfuse_model.probing.hooks import observing, run
from gramfuse_model.probing.public_batch import public_batch
from gramfuse_protocol.errors import RefusalError

MOST = 1000.0
"""Largest output of a head that silos train from or measure. With larger ones, the loss tells which examples lie on the
wrong side of a plane, and little else."""


def largest_output(base: Base, deltas: Mapping[str, NDArray[Any]]) -> float:
    """Return the largest absolute output of base + deltas on public data; infinity if one is not finite.

    Args:
        deltas: differences from the base by parameter name.
    """
    with applied(base.model, deltas), observing(base.model, []):
        outputs = run(base.model, public_batch(base)).logits
    return float(outputs.abs().max()) if bool(torch.isfinite(outputs).all()) else float("inf")


def check_outputs(base: Base, deltas: Mapping[str, NDArray[Any]]) -> None:
    """Raise RefusalError if a fitted head's outputs on public data exceed MOST.

    The result depends on the base and the coordinator's message, not on data, so the reason may be sent.
    """
    largest = largest_output(base, deltas)
    if not largest <= MOST:
        reason = f"the fitted head's largest output on public data is {largest:.3g}; at most {MOST:g} is usual"
        raise RefusalError(f"{reason}. A silo or the coordinator did not send what it measured", reason=reason)
