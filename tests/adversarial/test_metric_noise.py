"""A coordinator that reads single held-out records out of the sum of metrics.

What it does: it has two models measured that say the same of all examples but for one, which it suspects to be there,
with a label that it would like to know. Without noise, the difference of two sums is that record. It knows all other
records, the model and the noise's distribution; what it gets is one sum, and so it guesses by the likelihood ratio,
better than which no guess can be.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from gramfuse_client.data.examples import load
from gramfuse_client.exchange.local_model import Workbench
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.held_out.noise import DELTA, noisy_words, variances
from gramfuse_protocol.held_out.sums import Vector, size
from gramfuse_protocol.secure_sum.fixed_point import decode
from gramfuse_protocol.secure_sum.scales import METRICS_SCALE
from gramfuse_protocol.tasks.classification import class_rows
from tests.adversarial.liar import METRICS, Liar
from tests.answers import sure

GAMES = 1500
"""Sums that it gets in each of the two worlds."""
CONFIDENCE = 0.999

SILOS = ("a", "b", "c", "d")
VICTIM = "a"


def plan(epsilon: str = "2.0") -> Plan:
    """Four silos; one may drop out, one may be the coordinator's. Three labels."""
    roster = "".join(f'[[silo]]\nname = "{name}"\n' for name in SILOS)
    return Plan.parse(
        '[plan]\nname = "p"\n[model]\nbase = "b"\ntask = "classification"\nlabels = ["healthy", "ill", "unknown"]\n'
        f"[privacy]\nmetrics-epsilon = {epsilon}\n{roster}"
    )


class Won(NamedTuple):
    """How often it said "the record is there": where it was, and where it was not, out of GAMES each."""

    hits: int
    alarms: int

    @property
    def right(self) -> float:
        return (self.hits + GAMES - self.alarms) / (2 * GAMES)


class Game:
    """The victim has a record that a crafted model is right about, or has one that it confuses, as the label decides.

    Args:
        terms: the plan.
        survivors: whose words are in the sum.
        colluding: silos that tell the coordinator their words, with their noise.
    """

    def __init__(self, terms: Plan, survivors: tuple[str, ...], colluding: tuple[str, ...] = ()) -> None:
        self.plan = terms
        self.task = terms.task_of(VICTIM)
        self.honest = [name for name in survivors if name not in colluding]
        self.worlds = [self._others() + self._record(label) for label in (0, 1)]
        self.random = random.Random(11).randbytes
        each = np.array(variances(terms, self.task), np.float64)
        self.spread = np.sqrt(len(self.honest) * each) / METRICS_SCALE

    def _others(self) -> Vector:
        truth = np.arange(60) % 3
        return class_rows(self.task, sure(truth, (truth + (np.arange(60) % 5 == 0)) % 3))

    def _record(self, label: int) -> Vector:
        return class_rows(self.task, sure([label], [0 if label == 0 else 2]))

    def sum_of(self, world: int) -> Vector:
        """What the coordinator has when masks are off, and its own silos' words are taken out."""
        total = np.zeros(size(self.task), np.uint64)
        for name in self.honest:
            vector = self.worlds[world] if name == VICTIM else self._others()
            total += noisy_words(self.plan, self.task, vector, self.random)
        return decode(total, METRICS_SCALE)

    def without_the_others(self, world: int) -> Vector:
        """The same, less what the other silos counted, which it knows."""
        return self.sum_of(world) - (len(self.honest) - 1) * self._others()

    def evidence(self, world: int) -> float:
        """The logarithm of the likelihood ratio of the two worlds."""
        left = self.without_the_others(world)
        far = [float((((left - of) / self.spread) ** 2).sum()) for of in self.worlds]
        return (far[0] - far[1]) / 2

    def play(self) -> list[list[float]]:
        return [[self.evidence(world) for _ in range(GAMES)] for world in (0, 1)]


def epsilon_at_least(won: Won) -> float:
    """What ε must at least be for a guess to win so often: by the bounds of Clopper and Pearson."""
    hits = stats.beta.ppf(1 - CONFIDENCE, won.hits, GAMES - won.hits + 1) if won.hits else 0.0
    alarms = stats.beta.ppf(CONFIDENCE, won.alarms + 1, GAMES - won.alarms) if won.alarms < GAMES else 1.0
    return math.log((hits - DELTA) / alarms) if hits > DELTA else 0.0


@pytest.mark.parametrize(
    ("survivors", "colluding"),
    [(SILOS, ()), (SILOS[:3], ("c",))],
    ids=["all there", "one dropped out, one colludes"],
)
def test_its_best_guess_is_right_no_more_often_than_epsilon_allows(
    survivors: tuple[str, ...], colluding: tuple[str, ...]
) -> None:
    without, with_it = Game(plan(), survivors, colluding).play()
    for threshold in np.quantile([*without, *with_it], [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98]):
        said = [sum(evidence > threshold for evidence in world) for world in (without, with_it)]
        won = Won(hits=said[1], alarms=said[0])
        assert epsilon_at_least(won) <= 2.0
        other_way = Won(hits=GAMES - won.alarms, alarms=GAMES - won.hits)
        assert epsilon_at_least(other_way) <= 2.0
        assert won.right <= math.exp(2) / (1 + math.exp(2))
    even = Won(sum(evidence > 0 for evidence in with_it), sum(evidence > 0 for evidence in without))
    if len(survivors) - len(colluding) == 2:
        # The least noise that the plan allows: z is used up to an eighth, as this record moves so many counts.
        assert even.right == pytest.approx(stats.norm.cdf(math.sqrt(0.875) / (2 * 1.9938)), abs=0.035)
    assert even.right < 0.66


def test_without_noise_it_reads_the_record() -> None:
    game = Game(plan('"none"'), SILOS[:3], ("c",))
    for world in (0, 1):
        assert game.without_the_others(world).tolist() == game.worlds[world].tolist()


def test_a_plan_without_noise_is_joined_only_by_whom_that_does_not_trouble(liar: Callable[..., Liar]) -> None:
    """It writes a plan with metrics-epsilon = "none", has it approved by a silo that did not look, and invites it."""
    quiet = ('privacy.metrics-epsilon="none"',)
    refused = liar(*quiet, silos=3)
    reply = refused.join("silo-a", refused.about())
    assert (reply.error, "without noise" in reply.reason) == ("RefusalError", True)
    willing = liar(*quiet, silos=3, name="willing", exact_metrics=True)
    assert not hasattr(willing.join("silo-a", willing.about()), "error")


def test_what_it_gets_of_two_crafted_models_is_noise_and_the_same_noise_again(liar: Callable[..., Liar]) -> None:
    """It sends a model that finds one label everywhere, and one that finds another, and subtracts."""
    lied = liar(silos=3)
    about = lied.about()
    lied.contribute(about)
    for candidate, model in zip(lied.plan.privacy.candidates, (lied.zero(), lied.filled(0.01)), strict=True):
        for name in lied.names:
            lied.measure(name, about, model, candidate)
    lied.honest(METRICS, about)
    for name in lied.names:
        kept = lied.state(name).measurements.of(1)
        first, second = (np.array(kept[of].words, np.uint64) for of in lied.plan.privacy.candidates)
        difference = decode(first - second, METRICS_SCALE)
        assert (np.abs(difference - np.rint(difference)) > 1e-4).any(), "counts alone would be whole numbers"
        again = lied.measure(name, about, lied.zero(), lied.plan.privacy.candidates[0])
        assert not again.arrays
        assert lied.state(name).measurements.of(1) == kept


def test_a_model_that_remembers_texts_says_of_one_what_it_would_say_without_the_others(
    liar: Callable[..., Liar], tmp_path: Path, pico_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base whose rotary embedding keeps the longest text so far would have one record move what is said of all."""
    monkeypatch.setattr(
        "gramfuse_model.probing.lengths.check_lengths", lambda *_, **__: None
    )  # which refuses such a base
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(pico_tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2,
        pad_token_id=pico_tokenizer.pad_token_id,
        rope_parameters={"rope_type": "dynamic", "factor": 1.0, "rope_theta": 1.0},
    )
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection, factor in (("q", 60), ("k", 60), ("v", 20), ("o", 20)):
                getattr(layer.self_attn, f"{projection}_proj").weight *= factor
    model.save_pretrained(tmp_path / "llama")
    pico_tokenizer.save_pretrained(tmp_path / "llama")
    lied = liar(
        base=tmp_path / "llama",
        silos=3,
        change=lambda project: project.replace(project.plan, "*embeddings*", "embeddings"),
    )
    task, silo = lied.plan.task_of("silo-a"), lied.silo("silo-a")
    path = lied.project.train("silo-a").with_name("held-out.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    words = rows[0]["text"].split()
    found = []
    for first in (words[:2], (words * 14)[:14]):
        texts = [{**row, "text": " ".join(row["text"].split()[:4])} for row in rows[1:]]
        path.write_text("".join(json.dumps(row) + "\n" for row in ({**rows[0], "text": " ".join(first)}, *texts)))
        _, held_out = load(silo, task)
        found.append(Workbench(silo, lied.plan).evaluate(lied.layout, lied.zero(), lied.state("silo-a"), held_out))
    outcome, labels = (found[0] - found[1])[:2], (found[0] - found[1])[2:]
    assert np.linalg.norm(outcome) <= 2**0.5 + 1e-9
    assert np.linalg.norm(labels) <= 2 + 1e-9
