"""Causal language modelling: predict the next token at every position of a text.

The sums are (4,): n, predicted tokens, their negative log-likelihood, correctly predicted tokens.

Metrics: `perplexity` and `token-accuracy`.

| group | share | row entries | sensitivity Δ (L2) |
|---|---|---|---|
| examples | 1/10 | 1 | 1 |
| tokens | 1/2 | tokens predicted correctly / L, wrongly / L | √2 |
| loss | 2/5 | loss of the tokens / (LC) | 1 |

L is `max-length`, which no example exceeds; the loss of a token is clipped to [0, C] with C = LOSS. Rows are points of
a triangle whose longest side is √2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import EXAMPLES, LOSS, RowGroup, Vector, shares, sum_rows
from gramfuse_protocol.tasks.scores import PERPLEXITY, Sums, perplexity, share

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task


@register
class CausalLM(TaskKind):
    """Predict the next token."""

    name = "causal-lm"
    primary = "token-accuracy"
    measures = {
        "perplexity": Measure(PERPLEXITY, (1.0, math.exp(LOSS))),
        "token-accuracy": Measure("share of next tokens that are predicted correctly"),
    }
    summed = (
        "the numbers of held-out texts, of tokens and of correctly predicted tokens, and the sum of the tokens' "
        "log-likelihoods"
    )
    headless = True

    def shape(self, task: Task) -> tuple[int, ...]:
        return (4,)

    def sums(self, task: Task, *facts: Any) -> Sums:
        (tokens,) = facts
        totals = int(tokens.targets.sum()), float(tokens.loss.sum()), int(tokens.correct.sum())
        return language_sums(len(tokens.targets), *totals)

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        _, tokens, nll, correct = (float(value) for value in sums)
        return {"perplexity": perplexity(nll, tokens), "token-accuracy": share(correct, max(tokens, 1.0))}

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        tokens = "the sums of the shares of tokens predicted correctly and wrongly"
        loss = "the sum of the tokens' clipped log-likelihoods"
        return EXAMPLES, RowGroup("tokens", 2, math.sqrt(2), 1 / 2, tokens), RowGroup("loss", 1, 1.0, 2 / 5, loss)

    def rows(self, task: Task, *facts: Any) -> Vector:
        (tokens,) = facts
        return language_rows(task, tokens.targets, tokens.clipped, tokens.correct)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        n, correct, wrong, loss = (float(value) for value in vector)
        n, length = max(1.0, n), task.max_length
        sums = np.array([n, (correct + wrong) * length, loss * length * LOSS, correct * length])
        return {"examples": n} | self.metrics(task, sums)


def language_sums(n: int, tokens: int, nll: float, correct: int) -> Sums:
    """Return the sums of a causal language model on n texts, float64 (4,).

    Args:
        tokens: number of tokens to predict: all but the first of each text.
        nll: their negative log-likelihood (natural logarithm).
        correct: how many of them were the model's most likely token.
    """
    return np.array([n, tokens, nll, correct], np.float64)


def language_rows(task: Task, tokens: NDArray[Any], losses: NDArray[Any], correct: NDArray[Any]) -> Vector:
    """Return the sum of the rows of causal language model examples.

    Args:
        tokens, losses: see `generation_rows`.
        correct: number of correctly predicted tokens of each example, shape (examples,).
    """
    hits, misses, loss = shares(task.max_length, correct, tokens - correct, losses / LOSS, lengths=tokens)
    return sum_rows(np.stack([np.ones(len(tokens)), hits, misses, loss], axis=1))
