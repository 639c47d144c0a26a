"""What the coordinator can see of a merge from the sum alone, each with a verdict.

Nobody sees a single silo's contribution, so nothing here says who did what; and a silo that lies about as loudly as
honest silos speak is not seen at all (docs/threat-model.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from gramfuse_model.change import changes
from gramfuse_model.normal_equations import side_by_side
from gramfuse_protocol.contract.layout import Group, Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.secure_sum.scales import MOST_WEIGHED
from gramfuse_server.merging.accumulator import Accumulator, Deltas, Float64, Merged
from gramfuse_server.report.schema import Bounds, Check, CheckName, Step
from gramfuse_server.report.verdicts import VERDICTS, check_of

POWER: tuple[float, float] = (32.0, 256.0)
"""Mean square of a layer's inputs over that on public text, from which on a merge is worth a look, and is bad.

Honest merges had up to 21, at the classifier of the demo.
"""

INDEPENDENCE = 0.1
"""Smallest eigenvalue of a sum of Gram matrices, scaled to a unit diagonal, up to which it is usual.

Features of a layer depend on each other: honest merges had up to 0.06. A Gram matrix without correlations has 1.
"""

NARROW = 16
"""Width of a block under which features may well be independent."""

ROUNDING = (1e-3, 2e-2)
"""By how much that eigenvalue may lie below zero for rounding: usually, and at most."""

RATIO = 8.0
"""Usual size of the merged difference over that of the simple average, on the silos' inputs; honest merges had up to
4.2."""

SHARE = 10.0
"""How many times the weight that its examples would give it a silo may well have; a Gram matrix of a few is hardly one.
"""

AVERAGE = 4.0
"""Usual change of an average; honest merges had up to 1.0, where silos fine-tuned at fifty times the usual rate."""


def check_merge(accumulator: Accumulator, merged: Merged, plan: Plan, survivors: Sequence[str]) -> list[Check]:
    """Return what can be seen of the sum of a round.

    Args:
        accumulator: the sums.
        merged: what they gave, before anything was added to it.
        plan: whose terms they are on.
        survivors: the silos that are in them.
    """
    return _shortened([*_counts(accumulator, plan, survivors), *check_sums(accumulator, merged)])


def check_sums(accumulator: Accumulator, merged: Merged) -> list[Check]:
    """Return what can be seen of sums whatever they are of; arguments as `check_merge` has them."""
    return _shortened(_of_groups(accumulator, merged))


def check_model(model: nn.Module, merged: Merged, maximum: float) -> list[Check]:
    """Return how much the merged model and the simple average change.

    Args:
        model: the base.
        merged: differences from it.
        maximum: `merge.maximum-change` of the plan.
    """
    found = []
    looked_at: tuple[tuple[CheckName, Deltas, float], ...]
    looked_at = ("average", merged.mean, AVERAGE), ("change", merged.deltas, maximum / 2)
    for name, of, usual in looked_at:
        limits: tuple[Bounds, Bounds] = (None, min(usual, maximum)), (None, maximum)
        found += [check_of(name, tensor, change, *limits) for tensor, change in changes(model, of).items()]
    return _shortened(found)


def check_shares(
    examples: Mapping[str, int], weighting: str, factors: Mapping[str, float] | None = None
) -> list[Check]:
    """Return how many times the weight that its examples would give it each silo has, where these are known.

    Args:
        examples: ≥ 1, by silo.
        weighting: `uniform` or `examples`.
        factors: what weights are multiplied by, by silo.
    """
    if weighting == "examples" or len(examples) < 2:
        return []
    factors = factors or dict.fromkeys(examples, 1.0)
    each = sum(examples.values()) / sum(factors.values())
    shares = {silo: factors[silo] * each / count for silo, count in examples.items()}
    return _shortened(check_of("share", silo, share, (None, SHARE), (None, None)) for silo, share in shares.items())


def _shortened(checks: Iterable[Check]) -> list[Check]:
    """Return of each name the check that is furthest from usual, and all others that are not ok."""
    by_name: dict[str, list[Check]] = {}
    for check in checks:
        by_name.setdefault(check.name, []).append(check)
    found = []
    for of in by_name.values():
        first, *rest = sorted(of, key=lambda check: (-VERDICTS.index(check.verdict), -abs(check.value), check.where))
        found += [first, *(check for check in rest if check.verdict != "ok")]
    return found


def _counts(accumulator: Accumulator, plan: Plan, survivors: Sequence[str]) -> Iterator[Check]:
    """Yield whether what silos counted is possible at all."""
    layout, merge = accumulator.layout, plan.merge
    weight, examples, *rest = accumulator.counts
    rows, parts = rest[: len(layout.groups)], rest[len(layout.groups) :]
    holders = [sum(silo in part.silos for silo in survivors) for part in layout.parts]
    by_examples = merge.weighting == "examples"
    each = MOST_WEIGHED if by_examples else 1
    yield _count("examples", examples, len(survivors), MOST_WEIGHED * len(survivors) if by_examples else None)
    expected = examples if by_examples else len(survivors)
    yield _count("weight", weight, expected, expected)
    for silos, value in zip(holders, parts, strict=True):
        yield _count("weight", value, silos, each * silos)
    for group, value in zip(layout.groups, rows, strict=True):
        silos = len(survivors) if group.part is None else holders[group.part]
        yield _count(group.name, value, 0, merge.tokens * silos)


def _count(where: str, value: float, least: float, most: float | None) -> Check:
    return check_of("counts", where, value, (least, most), (least, most))


def _of_groups(accumulator: Accumulator, merged: Merged) -> Iterator[Check]:
    """Yield what the Gram matrices of each group, and their products, say."""
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
    """Yield the smallest eigenvalue of the sum of Gram matrices, scaled to a unit diagonal.

    S = α Σ c G + (1 − α) diag(Σ c G), so what S has, less 1 − α, over α, is that of the sum; Gram matrices have none
    below zero.
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
    """Yield the size of the merged difference over that of the simple average, both on the silos' inputs.

    With S Δ = T, what Δ adds to the outputs has the mean square tr(Δᵀ T), and what the average M adds, tr(Mᵀ S M).
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
