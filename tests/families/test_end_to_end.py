"""Every family and every task from fine-tuning at three silos to a merged model that loads in a fresh process."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import Examples
from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_client.training.evaluate import evaluate
from gramfuse_client.training.finetune import finetune
from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.loading.auto_classes import FORMS
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.parameters import trainable
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.held_out.metrics import metrics, primary
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_server.report.merged_model import write_model

CPU = torch.device("cpu")
TOPICS = (
    ["cat", "dog", "horse", "sheep", "goat", "duck"],
    ["rain", "snow", "wind", "sun", "storm", "cloud"],
    ["pan", "pot", "knife", "spoon", "oven", "plate"],
)
FILLERS = ["the", "a", "of", "and"]
LABELS = 'labels = ["animals", "weather", "kitchen"]'
TAGS = 'labels = ["O", "B-animal", "I-animal", "B-weather", "I-weather", "B-kitchen", "I-kitchen"]'
SILOS = ("north", "east", "west")
ROSTER = "".join(f'\n[[silo]]\nname = "{silo}"' for silo in SILOS)
EXAMPLES = 80


@dataclass(frozen=True)
class Case:
    """What a family is fine-tuned for, and how."""

    family: str
    task: str
    rate: float = 5e-3
    pair: bool = False

    @property
    def toml(self) -> str:
        labels = {"token-classification": TAGS, "multi-label": LABELS, "classification": LABELS}
        labels["image-classification"] = LABELS
        return f'task = "{self.task}"\npair = {str(self.pair).lower()}\n{labels.get(self.task, "")}'

    def __str__(self) -> str:
        return f"{self.family}-{self.task}{'-of-pairs' if self.pair else ''}"


ENCODERS = ("bert", "distilbert", "roberta", "deberta-v2", "deberta-v3", "electra", "albert")
CASES = [
    *(Case(family, "classification") for family in (*ENCODERS, "gpt2", "llama")),
    Case("bert", "classification", pair=True),
    Case("bert", "regression"),
    Case("bert", "multi-label"),
    Case("bert", "token-classification"),
    Case("longformer", "classification"),
    Case("xlnet", "classification"),
    Case("t5", "sequence-to-sequence"),
    Case("t5-gated", "sequence-to-sequence"),
    Case("gpt2", "causal-lm"),
    Case("llama", "causal-lm", rate=1e-2),
    Case("llama-tied", "causal-lm", rate=1e-2),
    Case("mixtral", "causal-lm", rate=1e-2),
    Case("vit", "image-classification"),
]


def examples(task: str, count: int, seed: int, silo: int, pair: bool = False) -> Examples:
    """A silo's examples of three topics.

    All silos have the same topics, but each knows only two words of each topic, or one kind of picture, and nothing
    tells it where the others belong. So it can be right about its own third of what all silos hold out, and has to
    guess at the rest.
    """
    rng = random.Random(seed)
    inputs: list[Any] = []
    pairs: list[str] = []
    labels: list[Any] = []
    for _ in range(count):
        topic = rng.randrange(3)
        known = TOPICS[topic][2 * silo : 2 * silo + 2]
        words = [*rng.choices(known, k=3), *rng.choices(FILLERS, k=rng.randint(0, 2))]
        rng.shuffle(words)
        if pair:  # of one topic, and the second text has the only word that says which
            words, second = rng.choices(FILLERS, k=3), words
            pairs.append(" ".join(second))
        match task:
            case "image-classification":
                inputs.append(picture(topic, silo, rng))
                labels.append(topic)
            case "causal-lm":  # after a word of a topic comes the other one that the silo knows
                first = rng.randrange(2)
                inputs.append(" ".join(known[(first + n) % 2] for n in range(5)))
                labels.append(None)
            case "token-classification":
                inputs.append(tuple(words))
                labels.append([1 + 2 * topic if word in known else 0 for word in words])
            case "multi-label":  # a second topic comes in half of the texts
                other = rng.randrange(3)
                inputs.append(" ".join([*words, *rng.choices(TOPICS[other][2 * silo : 2 * silo + 2], k=3)]))
                labels.append(tuple(sorted({topic, other})))
            case "regression":
                inputs.append(" ".join(words))
                labels.append(float(topic))
            case "sequence-to-sequence":
                inputs.append(" ".join(words))
                labels.append(TOPICS[topic][0])
            case _:
                inputs.append(" ".join(words))
                labels.append(topic)
    return Examples(inputs, pairs or None, labels)


def picture(topic: int, kind: int, rng: random.Random) -> bytes:
    """A noisy picture of one of three kinds that a topic has, as PNG."""
    pattern = np.random.default_rng([topic, kind]).integers(0, 256, (8, 8, 3))
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (8, 8, 3))
    file = io.BytesIO()
    Image.fromarray((0.6 * pattern + 0.4 * noise).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def held_out(task: Task) -> Examples:
    """Examples of all silos, as many of each."""
    parts = [examples(task.task, 40, 100 + silo, silo, task.pair) for silo in range(len(SILOS))]
    pairs = [pair for part in parts for pair in part.pairs or ()]
    return Examples(
        [i for part in parts for i in part.inputs], pairs or None, [label for part in parts for label in part.labels]
    )


def measure(model: Any, tokenizer: Any, task: Task) -> dict[str, float]:
    encoded = Encoded(held_out(task), tokenizer, task)
    return metrics(task, evaluate(model, batches(encoded, 64, CPU, by_length=True), task, tokenizer))


@dataclass(frozen=True)
class Outcome:
    """What came out of a merge: the written model, and held-out results by model's name."""

    directory: Path
    task: Task
    found: dict[str, dict[str, float]]


def merge(case: Case, directory: Path, out: Path) -> Outcome:
    plan = Plan.parse(
        f"""
        [plan]
        name = "families"
        [model]
        base = "{directory}"
        {case.toml}
        max-length = 16
        target-length = 4
        [training]
        epochs = 6
        learning-rate = {case.rate}
        batch-size = 8
        [merge]
        alpha = 0.9
        [privacy]
        secure-aggregation = false
        {ROSTER}
        """
    )
    task = plan.task_of(SILOS[0])
    layout = plan_layout(plan, load_base(plan, Path()))
    accumulator = Accumulator(layout, alpha=plan.merge.alpha)
    found = {}
    for number, silo in enumerate(plan.names):
        base = load_base(plan, Path(), silo=silo)
        before = trainable(base.model)
        train = examples(case.task, EXAMPLES, number, number, case.pair)
        encoded = Encoded(train, base.tokenizer, task)
        finetune(base.model, encoded, plan.training, CPU)
        found[silo] = measure(base.model, base.tokenizer, task)
        statistics = collect_statistics(
            base.model, batches(encoded, 8, CPU), layout, base=before, examples=len(train), limit=plan.merge.tokens
        )
        accumulator.fold(statistics, silo)
    merged = accumulator.merge()
    assert {step.outcome for step in merged.steps} <= {"clean", "jitter"}
    base = load_base(plan, Path())
    write_model(out, base, merged.deltas, plan, plan.names, None)
    found["merged"] = measure(base.model, base.tokenizer, task)
    return Outcome(out / "model", task, found)


@pytest.fixture(scope="module")
def outcome(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Outcome]:
    """Return a function that merges a case once."""
    made: dict[Case, Outcome] = {}

    def find(case: Case) -> Outcome:
        if case not in made:
            torch.set_num_threads(1)
            made[case] = merge(case, pico(case.family), tmp_path_factory.mktemp("merged"))
        return made[case]

    return find


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_merged_model_is_better_than_that_of_every_silo(outcome: Callable[[Case], Outcome], case: Case) -> None:
    made = outcome(case)
    scores = {name: found[primary(made.task.task)] for name, found in made.found.items()}
    merged = scores.pop("merged")
    assert merged > max(scores.values()) + 0.01, scores


def test_every_merged_model_loads_in_a_fresh_process_and_gives_the_same_metrics(
    outcome: Callable[[Case], Outcome],
) -> None:
    made = [outcome(case) for case in CASES]
    written = [[str(one.directory), one.task.model_dump(mode="json", by_alias=True)] for one in made]
    run = subprocess.run([sys.executable, __file__, json.dumps(written)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for case, one, found in zip(CASES, made, json.loads(run.stdout), strict=True):
        assert found == pytest.approx(one.found["merged"], rel=1e-9), case


def main(written: list[Any]) -> None:
    """Load models as anybody would, and print their metrics as JSON."""
    import transformers

    torch.set_num_threads(1)
    found = []
    for directory, document in written:
        task = Task.model_validate_json(json.dumps(document))
        auto = getattr(transformers, FORMS[task.task].auto)
        model, loading = auto.from_pretrained(directory, output_loading_info=True)
        assert not any(loading.values()), f"{directory}: {loading}"
        processor = transformers.AutoImageProcessor if "image" in task.task else transformers.AutoTokenizer
        found.append(measure(model, processor.from_pretrained(directory), task))
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
