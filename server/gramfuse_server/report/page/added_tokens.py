"""Explains which added tokens a merged model has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gramfuse_protocol.text import quoted
from gramfuse_server.report.schema import AddedToken, Report

SHOWN = 50
"""Most tokens to list."""


def explain_added_tokens(report: Report, mark: Callable[[str], str] = str) -> list[str]:
    """Return sentences on the tokens that were added to models; empty for runs, whose models have none.

    Args:
        mark: formats a token, whose text is untrusted.
    """
    added, sentences = report.added_tokens, []
    if added is None:
        return []
    if added.kept:
        sentences.append(
            "Added tokens in the merged model, each with the weighted mean of its rows over the models that have it: "
            f"{_named(added.kept, mark)}."
        )
    if added.left_out:
        sentences.append(
            f"Added tokens that were left out: {_named(added.left_out, mark)}. To keep them, run gramfuse merge "
            "--tokenizer DIR with a tokenizer that has them."
        )
    return sentences


def _named(entries: Sequence[AddedToken], mark: Callable[[str], str]) -> str:
    shown = [f"{mark(quoted(entry.token, 60))} ({', '.join(entry.silos)})" for entry in entries[:SHOWN]]
    more = f" and {len(entries) - SHOWN:,} more" if len(entries) > SHOWN else ""
    return ", ".join(shown) + more
