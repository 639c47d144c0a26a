"""How much of what was trained is merged in closed form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gramfuse_protocol.layout import Layout

HALF = 0.5
"""A smaller share is warned of."""


def coverage(layout: Layout) -> dict[str, Any]:
    """Return what a report says of it.

    Returns:
        `closed`, the share of the trained and merged parameters that are merged in closed form; and `unmatched`, the
        weights of linear layers that are averaged since it cannot be told which rows of their inputs are tokens.
    """
    return {"closed": layout.closed, "unmatched": tuple(tensor.name for tensor in layout.tensors if tensor.unmatched)}


def told(found: Mapping[str, Any], quoted: Callable[[str], str] = str) -> list[str]:
    """Say it in lines, with a warning if it is less than half.

    Args:
        found: of `coverage`.
        quoted: how names of modules are written.
    """
    share = f"{found['closed']:.1%} of the trained parameters are merged in closed form"
    if found["closed"] < HALF:
        lines = [f"Warning: only {share}; the others are averaged, so most of the merged model is a plain mean."]
    else:
        lines = [f"{share}; the others are averaged."]
    if found["unmatched"]:
        modules = families(name.removesuffix(".weight") for name in found["unmatched"])
        lines.append(f"Averaged since it cannot be told which rows of their inputs are tokens: {quoted(modules)}")
    return lines


def family(name: str) -> str:
    """Return a parameter's name with the numbers of layers left out, `layer.*.weight`."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def families(names: Iterable[str]) -> str:
    """Shorten a list of parameters: the same name in several layers is written once, with the number of layers."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(family(name), []).append(name)
    return ", ".join(of[0] if len(of) == 1 else f"{name} (×{len(of)})" for name, of in found.items()) or "nothing"
