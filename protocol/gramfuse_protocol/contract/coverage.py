"""How much of what was trained is merged in closed form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.statistics.contribution import Contribution

HALF = 0.5
"""A smaller share is warned of."""

MOST = 16
"""Of so many experts of a layer each is named."""


class Covered(Protocol):
    """A report that says it, or `Coverage`."""

    @property
    def closed(self) -> float | None:
        """Share of the trained and merged parameters that are merged in closed form; None if it is not said."""

    @property
    def unmatched(self) -> Sequence[str]:
        """Weights of linear layers that are averaged since it cannot be told which rows of their inputs are tokens."""


class Coverage(NamedTuple):
    """What a report says of it; as `Covered` has it."""

    closed: float
    unmatched: tuple[str, ...]


class Solved(Protocol):
    """How a group of weights was solved, as a report has it."""

    @property
    def group(self) -> str:
        """Its name."""

    @property
    def unused(self) -> Sequence[int]:
        """Experts to which no measured token of any silo was routed."""


def coverage(layout: Layout, steps: Iterable[Solved] = (), same: Collection[str] = ()) -> Coverage:
    """Return what a report says of it.

    Args:
        steps: how groups were solved, once they are; experts that took the mean do not count as merged in closed form.
        same: tensors that are as they are in the base, in all models; they do not count as trained.
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
    """Return the names of the tensors that are those of the base in all contributions, bit for bit."""
    names = (tensor.name for tensor in layout.tensors)
    return frozenset(name for name in names if not any(one.block(delta_block(name)).any() for one in contributions))


def told(found: Covered, quoted: Callable[[str], str] = str) -> list[str]:
    """Say it in lines, with a warning if it is less than half; nothing if it is not said.

    Args:
        quoted: how names of modules are written.
    """
    if found.closed is None:
        return []
    share = f"{found.closed:.1%} of the trained parameters are merged in closed form"
    if found.closed < HALF:
        lines = [f"Warning: only {share}; the others are averaged, so most of the merged model is a plain mean."]
    else:
        lines = [f"{share}; the others are averaged."]
    if found.unmatched:
        modules = families(name.removesuffix(".weight") for name in found.unmatched)
        lines.append(f"Averaged since it cannot be told which rows of their inputs are tokens: {quoted(modules)}")
    return lines


def unused(steps: Iterable[Solved], quoted: Callable[[str], str] = str) -> list[str]:
    """Say in a line which experts were averaged since no measured token went to them; nothing if there are none.

    Args:
        quoted: how names of tensors are written.
    """
    found = [f"{quoted(step.group)}: {experts(step.unused)}" for step in steps if step.unused]
    if not found:
        return []
    return [f"Averaged since no measured token of any silo was routed to them: {'; '.join(found)}."]


def experts(indices: Sequence[int]) -> str:
    """Write which experts of a layer are meant; of many only how many they are."""
    more = f" and {len(indices) - MOST:,} more" if len(indices) > MOST else ""
    return f"expert{'s' * (len(indices) > 1)} {', '.join(map(str, indices[:MOST]))}{more}"


def family(name: str) -> str:
    """Return a parameter's name with the numbers of layers left out, `layer.*.weight`."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def families(names: Iterable[str]) -> str:
    """Shorten a list of parameters: the same name in several layers is written once, with the number of layers."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(family(name), []).append(name)
    return ", ".join(of[0] if len(of) == 1 else f"{name} (×{len(of)})" for name, of in found.items()) or "nothing"
