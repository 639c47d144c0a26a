"""Coverage: the share of the trained parameters that is merged in closed form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.statistics.contribution import Contribution

HALF = 0.5
"""Coverage below this share yields a warning."""

NAMED_EXPERTS = 16
"""Maximum number of experts of a layer that a line names."""


class Covered(Protocol):
    """Anything with coverage figures: a report, or `Coverage`."""

    @property
    def closed(self) -> float | None:
        """Share of the trained and merged parameters that is merged in closed form; None if unknown."""

    @property
    def unmatched(self) -> Sequence[str]:
        """Weights of linear layers that are averaged because the token rows of their inputs cannot be identified."""


class Coverage(NamedTuple):
    """Coverage figures; fields as in `Covered`."""

    closed: float
    unmatched: tuple[str, ...]


class Solved(Protocol):
    """How a group of weights was solved, as in a report."""

    @property
    def group(self) -> str:
        """Name of the group."""

    @property
    def unused(self) -> Sequence[int]:
        """Experts that received no measured token at any silo."""


def coverage(layout: Layout, steps: Iterable[Solved] = (), same: Collection[str] = ()) -> Coverage:
    """Compute the coverage of a layout.

    Args:
        steps: how groups were solved, after a merge; unused experts do not count as merged in closed form.
        same: tensors that equal the base's in all models (`unchanged`); they do not count as trained.
    """
    unused = {step.group: len(step.unused) for step in steps}
    averaged = sum(
        unused[group.name] * weight.d_out * group.d_in
        for group in layout.groups
        if unused.get(group.name)
        for weight in group.weights
        if weight.weight not in same
    )
    trained = [tensor for tensor in layout.tensors if not tensor.buffer and tensor.name not in same]
    closed = sum(math.prod(tensor.shape) for tensor in trained if tensor.merge == "regmean") - averaged
    share = closed / max(1, sum(math.prod(tensor.shape) for tensor in trained))
    return Coverage(share, tuple(tensor.name for tensor in layout.tensors if tensor.unmatched))


def unchanged(layout: Layout, contributions: Sequence[Contribution]) -> frozenset[str]:
    """Return the names of the tensors that all contributions leave unchanged, bit for bit."""
    names = (tensor.name for tensor in layout.tensors)
    return frozenset(name for name in names if not any(c.block(delta_block(name)).any() for c in contributions))


def coverage_lines(covered: Covered, quoted: Callable[[str], str] = str) -> list[str]:
    """Describe coverage in lines of text, with a warning if it is below one half; no lines if it is unknown.

    Args:
        quoted: formats names of modules.
    """
    if covered.closed is None:
        return []
    share = f"{covered.closed:.1%} of the trained parameters are merged in closed form"
    if covered.closed < HALF:
        lines = [f"Warning: only {share}; the others are averaged, so most of the merged model is a plain mean."]
    else:
        lines = [f"{share}; the others are averaged."]
    if covered.unmatched:
        modules = families(name.removesuffix(".weight") for name in covered.unmatched)
        lines.append(f"Averaged because the token rows of their inputs cannot be identified: {quoted(modules)}")
    return lines


def unused_expert_lines(steps: Iterable[Solved], quoted: Callable[[str], str] = str) -> list[str]:
    """Name the experts that were averaged because they received no measured token: one line, or none.

    Args:
        quoted: formats names of tensors.
    """
    groups = [f"{quoted(step.group)}: {experts(step.unused)}" for step in steps if step.unused]
    if not groups:
        return []
    return [f"Averaged because no silo's measured tokens were routed to them: {'; '.join(groups)}."]


def experts(indices: Sequence[int]) -> str:
    """Name the experts with these indices: the first NAMED_EXPERTS, then how many more there are."""
    more = f" and {len(indices) - NAMED_EXPERTS:,} more" if len(indices) > NAMED_EXPERTS else ""
    return f"expert{'s' * (len(indices) > 1)} {', '.join(map(str, indices[:NAMED_EXPERTS]))}{more}"


def family(name: str) -> str:
    """Return a parameter's name with `*` for each layer number: `layer.*.weight`."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def families(names: Iterable[str]) -> str:
    """Shorten a list of parameters: a name that occurs in several layers is listed once, with their number."""
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(family(name), []).append(name)
    shortened = (full[0] if len(full) == 1 else f"{name} (×{len(full)})" for name, full in members.items())
    return ", ".join(shortened) or "nothing"
