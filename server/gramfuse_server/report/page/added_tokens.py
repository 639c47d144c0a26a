"""What is said of tokens that were added to models that are merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gramfuse_protocol.text import quoted
from gramfuse_server.report.schema import AddedToken, Report

SHOWN = 50
"""Most tokens that are named in one place."""


def tell_added(report: Report, mark: Callable[[str], str] = str) -> list[str]:
    """Say what became of tokens that were added to models; nothing of a run, whose models have none.

    Args:
        mark: shows a token, which somebody else named.
    """
    added, said = report.added_tokens, []
    if added is None:
        return []
    if added.kept:
        said.append(
            "Of the tokens that were added to models, these are kept, each with the weighted mean of its rows in the "
            f"models that have it: {_named(added.kept, mark)}."
        )
    if added.left_out:
        said.append(
            f"Of the tokens that were added to models, these are left out: {_named(added.left_out, mark)}. "
            "gramfuse merge --tokenizer DIR keeps those that the tokenizer in DIR has."
        )
    return said


def _named(entries: Sequence[AddedToken], mark: Callable[[str], str]) -> str:
    shown = [f"{mark(quoted(entry.token, 60))} ({', '.join(entry.silos)})" for entry in entries[:SHOWN]]
    more = f" and {len(entries) - SHOWN:,} more" if len(entries) > SHOWN else ""
    return ", ".join(shown) + more
