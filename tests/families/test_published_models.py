"""Models of every kind of task through `gramfuse measure` and `gramfuse merge`; their configuration says which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file

from gramfuse_cli.main import cli
from tests.commands import gramfuse

TAGS = ["O", "B-ANIMAL", "I-ANIMAL"]
SHORT = ("--max-length", 16)
TEXTS = [
    "the cat and dog",
    "a small horse near my goat",
    "rain of the old storm",
    "snow with wind",
    "my pan",
    "a plate",
]


def publish(directory: Path, base: Path, auto: str, seed: int, **settings: Any) -> Path:
    """A model as fine-tuning leaves it: all of its weights moved a little, its head anything."""
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_pretrained(base, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(directory)
    processor = transformers.AutoImageProcessor if "Image" in auto else transformers.AutoTokenizer
    processor.from_pretrained(base).save_pretrained(directory)
    return directory


def data_of(task: str, directory: Path) -> Path:
    rows: list[dict[str, Any]]
    match task:
        case "token-classification":
            rows = [{"text": t.split(), "label": ["B-ANIMAL", *["O"] * (len(t.split()) - 1)]} for t in TEXTS]
        case "sequence-to-sequence":
            rows = [{"text": text, "label": "cat"} for text in TEXTS]
        case "image-classification":
            for n in range(6):
                Image.new("RGB", (8, 8), (40 * n, 255 - 40 * n, 128)).save(directory / f"{n}.png")
            rows = [{"image": f"{n}.png", "label": "ab"[n % 2]} for n in range(6)]
        case "regression":
            rows = [{"text": text, "label": n / 2} for n, text in enumerate(TEXTS)]
        case "multi-label":
            rows = [{"text": text, "label": ["a", "b"][: n % 3]} for n, text in enumerate(TEXTS)]
        case _:
            rows = [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(TEXTS)]
    path = directory / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(names: list[str], **settings: Any) -> dict[str, Any]:
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), **settings}


SEQUENCE = "AutoModelForSequenceClassification"


@pytest.mark.parametrize(
    ("family", "task", "auto", "settings"),
    [
        ("deberta-v3", "classification", SEQUENCE, labelled(["a", "b"])),
        ("llama", "classification", SEQUENCE, labelled(["a", "b"])),
        ("roberta", "regression", SEQUENCE, {"num_labels": 1}),
        ("distilbert", "multi-label", SEQUENCE, labelled(["a", "b"], problem_type="multi_label_classification")),
        ("albert", "token-classification", "AutoModelForTokenClassification", labelled(TAGS)),
        ("t5", "sequence-to-sequence", "AutoModelForSeq2SeqLM", {}),
        ("gpt2", "causal-lm", "AutoModelForCausalLM", {}),
        ("vit", "image-classification", "AutoModelForImageClassification", labelled(["a", "b"])),
    ],
)
def test_equal_models_merge_to_themselves(
    tmp_path: Path, pico: Callable[[str], Path], family: str, task: str, auto: str, settings: dict[str, Any]
) -> None:
    base = pico(family)
    model = publish(tmp_path / "model", base, auto, 1, **settings)
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for file in files:
        gramfuse(
            "measure", model, "--base", base, "--data", data_of(task, model), "-o", file, "--name", file.stem, *SHORT
        )
    report = gramfuse("merge", *files, "-o", tmp_path / "merged", "--base", base)
    assert report["examples"] == 2 * len(TEXTS)
    own, merged = (load_file(directory / "model.safetensors") for directory in (model, tmp_path / "merged"))
    assert own.keys() == merged.keys()
    for name in own:
        np.testing.assert_allclose(merged[name], own[name], atol=1e-5, err_msg=name)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "merged")
    assert loaded.config.id2label == getattr(transformers, auto).from_pretrained(model).config.id2label


def test_bodies_of_different_tasks_are_merged_where_they_are_the_same(
    tmp_path: Path, pico: Callable[[str], Path]
) -> None:
    base = pico("bert")
    topics = publish(tmp_path / "topics", base, SEQUENCE, 1, **labelled(["a", "b"]))
    names = publish(tmp_path / "names", base, "AutoModelForTokenClassification", 2, **labelled(TAGS))
    files = []
    for model, task in ((topics, "classification"), (names, "token-classification")):
        files.append(tmp_path / f"{model.name}.safetensors")
        gramfuse("measure", model, "--base", base, "--data", data_of(task, model), "-o", files[-1], *SHORT)
    gramfuse("merge", *files, "-o", tmp_path / "merged", "--base", base, "--heads", "own")
    own = [load_file(model / "model.safetensors") for model in (topics, names)]
    merged = [load_file(tmp_path / "merged" / model.name / "model.safetensors") for model in (topics, names)]
    shared = own[0].keys() & {name for name in own[1] if not name.startswith("classifier")}
    assert len(shared) > 30
    for name in shared:
        assert np.array_equal(merged[0][name], merged[1][name]), name
        assert not np.array_equal(merged[0][name], own[0][name]), name
    for tensors, mine in zip(merged, own, strict=True):
        assert tensors.keys() == mine.keys()
        for name in mine.keys() - shared:  # heads, and the pooler, which only one of them has
            np.testing.assert_allclose(tensors[name], mine[name], atol=1e-6, err_msg=name)


def test_what_is_not_merged_in_closed_form_is_said_by_measure_by_merge_and_by_the_card(
    tmp_path: Path, pico: Callable[[str], Path]
) -> None:
    base = pico("funnel")
    model = publish(tmp_path / "model", base, SEQUENCE, 1, **labelled(["a", "b"]))
    file, out = tmp_path / "one.safetensors", tmp_path / "merged"
    measuring = ["measure", model, "--base", base, "--data", data_of("classification", model), "-o", file, *SHORT]
    merging = ["merge", file, "-o", out, "--base", base]
    for arguments in (measuring, merging):
        result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        # The embeddings are trained here, and averaged as they stand.
        assert "Warning: only" in result.output
        assert "funnel.encoder.blocks.1.0.attention.q_head" in result.output
    report = json.loads((out / "report.json").read_text())
    assert 0 < report["closed"] < 0.5
    assert "funnel.encoder.blocks.1.0.ffn.linear_1.weight" in report["unmatched"]
    card = (out / "README.md").read_text()
    assert f"Warning: only {report['closed']:.1%}" in card
    assert "`funnel.encoder.blocks.1.0.attention.q_head, " in card
