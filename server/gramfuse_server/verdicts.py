"""What a check of a merge says, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["ok", "look", "bad"]
"""`ok`: as honest merges are. `look`: honest merges rarely are. `bad`: no honest merge is, or the plan forbids it."""

VERDICTS: tuple[Verdict, ...] = ("ok", "look", "bad")

Range = tuple[float | None, float | None]
"""Least and most; None where there is no bound."""

MOST_TOLD = 3
"""Bad checks that one line names."""


@dataclass(frozen=True)
class Check:
    """Something that can be seen of a merge, at one place.

    Args:
        name: `counts`, `share`, `power`, `eigenvalue`, `ratio`, `average` or `change` (docs/operations.md).
        where: a group, a tensor, a silo, or what is counted.
        value: what is there.
        usual: the range of honest merges.
        possible: the range beyond which no honest merge lies, or which the plan sets.
        verdict: what follows from these.
    """

    name: str
    where: str
    value: float
    usual: list[float | None]
    possible: list[float | None]
    verdict: Verdict

    @staticmethod
    def of(name: str, where: str, value: float, usual: Range, possible: Range) -> Check:
        """Return a check with its verdict."""
        verdict: Verdict = "ok" if _within(value, usual) else "look" if _within(value, possible) else "bad"
        return Check(name, where, value, list(usual), list(possible), verdict)


def worst(checks: Iterable[Mapping[str, Any]]) -> Verdict:
    """Return the worst verdict of checks as a report has them; `ok` if there are none."""
    return max((check["verdict"] for check in checks), key=VERDICTS.index, default="ok")


def told(checks: Iterable[Mapping[str, Any]]) -> str:
    """Return in one line what is bad among checks as a report has them."""
    bad = [check for check in checks if check["verdict"] == "bad"]
    named = [f"{check['name']} of {check['where']} is {check['value']:.3g}" for check in bad[:MOST_TOLD]]
    more = f", and {len(bad) - MOST_TOLD} more" if len(bad) > MOST_TOLD else ""
    return f"{len(bad)} {'check is' if len(bad) == 1 else 'checks are'} bad ({', '.join(named)}{more})"


def _within(value: float, bounds: Range) -> bool:
    least, most = bounds
    return (least is None or value >= least) and (most is None or value <= most)
