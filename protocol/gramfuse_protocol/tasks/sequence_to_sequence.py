"""Sequence to sequence: generate a text for each text.

The sums are (5,): n, exact matches, Σ token-F1, target tokens, their negative log-likelihood.

Metrics: `exact-match`, `token-f1` (mean over examples) and `perplexity` of the target tokens.

| group | share | row entries | sensitivity Δ (L2) |
|---|---|---|---|
| overlap | 1/2 | f, 1 − f, where f is the token-F1 | √2 |
| exact | 1/4 | 1 if the text matches exactly | 1 |
| tokens | 1/4 | target tokens / L, their loss / (LC) | √2 |

L is `target-length`, which no example exceeds; the loss of a token is clipped to [0, C] with C = LOSS. Rows are points
of a triangle whose longest side is √2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import LOSS, RowGroup, Vector, shares, sum_rows
from gramfuse_protocol.tasks.scores import PERPLEXITY, Sums, perplexity, share

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task


@register
class SequenceToSequence(TaskKind):
    """Generate a text for a text."""

    name = "sequence-to-sequence"
    primary = "token-f1"
    measures = {
        "exact-match": Measure("share of generated texts that match exactly"),
        "token-f1": Measure("overlap of the generated words with the expected ones"),
        "perplexity": Measure(PERPLEXITY, (1.0, math.exp(LOSS))),
    }
    summed = (
        "the numbers of held-out examples and of exact matches, and the sums of word overlaps (F1), of target tokens "
        "and of their log-likelihoods"
    )
    headless = True
    options = frozenset({"first_token"})

    def generation(self, task: Task) -> dict[str, Any]:
        """Return the generation settings of evaluation: greedy decoding."""
        return {"strategy": "greedy", "max-new-tokens": task.target_length, "first-token": task.first_token}

    def shape(self, task: Task) -> tuple[int, ...]:
        return (5,)

    def sums(self, task: Task, *facts: Any) -> Sums:
        truth, generated, tokens = facts
        return generation_sums(truth, generated, int(tokens.targets.sum()), float(tokens.loss.sum()))

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        count, exact, f1, tokens, nll = (float(value) for value in sums)
        shares = {"exact-match": share(exact, count), "token-f1": share(f1, count)}
        return shares | {"perplexity": perplexity(nll, tokens)}

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        root = math.sqrt(2)
        overlap = "the sums of each text's word overlap with its target (F1), and of 1 − F1"
        return (
            RowGroup("overlap", 2, root, 1 / 2, overlap),
            RowGroup("exact", 1, 1.0, 1 / 4, "the number of exact matches"),
            RowGroup("tokens", 2, root, 1 / 4, "the sums of the shares of target tokens and of their log-likelihoods"),
        )

    def rows(self, task: Task, *facts: Any) -> Vector:
        truth, generated, tokens = facts
        return generation_rows(task, truth, generated, tokens.targets, tokens.clipped)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        f1, rest, exact, tokens, loss = (float(value) for value in vector)
        n, length = max(1.0, f1 + rest), task.target_length
        return {"examples": n} | self.metrics(task, np.array([n, exact, f1, tokens * length, loss * length * LOSS]))


def generation_sums(truth: Sequence[str], generated: Sequence[str], tokens: int, nll: float) -> Sums:
    """Compare generated texts with their targets, as sequences of words separated by white space.

    Args:
        truth, generated: texts, one each for each example.
        tokens, nll: number of target tokens in all texts, and their negative log-likelihood (natural logarithm).
    """
    f1, exact = compared(truth, generated)
    return np.array([len(f1), exact.sum(), f1.sum(), tokens, nll], np.float64)


def compared(truth: Sequence[str], generated: Sequence[str]) -> tuple[Vector, Vector]:
    """Return the token-F1 of each pair of texts, and whether their words are the same, float64 (examples,)."""
    pairs = [(t.split(), g.split()) for t, g in zip(truth, generated, strict=True)]
    return np.array([token_f1(t, g) for t, g in pairs]), np.array([t == g for t, g in pairs], np.float64)


def token_f1(truth: Sequence[str], generated: Sequence[str]) -> float:
    """Return the F1 of two bags of words; 1 if both are empty."""
    if not truth and not generated:
        return 1.0
    return 2 * (Counter(truth) & Counter(generated)).total() / (len(truth) + len(generated))


def generation_rows(
    task: Task, truth: Sequence[str], generated: Sequence[str], tokens: NDArray[Any], losses: NDArray[Any]
) -> Vector:
    """Return the sum of the rows of generated texts.

    Args:
        truth, generated: texts, one each for each example.
        tokens: number of target tokens, shape (examples,).
        losses: negative log-likelihood of the target tokens, each token's clipped to [0, LOSS], shape (examples,).
    """
    f1, exact = compared(truth, generated)
    targets, loss = shares(task.target_length, tokens, losses / LOSS)
    return sum_rows(np.stack([f1, 1 - f1, exact, targets, loss], axis=1))
