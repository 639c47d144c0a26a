"""Checks of the sums that a head is fitted from, which the coordinator can make from the sum alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gramfuse_model.head_size import MOST, largest_output
from gramfuse_model.loading.base_model import Base
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.secure_sum.scales import MOST_WEIGHED
from gramfuse_protocol.statistics.contribution import Float64
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.merging.accumulator import Merged
from gramfuse_server.merging.checks import POWER, ROUNDING, worth_reporting
from gramfuse_server.merging.head_solvers import SOLVERS
from gramfuse_server.report.schema import Check
from gramfuse_server.report.verdicts import check_of

QUIETEST = 2.0**-8
"""Least size of a feature, relative to that on public data, by which its part of a sum is judged."""

IMPOSSIBLE = 1e6
"""A product of two features scaled to size 1 is never so large; larger ones are cut, so that eigenvalues exist."""

USUAL = 200.0
"""Largest usual output of a fitted head on public data."""


def check_head(sums: HeadSums, head: HeadLayout, silos: int, *, secure: bool) -> list[Check]:
    """Check the sums of a head.

    Args:
        sums: over silos.
        head: the layer to fit.
        silos: number of silos in the sums.
        secure: whether they are a secure sum, in which a silo has at most so many examples.
    """
    return worth_reporting(_checks(sums, head, silos, secure=secure))


def check_outputs(base: Base, merged: Merged, head: HeadLayout) -> list[Check]:
    """Check the largest output of a fitted head on public data.

    Args:
        base: the base model.
        merged: differences from it of the model with the head.
        head: the layer.
    """
    return [check_of("outputs", head.weight, largest_output(base, merged.rounded()), (None, USUAL), (None, MOST))]


def _smallest_eigenvalue(second: Float64, expected: Float64) -> float:
    """Return the smallest eigenvalue of a sum of products, scaled to a unit diagonal.

    The sum is rounded relative to the features' size on public data, so a feature that is much quieter in the sum is
    scaled as if it were QUIETEST times that size: else its rounding error would look like an eigenvalue.

    Args:
        expected: the diagonal that features of their usual size would have, (D,).
    """
    scale = np.sqrt(np.maximum(second.diagonal(), QUIETEST**2 * expected))
    scaled = np.clip(np.nan_to_num(second / np.outer(scale, scale), nan=-IMPOSSIBLE), -IMPOSSIBLE, IMPOSSIBLE)
    return float(np.linalg.eigvalsh(scaled)[0])


def _checks(sums: HeadSums, head: HeadLayout, silos: int, *, secure: bool) -> Iterator[Check]:
    examples = sums.examples
    counted: tuple[float | None, float | None] = (silos, MOST_WEIGHED * silos if secure else None)
    yield check_of("counts", "examples", examples, counted, counted)
    yield from SOLVERS[head.fit].checks(sums)
    second = sums.second[:-1, :-1]
    public = np.exp2(2.0 * np.array(head.exponents))  # mean square of each feature on public data, about
    smallest = _smallest_eigenvalue(second, max(examples, 1.0) * public)
    yield check_of("eigenvalue", head.weight, smallest, (-ROUNDING[0], None), (-ROUNDING[1], None))
    if examples > 0:
        power = float(second.diagonal().sum() / examples / public.sum())
        yield check_of("power", head.weight, power, (None, POWER[0]), (None, POWER[1]))
