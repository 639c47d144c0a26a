"""RegMean over statistics in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Literal

from gramfuse_protocol.arguments import check_argument, check_contribution, wrong_argument
from gramfuse_protocol.contract.form import Slice
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.statistics.contribution import Contribution, check_slices
from gramfuse_server.merging.accumulator import Accumulator, Merged

Weighting = Literal["uniform", "examples"]


def merge(
    statistics: Iterable[Contribution] | Mapping[str, Contribution],
    layout: Layout,
    *,
    alpha: float = 0.9,
    weighting: Weighting = "uniform",
) -> Merged:
    """Merge the statistics of several silos by the RegMean closed form (Jin et al., ICLR 2023).

    Example:
        >>> statistics = gramfuse.collect_statistics(tuned, [batch], layout, base=start, examples=2)
        >>> merged = gramfuse.merge([statistics, statistics], layout)
        >>> float(abs(merged.deltas["classifier.weight"] - statistics.block("delta:classifier.weight")).max()) < 1e-6
        True

    Args:
        statistics: one item per silo, as returned by `collect_statistics` or `read_statistics`; by silo name if only
            some silos annotate some labels of the layout. The order affects the last bits of the result.
        layout: the layout that all of them were measured with.
        alpha: share of each Gram matrix's off-diagonal to keep, in [0, 1].
        weighting: `uniform`, or `examples` to weigh each silo by its number of examples.

    Returns:
        The merged differences from the base (`deltas`), those of the simple average (`mean`), and how each group was
        solved (`steps`).

    Raises:
        ContributionError: naming an argument of the wrong type; naming the tensor, if statistics do not fit the layout,
            contain NaN or Inf, or yield a merge too large for float32.
        ValueError: if there are no statistics, or α or the weighting is invalid.
    """
    if isinstance(statistics, str) or not isinstance(statistics, Iterable):
        raise wrong_argument("merge: statistics", statistics, "a list of statistics", ContributionError)
    check_argument("merge: layout", layout, Layout, "a gramfuse.Layout", ContributionError)
    check_argument("merge: alpha", alpha, Real, "a number from 0 to 1", ContributionError)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    if weighting not in ("uniform", "examples"):
        raise ValueError(f"weighting must be 'uniform' or 'examples', not {weighting!r}")
    accumulator = Accumulator(layout, alpha=alpha, weighting=weighting)
    named = statistics.items() if isinstance(statistics, Mapping) else ((None, one) for one in statistics)
    number = 0
    for number, (silo, contribution) in enumerate(named, 1):
        source = f"statistics {number}" if silo is None else f"statistics of {silo!r}"
        check_contribution(f"merge: {source}", contribution)
        check_slices(
            (Slice(block, 0, block.entries) for block in layout.blocks),
            {block.name: contribution.block(block.name) for block in layout.blocks},
            source,
        )
        accumulator.fold(contribution, source, silo=silo)
    if not number:
        raise ValueError("there are no statistics to merge")
    return accumulator.merge()
