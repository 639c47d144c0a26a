"""Models that answer are measured by settings of gramfuse's own, and the report says them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import Examples
from gramfuse_client.training.evaluate import outputs
from gramfuse_model.project import Project
from gramfuse_protocol.errors import ModelError
from tests.projects import Simulated, write_project

SILOS = ("north", "south")
FORCING = {
    "min_length": 12,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 7,
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 50.0,
    "num_beams": 3,
    "suppress_tokens": [10, 11, 12, 13, 14, 15, 16, 17],
    "begin_suppress_tokens": [18, 19, 20],
}
"""What some published model says of generation, for the task that it was made for."""


def project(directory: Path, tokenizer: Any, settings: dict[str, Any], more: str = "") -> Path:
    """Silos whose texts all have one answer, which a model soon knows by heart."""
    base = directory / "base"
    torch.manual_seed(14)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=3,
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config.update(**settings)
    model.save_pretrained(base)
    if settings:
        path = base / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    tokenizer.save_pretrained(base)
    rng = random.Random(5)
    words = ["rain", "snow", "wind"]
    silos = {}
    for name in SILOS:
        train, held_out = ([{"text": rng.choice(words), "label": "cat dog cat"} for _ in range(n)] for n in (48, 16))
        silos[name] = ("", train, held_out)
    return write_project(
        directory,
        f'[plan]\nname = "answers"\n[model]\nbase = "{base}"\ntask = "sequence-to-sequence"\nmax-length = 8\n'
        f"target-length = 6\n{more}\n[training]\nepochs = 12\nlearning-rate = 1e-2\nbatch-size = 8\n"
        '[privacy]\nsecure-aggregation = false\nmetrics = "silo"\n',
        silos,
    )


def run(directory: Path, place: Path, grid: Any) -> dict[str, Any]:
    here = Simulated(directory, place)
    report = here.run(grid, simulated=here.laboratory()).document()
    assert report["unmeasured"] is None
    return report


@pytest.mark.parametrize("settings", [{}, FORCING], ids=["none", "those of another task"])
def test_a_model_that_knows_the_answer_is_right_whatever_its_base_says_of_generation(
    tmp_path: Path, pico_tokenizer: Any, in_process_grid: Any, settings: dict[str, Any]
) -> None:
    directory = project(tmp_path, pico_tokenizer, settings)
    report = run(directory, tmp_path, in_process_grid)
    for model in report["models"]:
        if model["name"] != "simple":
            assert (model["metrics"]["exact-match"], model["metrics"]["token-f1"]) == (1.0, 1.0), model["name"]
    assert report["generation"] == {"": {"strategy": "greedy", "max-new-tokens": 6, "first-token": None}}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["generation"] == report["generation"]
    assert "at most 6 tokens" in (tmp_path / "run" / "report.html").read_text()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "at most 6 tokens" in card
    written = transformers.GenerationConfig.from_pretrained(tmp_path / "run" / "model").to_dict()
    assert {key: written[key] for key in settings} == settings, "the files keep what the base says"


def test_a_plan_may_ask_for_the_token_that_texts_begin_with(
    tmp_path: Path, pico_tokenizer: Any, in_process_grid: Any
) -> None:
    directory = project(tmp_path, pico_tokenizer, {}, 'first-token = "horse"')
    report = run(directory, tmp_path, in_process_grid)
    metrics = {model["name"]: model["metrics"] for model in report["models"]}["regmean"]
    assert metrics["exact-match"] == 0.0
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "model").eval()
    task = Project.read(directory).plan.task_of("north")
    encoded = Encoded(Examples(["rain", "snow"], None, ["cat", "cat"]), pico_tokenizer, task)
    (batch,) = batches(encoded, 2, torch.device("cpu"))
    said = outputs(model, batch, task, pico_tokenizer).texts
    assert all(text.startswith("horse") for text in said)
    assert report["generation"][""]["first-token"] == "horse"
    assert "beginning with" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_first_token_that_the_tokenizer_does_not_know_is_refused_before_a_plan_is_locked(
    tmp_path: Path, pico_tokenizer: Any
) -> None:
    with pytest.raises(ModelError, match="'de_DE' is not in the vocabulary"):
        Project.read(project(tmp_path, pico_tokenizer, {}, 'first-token = "de_DE"')).locked()
