"""Verdicts of a merge's checks, and their summary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from gramfuse_server.report.schema import Bounds, Check, CheckName, Verdict

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""From the best to the worst."""

MOST_NAMED = 3
"""Most bad checks that `describe_bad` names."""


def check_of(name: CheckName, where: str, value: float, usual: Bounds, possible: Bounds) -> Check:
    """Return a check with its verdict."""
    verdict: Verdict = "ok" if _within(value, usual) else "look" if _within(value, possible) else "bad"
    return Check(name=name, where=where, value=value, usual=usual, possible=possible, verdict=verdict)


def worst(checks: Iterable[Check]) -> Verdict:
    """Return the worst verdict of checks; `ok` without any."""
    return max((check.verdict for check in checks), key=VERDICTS.index, default="ok")


def describe_bad(checks: Iterable[Check]) -> str:
    """Return one line that counts and names the bad checks."""
    bad = [check for check in checks if check.verdict == "bad"]
    named = [f"{check.name} of {check.where} is {check.value:.3g}" for check in bad[:MOST_NAMED]]
    more = f", and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
    return f"{len(bad)} {'check is' if len(bad) == 1 else 'checks are'} bad ({', '.join(named)}{more})"


def _within(value: float, bounds: Bounds) -> bool:
    least, most = bounds
    return (least is None or value >= least) and (most is None or value <= most)
