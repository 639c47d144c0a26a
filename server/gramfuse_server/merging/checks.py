"""Checks of a merge that the coordinator can make from the sum alone, each with a verdict.

No single contribution is visible, so the checks cannot tell which silo is at fault, and they miss a dishonest silo
whose contribution has the size of honest ones (docs/threat-model.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gramfuse_model.change import changes
from gramfuse_model.normal_equations import side_by_side
from gramfuse_protocol.contract.layout import Group, Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.secure_sum.scales import MOST_WEIGHED
from gramfuse_protocol.statistics.contribution import Float64
from gramfuse_server.merging.accumulator import Accumulator, Deltas, Merged
from gramfuse_server.report.schema import Bounds, Check, CheckName, Step
from gramfuse_server.report.verdicts import VERDICTS, check_of

POWER: tuple[float, float] = (32.0, 256.0)
"""Mean square of a layer's inputs over that on public text, above which a merge is unusual, and bad.

Honest merges reached 21, at the classifier of the demo.
"""

INDEPENDENCE = 0.1
"""Largest usual smallest eigenvalue of a sum of Gram matrices, scaled to a unit diagonal.

A layer's features are correlated: honest merges reached 0.06. Without correlations it would be 1.
"""

NARROW = 16
"""Blocks narrower than this can have independent features."""

ROUNDING = (1e-3, 2e-2)
"""How far rounding can push that eigenvalue below zero: usually, and at most."""

RATIO = 8.0
"""Usual size of the merged difference over that of the simple average, on the silos' inputs; honest merges reached
4.2."""

SHARE = 10.0
"""Usual weight of a silo over its share of the examples; few examples give a poor Gram matrix."""

AVERAGE = 4.0
"""Usual change of the simple average; honest merges reached 1.0, with fifty times the usual learning rate."""


def check_merge(accumulator: Accumulator, merged: Merged, plan: Plan, survivors: Sequence[str]) -> list[Check]:
    """Check the sum of a round.

    Args:
        accumulator: the sums.
        merged: their merge, relative to the model that the round started from.
        plan: of the run.
        survivors: the silos in the sums.
    """
    return worth_reporting([*_counts(accumulator, plan, survivors), *check_sums(accumulator, merged)])


def check_sums(accumulator: Accumulator, merged: Merged) -> list[Check]:
    """Check the sums of a run or of files; arguments as in `check_merge`."""
    return worth_reporting(_group_checks(accumulator, merged))


def check_model(
    model: nn.Module,
    merged: Merged,
    layout: Layout,
    maximum: float,
    start: Mapping[str, NDArray[Any]] | None = None,
) -> list[Check]:
    """Check how much the merged model and the simple average change.

    Args:
        model: the base.
        merged: differences from it.
        layout: of the merge.
        start: the model that silos trained from, by block name, with which a fitted head is compared.
        maximum: `merge.maximum-change` of the plan.
    """
    checks = []
    targets: tuple[tuple[CheckName, Deltas, float], ...]
    targets = ("average", merged.mean, AVERAGE), ("change", merged.deltas, maximum / 2)
    for name, deltas, usual in targets:
        limits: tuple[Bounds, Bounds] = (None, min(usual, maximum)), (None, maximum)
        found = changes(model, deltas, layout.head, start)
        checks += [check_of(name, tensor, change, *limits) for tensor, change in found.items()]
    return worth_reporting(checks)


def check_shares(
    examples: Mapping[str, int], weighting: str, factors: Mapping[str, float] | None = None
) -> list[Check]:
    """Check each silo's weight over its share of the examples.

    Args:
        examples: ≥ 1, by silo.
        weighting: `uniform` or `examples`.
        factors: on the weights, by silo.
    """
    if weighting == "examples" or len(examples) < 2:
        return []
    factors = factors or dict.fromkeys(examples, 1.0)
    each = sum(examples.values()) / sum(factors.values())
    shares = {silo: factors[silo] * each / count for silo, count in examples.items()}
    return worth_reporting(
        check_of("share", silo, share, (None, SHARE), (None, None)) for silo, share in shares.items()
    )


def worth_reporting(checks: Iterable[Check]) -> list[Check]:
    """Return the least usual check of each name, and all others that are not ok."""
    by_name: dict[str, list[Check]] = {}
    for check in checks:
        by_name.setdefault(check.name, []).append(check)
    kept = []
    for same_name in by_name.values():
        first, *rest = sorted(
            same_name, key=lambda check: (-VERDICTS.index(check.verdict), -abs(check.value), check.where)
        )
        kept += [first, *(check for check in rest if check.verdict != "ok")]
    return kept


def _counts(accumulator: Accumulator, plan: Plan, survivors: Sequence[str]) -> Iterator[Check]:
    """Check that the silos' counts are possible."""
    layout, merge = accumulator.layout, plan.merge
    weight, examples, *rest = accumulator.counts
    rows, parts = rest[: len(layout.groups)], rest[len(layout.groups) :]
    holders = [sum(silo in part.silos for silo in survivors) for part in layout.parts]
    by_examples = merge.weighting == "examples"
    each = MOST_WEIGHED if by_examples else 1
    if plan.counted:
        yield _count("examples", examples, len(survivors), MOST_WEIGHED * len(survivors) if by_examples else None)
    else:
        yield _count("examples", examples, 0, 0)
    expected = examples if by_examples else len(survivors)
    yield _count("weight", weight, expected, expected)
    for silos, value in zip(holders, parts, strict=True):
        yield _count("weight", value, silos, each * silos)
    for group, value in zip(layout.groups, rows, strict=True):
        silos = len(survivors) if group.part is None else holders[group.part]
        yield _count(group.name, value, 0, merge.tokens * silos if plan.counted else 0)


def _count(where: str, value: float, least: float, most: float | None) -> Check:
    return check_of("counts", where, value, (least, most), (least, most))


def _group_checks(accumulator: Accumulator, merged: Merged) -> Iterator[Check]:
    """Check the Gram matrices of each group, and their products."""
    layout = accumulator.layout
    for group, step in zip(layout.groups, merged.steps, strict=True):
        s, t, weight = accumulator.of_group(group)
        parts = list(group.blocks.unpack(s))
        diagonal = np.concatenate([part.diagonal(axis1=1, axis2=2).reshape(-1) for part in parts])  # (features,)
        yield from _eigenvalue(group, step, diagonal, accumulator.alpha)
        if group.exponents and weight > 0:
            of_experts = diagonal.reshape(group.experts or 1, group.d_in).sum(axis=1)
            power = float(of_experts.max() / weight / np.exp2(2.0 * np.array(group.exponents)).sum())
            yield check_of("power", group.name, power, (None, POWER[0]), (None, POWER[1]))
        if step.outcome != "empty":
            yield from _ratio(layout, group, parts, t, merged)


def _eigenvalue(group: Group, step: Step, diagonal: Float64, alpha: float) -> Iterator[Check]:
    """Check the smallest eigenvalue of the sum of Gram matrices, scaled to a unit diagonal.

    S = α Σ c G + (1 − α) diag(Σ c G), so the sum's eigenvalue is (S's eigenvalue − (1 − α)) / α. Gram matrices have no
    negative eigenvalues.
    """
    mean = float(np.abs(diagonal).mean())
    lowest = float(diagonal.min()) / mean if mean else 0.0
    value = (step.smallest_eigenvalue - (1 - alpha)) / alpha if alpha else 0.0
    if step.mean_blocks:
        value = -1.0
    if lowest < -ROUNDING[0]:
        value = min(value, lowest)
    widths = [width for _, _, width in group.blocks.parts]
    judged = step.outcome != "empty" and max(widths) > 1 and alpha > 0
    if judged or value < 0:
        most = INDEPENDENCE if min(widths) >= NARROW else None
        yield check_of("eigenvalue", group.name, value, (-ROUNDING[0], most), (-ROUNDING[1], None))


def _ratio(layout: Layout, group: Group, parts: Sequence[Float64], t: Float64, merged: Merged) -> Iterator[Check]:
    """Check the size of the merged difference over that of the simple average, both on the silos' inputs.

    With S Δ = T, the outputs change by a mean square of tr(Δᵀ T) under Δ, and of tr(Mᵀ S M) under the average M.
    """
    solved = side_by_side(layout, group, merged.deltas).numpy()
    mean = side_by_side(layout, group, merged.mean).numpy()
    average = 0.0
    for part, (first, count, width) in zip(parts, group.blocks.parts, strict=True):
        rows = mean[first : first + count * width].reshape(count, width, -1)
        average += float((rows * (part @ rows)).sum())
    size = float((solved * t).sum())
    if average > 0 and size > 0:
        yield check_of("ratio", group.name, float(np.sqrt(size / average)), (None, RATIO), (None, None))
