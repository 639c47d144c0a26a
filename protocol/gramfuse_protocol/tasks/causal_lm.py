"""The next token, everywhere in a text.

The sums are (4,): n, predicted tokens, their negative log-likelihood, tokens predicted right.

Metrics: `perplexity` and `token-accuracy`.

| group | share | entries of a row | sensitivity Δ (L2) |
|---|---|---|---|
| examples | 1/10 | 1 | 1 |
| tokens | 1/2 | tokens predicted right / L, wrong / L | √2 |
| loss | 2/5 | loss of the tokens / (LC) | 1 |

L is `max-length`, which no example exceeds; the loss of a token is clipped to [0, C], C = LOSS. Rows are points of a
triangle whose longest side is √2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import EXAMPLES, LOSS, RowGroup, Vector, added, shares
from gramfuse_protocol.tasks.scores import PERPLEXITY, Sums, perplexity, share

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task


@register
class CausalLM(TaskKind):
    """The next token."""

    name = "causal-lm"
    primary = "token-accuracy"
    measures = {
        "perplexity": Measure(PERPLEXITY, (1.0, math.exp(LOSS))),
        "token-accuracy": Measure("share of next tokens that are right"),
    }
    summed = (
        "how many held-out texts and tokens there are, how many tokens were predicted rightly, and the sum of their "
        "log-likelihoods"
    )
    headless = True

    def shape(self, task: Task) -> tuple[int, ...]:
        return (4,)

    def sums(self, task: Task, *facts: Any) -> Sums:
        (tokens,) = facts
        totals = int(tokens.said.sum()), float(tokens.loss.sum()), int(tokens.right.sum())
        return language_sums(len(tokens.said), *totals)

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        _, tokens, nll, correct = (float(value) for value in sums)
        return {"perplexity": perplexity(nll, tokens), "token-accuracy": share(correct, max(tokens, 1.0))}

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        tokens = "tokens predicted rightly and wrongly, as shares added up"
        loss = "log-likelihood of the tokens, each one's clipped, added up"
        return EXAMPLES, RowGroup("tokens", 2, math.sqrt(2), 1 / 2, tokens), RowGroup("loss", 1, 1.0, 2 / 5, loss)

    def rows(self, task: Task, *facts: Any) -> Vector:
        (tokens,) = facts
        return language_rows(task, tokens.said, tokens.clipped, tokens.right)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        n, right, wrong, loss = (float(value) for value in vector)
        n, long = max(1.0, n), task.max_length
        sums = np.array([n, (right + wrong) * long, loss * long * LOSS, right * long])
        return {"examples": n} | self.metrics(task, sums)


def language_sums(n: int, tokens: int, nll: float, correct: int) -> Sums:
    """Put together what a causal language model did on n texts.

    Args:
        tokens: those that were to be predicted: all but the first of each text.
        nll: their negative log-likelihood (natural logarithm).
        correct: how many had the highest probability.
    """
    return np.array([n, tokens, nll, correct], np.float64)


def language_rows(task: Task, tokens: NDArray[Any], losses: NDArray[Any], right: NDArray[Any]) -> Vector:
    """Return the sum of the rows of texts whose tokens were predicted one after the other.

    Args:
        tokens, losses: as `generation_rows` has them.
        right: how many tokens of each were predicted right.
    """
    hits, misses, lost = shares(task.max_length, right, tokens - right, losses / LOSS, of=tokens)
    return added(np.stack([np.ones(len(tokens)), hits, misses, lost], axis=1))
