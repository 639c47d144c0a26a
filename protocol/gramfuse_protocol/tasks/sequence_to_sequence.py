"""A text for each text.

The sums are (5,): n, exact matches, Σ token-F1, target tokens, their negative log-likelihood.

Metrics: `exact-match`, `token-f1` (mean over examples) and `perplexity` of the target tokens.

| group | share | entries of a row | sensitivity Δ (L2) |
|---|---|---|---|
| overlap | 1/2 | f, 1 − f, f being the token-F1 | √2 |
| exact | 1/4 | 1 if the text is exactly right | 1 |
| tokens | 1/4 | target tokens / L, their loss / (LC) | √2 |

L is `target-length`, which no example exceeds; the loss of a token is clipped to [0, C], C = LOSS. Rows are points of a
triangle whose longest side is √2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import LOSS, RowGroup, Vector, added, shares
from gramfuse_protocol.tasks.scores import PERPLEXITY, Sums, perplexity, share

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task


@register
class SequenceToSequence(TaskKind):
    """A text for a text."""

    name = "sequence-to-sequence"
    primary = "token-f1"
    measures = {
        "exact-match": Measure("share of texts that are exactly right"),
        "token-f1": Measure("overlap of the words generated with those expected"),
        "perplexity": Measure(PERPLEXITY, (1.0, math.exp(LOSS))),
    }
    summed = (
        "how many held-out examples there are, how many targets were met, and three sums over all: of words in common, "
        "target tokens, and their log-likelihood"
    )
    headless = True
    options = frozenset({"first_token"})

    def generation(self, task: Task) -> dict[str, Any]:
        """Return how texts are generated when models are measured."""
        return {"strategy": "greedy", "max-new-tokens": task.target_length, "first-token": task.first_token}

    def shape(self, task: Task) -> tuple[int, ...]:
        return (5,)

    def sums(self, task: Task, *facts: Any) -> Sums:
        truth, generated, tokens = facts
        return generation_sums(truth, generated, int(tokens.said.sum()), float(tokens.loss.sum()))

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        count, exact, f1, tokens, nll = (float(value) for value in sums)
        shares = {"exact-match": share(exact, count), "token-f1": share(f1, count)}
        return shares | {"perplexity": perplexity(nll, tokens)}

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        root = math.sqrt(2)
        overlap = "words in common with the target, and those that are not, as shares added up"
        return (
            RowGroup("overlap", 2, root, 1 / 2, overlap),
            RowGroup("exact", 1, 1.0, 1 / 4, "how many targets were met"),
            RowGroup("tokens", 2, root, 1 / 4, "target tokens and their log-likelihood, as shares added up"),
        )

    def rows(self, task: Task, *facts: Any) -> Vector:
        truth, generated, tokens = facts
        return generation_rows(task, truth, generated, tokens.said, tokens.clipped)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        f1, rest, exact, tokens, loss = (float(value) for value in vector)
        n, long = max(1.0, f1 + rest), task.target_length
        return {"examples": n} | self.metrics(task, np.array([n, exact, f1, tokens * long, loss * long * LOSS]))


def generation_sums(truth: Sequence[str], generated: Sequence[str], tokens: int, nll: float) -> Sums:
    """Compare texts as sequences of words, which white space separates.

    Args:
        truth, generated: texts, equally many.
        tokens, nll: target tokens of all texts, and the model's negative log-likelihood of them (natural logarithm).
    """
    pairs = [(t.split(), g.split()) for t, g in zip(truth, generated, strict=True)]
    exact = sum(t == g for t, g in pairs)
    return np.array([len(pairs), exact, sum(token_f1(t, g) for t, g in pairs), tokens, nll], np.float64)


def token_f1(truth: Sequence[str], generated: Sequence[str]) -> float:
    """Return the F1 of two bags of words; of two empty ones it is 1."""
    if not truth and not generated:
        return 1.0
    return 2 * (Counter(truth) & Counter(generated)).total() / (len(truth) + len(generated))


def generation_rows(
    task: Task, truth: Sequence[str], generated: Sequence[str], tokens: NDArray[Any], losses: NDArray[Any]
) -> Vector:
    """Return the sum of the rows of generated texts.

    Args:
        truth, generated: texts, equally many.
        tokens: how many target tokens each has.
        losses: the negative log-likelihood of each one's target tokens, every token's clipped to [0, LOSS].
    """
    pairs = [(t.split(), g.split()) for t, g in zip(truth, generated, strict=True)]
    f1 = np.array([token_f1(t, g) for t, g in pairs])
    exact = np.array([t == g for t, g in pairs], np.float64)
    said, lost = shares(task.target_length, tokens, losses / LOSS)
    return added(np.stack([f1, 1 - f1, exact, said, lost], axis=1))
