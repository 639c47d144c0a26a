"""How the head of each kind of task is fitted from its sums, and what can be checked of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np

from gramfuse_protocol.errors import MergeError
from gramfuse_protocol.statistics.contribution import Float64
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.merging.closed_form_head import Head, fit_head
from gramfuse_server.merging.label_heads import fit_labels
from gramfuse_server.merging.ridge_head import fit_ridge
from gramfuse_server.report.schema import Check
from gramfuse_server.report.verdicts import check_of

SEEN = 0.5
"""Factor on a discriminant's outputs if the body was trained on the same examples.

Their features lie closer to the means of their labels than those of other examples. On validation data the best factors
were 0.08 and 0.2 where those of untouched features were 0.15 and 0.4 (HWU64 at eight silos, and the demo's desks).
"""


LOUDEST = 4.0
"""Largest standard deviation of a feature, relative to the median over features, that a head is fitted with.

Shrinkage adds the same to all variances, so a feature that is much louder than the others would shrink them all away.
Features of MiniLM and MPNet reach 1.4 times the median, those of Gemma 3 270M 6.2 times.
"""


CONSTANT = 1e-4
"""A feature that varies by less than this share of its size is constant: the rest is rounding."""


def quieting(sums: HeadSums) -> Float64:
    """Return a factor for each feature, (D,), 1 or less, with which none varies more than LOUDEST times the median."""
    rows = max(sums.examples, 1.0)
    mean = sums.second[:-1, -1] / rows
    deviation = np.sqrt(np.maximum(sums.second.diagonal()[:-1] / rows - mean * mean, 0.0))
    size = np.sqrt(np.maximum(sums.second.diagonal()[:-1] / rows, 0.0))
    varying = deviation[deviation > CONSTANT * size]
    most = LOUDEST * float(np.median(varying)) if varying.size else 0.0
    factors: Float64 = most / np.maximum(deviation, most) if most else np.ones_like(deviation)
    return factors


class Solver(ABC):
    """One way of fitting a head."""

    relative: ClassVar[bool] = False
    """Whether only the differences of a head's outputs count, as in a softmax."""

    def fit(self, sums: HeadSums, *, start: float | None, seen: bool = False) -> Head:
        """Return the head of the examples that the sums are over.

        Features that vary more than LOUDEST times the median are fitted as if they were quieter.

        Args:
            seen: whether the body was trained on these examples.
            start: of a head that training starts from, how sure of itself a classifier is: a factor on its outputs;
                None for a finished head.

        Raises:
            MergeError: if the sums allow no head.
        """
        quieter = quieting(sums)
        try:
            head = self.solve(sums.scaled(quieter), start=start, seen=seen)
        except np.linalg.LinAlgError as error:
            raise MergeError(
                f"the sums of the head are of no examples ({error}); a silo's sums are wrong: fit heads of the silos "
                "alone to find out whose"
            ) from None
        return replace(head, weight=head.weight * quieter)

    @abstractmethod
    def solve(self, sums: HeadSums, *, start: float | None, seen: bool) -> Head:
        """Do what `fit` does, for features of similar size."""

    def checks(self, sums: HeadSums) -> Iterator[Check]:
        """Yield checks of the counts of examples."""
        yield from ()


class Discriminant(Solver):
    """Exactly one label for each example; before training, all labels count the same."""

    relative = True

    def solve(self, sums: HeadSums, *, start: float | None, seen: bool) -> Head:
        """Return the linear discriminant."""
        head = fit_head(sums, prior=start is None)
        if start is not None:
            return head.scaled(start)
        return head.calibrated.scaled(SEEN) if seen else head.calibrated

    def checks(self, sums: HeadSums) -> Iterator[Check]:
        """Check that each example has one label."""
        yield check_of("counts", "fewest of a label", float(sums.counts.min()), (0, None), (-0.5, None))
        off = float(sums.counts.sum()) - sums.examples
        yield check_of("counts", "labels less examples", off, (-0.5, 0.5), (-0.5, 0.5))


class Ridge(Solver):
    """One number for each example. Its fit is not surer than the data are, so training starts from it as it is."""

    def solve(self, sums: HeadSums, *, start: float | None, seen: bool) -> Head:
        """Return the ridge regression."""
        return fit_ridge(sums)


class Labels(Solver):
    """Any number of labels for each example."""

    def solve(self, sums: HeadSums, *, start: float | None, seen: bool) -> Head:
        """Return a two-class discriminant for each label."""
        return fit_labels(sums, start=start)

    def checks(self, sums: HeadSums) -> Iterator[Check]:
        """Check that no more examples have a label than are annotated for it."""
        having, annotated = sums.counts.reshape(2, -1)
        yield check_of("counts", "fewest of a label", float(having.min()), (0, None), (-0.5, None))
        most = float((having - annotated).max())
        yield check_of("counts", "examples of a label less annotated ones", most, (None, 0), (None, 0.5))
        beyond = float(annotated.max()) - sums.examples
        yield check_of("counts", "annotated examples less all", beyond, (None, 0.5), (None, 0.5))


SOLVERS: dict[str, Solver] = {"discriminant": Discriminant(), "ridge": Ridge(), "labels": Labels()}
"""Solvers by `gramfuse_protocol.tasks.registry.TaskKind.fit`; another package can add one."""
