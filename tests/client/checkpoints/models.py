"""A base, a model that was fine-tuned from it, and what becomes of changed copies of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gramfuse_protocol.errors import GramfuseError, ModelError
from tests.commands import gramfuse

LABELS = ["animals", "weather", "kitchen"]

ROWS = [
    {"text": text, "label": label}
    for text, label in [
        ("the old cat and a dog", "animals"),
        ("my horse near the big goat", "animals"),
        ("rain and wind", "weather"),
        ("the snow of a storm", "weather"),
        ("a small pan", "kitchen"),
        ("your knife and my spoon", "kitchen"),
    ]
]

WEIGHTS = "model.safetensors"
Change = Callable[[Path], object]


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | changes), encoding="utf-8")


def rename(copy: Path, new: Callable[[str], str | None]) -> None:
    """Give the tensors of a model's files other names; None leaves one out."""
    tensors = {new(name): tensor for name, tensor in load_file(copy / WEIGHTS).items()}
    save_file({name: t for name, t in tensors.items() if name is not None}, copy / WEIGHTS, metadata={"format": "pt"})


class Models:
    """A base, a model that was fine-tuned from it, and what becomes of changed copies of them."""

    def __init__(self, base: Path, directory: Path) -> None:
        self.base = base
        self.directory = directory
        self.model = directory / "model"
        directory.mkdir(exist_ok=True)
        torch.manual_seed(3)
        tuned = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=3, id2label=dict(enumerate(LABELS)), label2id={label: n for n, label in enumerate(LABELS)}
        )
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.02 * torch.randn(parameter.shape)
        tuned.save_pretrained(self.model)
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(self.model)
        self.data = directory / "train.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def copy(self, of: Path, change: Change = lambda copy: None) -> Path:
        copy = self.directory / f"copy-{len(list(self.directory.iterdir()))}"
        shutil.copytree(of, copy)
        change(copy)
        return copy

    def measure(self, model: Path | None = None, base: Path | None = None, *options: Any) -> dict[str, Any]:
        out = self.directory / f"{len(list(self.directory.iterdir()))}.safetensors"
        given = ("--base", base or self.base, "--data", self.data, "-o", out)
        return gramfuse("measure", model or self.model, *given, *options)

    def lock(self, base: Path, **settings: str) -> dict[str, Any]:
        return gramfuse("plan", "lock", self.project(base, **settings))

    def project(self, base: Path, **settings: str) -> Path:
        project = self.directory / f"project-{len(list(self.directory.iterdir()))}"
        project.mkdir()
        task = {"task": '"classification"', "labels": json.dumps(LABELS), "max-length": "16", **settings}
        lines = "".join(f"{key} = {value}\n" for key, value in task.items())
        (project / "plan.toml").write_text(
            f'[plan]\nname = "x"\n[model]\nbase = "{base}"\n{lines}'
            '[privacy]\nsecure-aggregation = false\nmetrics = "silo"\n[[silo]]\nname = "a"\n[[silo]]\nname = "b"\n'
        )
        return project


def refused(names: str, what: Callable[[], object], kind: type[GramfuseError] = ModelError) -> None:
    """Check that something is refused with an error that has all of these words."""
    with pytest.raises(kind) as caught:
        what()
    missing = [name for name in names.split() if name not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


def config(**changes: Any) -> Change:
    return lambda copy: edit(copy / "config.json", **changes)


def keys(new: Callable[[str], str | None]) -> Change:
    return lambda copy: rename(copy, new)


def without(part: str) -> Change:
    return keys(lambda name: None if part in name else name)


def tokenizer(**parts: Any) -> Change:
    return lambda copy: edit(copy / "tokenizer.json", **parts)
