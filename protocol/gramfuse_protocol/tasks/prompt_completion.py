"""Prompt and completion: a causal language model continues a text.

The sums are (6,): n, exact matches, Σ token-F1, tokens of the completions, their negative log-likelihood, correctly
predicted ones.

Metrics: `exact-match` and `token-f1` of the generated completions, `perplexity` and `token-accuracy` of the expected
ones.

| group | share | row entries | sensitivity Δ (L2) |
|---|---|---|---|
| overlap | 2/5 | f, 1 − f, where f is the token-F1 | √2 |
| exact | 1/5 | 1 if the text matches exactly | 1 |
| tokens | 1/5 | tokens predicted correctly / L, wrongly / L | √2 |
| loss | 1/5 | loss of the tokens / (LC) | 1 |

L is `target-length`, which no completion exceeds; the loss of a token is clipped to [0, C] with C = LOSS. Rows are
points of a triangle whose longest side is √2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gramfuse_protocol.tasks.causal_lm import CausalLM
from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import LOSS, RowGroup, Vector, shares, sum_rows
from gramfuse_protocol.tasks.scores import PERPLEXITY, Sums, perplexity, share
from gramfuse_protocol.tasks.sequence_to_sequence import compared, generation_sums

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task


@register
class PromptCompletion(TaskKind):
    """Continue a prompt."""

    name = "prompt-completion"
    primary = "token-f1"
    measures = {
        "exact-match": Measure("share of generated completions that match exactly"),
        "token-f1": Measure("overlap of the generated words with the expected ones"),
        "perplexity": Measure(PERPLEXITY, (1.0, math.exp(LOSS))),
        "token-accuracy": CausalLM.measures["token-accuracy"],
    }
    summed = (
        "the numbers of held-out examples and of exact matches, and the sums of word overlaps (F1), of the tokens of "
        "completions, of those predicted correctly, and of their log-likelihoods"
    )
    headless = True

    def check(self, task: Task) -> None:
        if task.target_length >= task.max_length:
            raise ValueError(
                f"'target-length' is {task.target_length}, so that 'max-length' ({task.max_length}), which counts "
                "prompt and completion together, leaves no room for a prompt"
            )

    def generation(self, task: Task) -> dict[str, Any]:
        return {"strategy": "greedy", "max-new-tokens": task.target_length, "first-token": None}

    def shape(self, task: Task) -> tuple[int, ...]:
        return (6,)

    def sums(self, task: Task, *facts: Any) -> Sums:
        truth, generated, tokens = facts
        five = generation_sums(truth, generated, int(tokens.targets.sum()), float(tokens.loss.sum()))
        return np.append(five, float(tokens.correct.sum()))

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        count, exact, f1, tokens, nll, correct = (float(value) for value in sums)
        return {
            "exact-match": share(exact, count),
            "token-f1": share(f1, count),
            "perplexity": perplexity(nll, tokens),
            "token-accuracy": share(correct, max(tokens, 1.0)),
        }

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        root = math.sqrt(2)
        overlap = "the sums of each completion's word overlap with the expected one (F1), and of 1 − F1"
        tokens = "the sums of the shares of tokens predicted correctly and wrongly"
        return (
            RowGroup("overlap", 2, root, 2 / 5, overlap),
            RowGroup("exact", 1, 1.0, 1 / 5, "the number of exact matches"),
            RowGroup("tokens", 2, root, 1 / 5, tokens),
            RowGroup("loss", 1, 1.0, 1 / 5, "the sum of the tokens' clipped log-likelihoods"),
        )

    def rows(self, task: Task, *facts: Any) -> Vector:
        truth, generated, tokens = facts
        f1, exact = compared(truth, generated)
        hits, misses, loss = shares(
            task.target_length,
            tokens.correct,
            tokens.targets - tokens.correct,
            tokens.clipped / LOSS,
            lengths=tokens.targets,
        )
        return sum_rows(np.stack([f1, 1 - f1, exact, hits, misses, loss], axis=1))

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        f1, rest, exact, correct, wrong, loss = (float(value) for value in vector)
        n, length = max(1.0, f1 + rest), task.target_length
        sums = np.array([n, exact, f1, (correct + wrong) * length, loss * length * LOSS, correct * length])
        return {"examples": n} | self.metrics(task, sums)
