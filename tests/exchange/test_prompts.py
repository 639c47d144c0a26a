"""Prompts and completions: what a model learns, what it is asked, and adapters of a decoder."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import Examples
from gramfuse_client.training.evaluate import outputs
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.project import Project
from gramfuse_protocol.errors import ModelError, PlanError
from tests.projects import Simulated, write_project

SILOS = ("north", "south")
ANSWERS = {"rain": "cat dog", "snow": "dog", "wind": "horse cat"}


@pytest.fixture(name="decoder")
def _decoder(pico_gpt2: Path, tmp_path: Path) -> Path:
    """A decoder whose tokenizer has a token for the end of a text."""
    place = tmp_path / "decoder"
    shutil.copytree(pico_gpt2, place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    tokenizer.eos_token = tokenizer.sep_token or "[SEP]"
    tokenizer.save_pretrained(place)
    return place


def project(directory: Path, base: Path, more: str = "") -> Path:
    rng = random.Random(7)
    silos = {}
    for name in SILOS:
        words = [[rng.choice(list(ANSWERS)) for _ in range(count)] for count in (60, 16)]
        train, held_out = ([{"text": f"the {w}", "label": ANSWERS[w]} for w in some] for some in words)
        silos[name] = ("", train, held_out)
    return write_project(
        directory / "project",
        f'[plan]\nname = "prompts"\n[model]\nbase = "{base}"\ntask = "prompt-completion"\nmax-length = 12\n'
        f"target-length = 4\n[training]\nepochs = 12\nlearning-rate = 1e-2\nbatch-size = 8\n{more}\n"
        '[privacy]\nsecure-aggregation = false\nmetrics = "silo"\n',
        silos,
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT's own use of transformers
@pytest.mark.parametrize("lora", ["", "[training.lora]\nrank = 12\nalpha = 12"], ids=["whole", "adapters"])
def test_merged_models_complete_prompts_as_their_silos_learned(
    tmp_path: Path, decoder: Path, in_process_grid: Any, lora: str
) -> None:
    more = f"freeze = []\n{lora}" if lora else ""
    here = Simulated(project(tmp_path, decoder, more), tmp_path, *(["training.epochs=24"] if lora else []))
    report = here.run(in_process_grid, simulated=here.laboratory()).document()
    assert report["unmeasured"] is None, [one for one in report["checks"] if one["verdict"] != "ok"]
    metrics = {model["name"]: model["metrics"] for model in report["models"]}
    assert metrics["regmean"]["exact-match"] == 1.0, metrics
    assert metrics["regmean"]["token-accuracy"] == 1.0
    auto = transformers.AutoModelForCausalLM
    if lora:
        loaded = PeftModel.from_pretrained(auto.from_pretrained(decoder), here.out / "adapter").eval()
    else:
        loaded = auto.from_pretrained(here.out / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    task = here.plan.task_of("north")
    prompt = Encoded(Examples(["the rain"], None, ["cat dog"]), tokenizer, task)
    (batch,) = batches(prompt, 1, torch.device("cpu"))
    assert outputs(loaded, batch, task, tokenizer).texts == ("cat dog",)


def test_a_model_learns_completions_only_and_is_asked_with_the_same_tokens(tmp_path: Path, decoder: Path) -> None:
    plan = Project.read(project(tmp_path, decoder)).plan
    base, task = load_base(plan, tmp_path), plan.task_of("north")
    long = " ".join(["rain"] * 30)
    encoded = Encoded(Examples(["the rain", long], None, ["cat dog", " ".join(["dog"] * 9)]), base.tokenizer, task)
    end = base.tokenizer.eos_token_id
    for row in encoded.rows or ():
        asked = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        learned = [label for label in row["labels"] if label != -100]
        assert row["input_ids"] == [*asked, *learned]
        assert learned[-1] == end
        assert len(asked) <= task.max_length - task.target_length
        assert len(learned) <= task.target_length
        assert end not in asked
    seen: list[list[int]] = []
    generate = base.model.generate

    def watched(**inputs: Any) -> torch.Tensor:
        seen.append(inputs["input_ids"][0].tolist())
        return generate(**inputs)

    base.model.generate = watched  # type: ignore[assignment]
    (batch,) = batches(encoded, 2, torch.device("cpu"))
    outputs(base.model, batch, task, base.tokenizer)
    assert seen == [
        [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        for row in encoded.rows or ()
    ]


def test_a_plan_without_room_for_prompts_is_refused(tmp_path: Path, decoder: Path) -> None:
    plan = Project.read(project(tmp_path, decoder)).plan
    with pytest.raises(PlanError, match="target-length"):
        plan.override(["model.target-length=12"])


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path, pico_gpt2: Path) -> None:
    with pytest.raises(ModelError, match="eos_token"):
        Project.read(project(tmp_path, pico_gpt2)).locked()
