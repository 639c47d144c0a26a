"""What is measured and merged of models of others: how much each weighs, in half precision, with a token more."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gramfuse_cli.main import cli
from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_model.derive_layout import derive_layout, plan_layout
from gramfuse_model.loading.zero_head import load_zero_headed, plan_for
from gramfuse_model.parameters import add_differences, trainable
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ContributionError, RunDirectoryError
from gramfuse_protocol.statistics.file import read_statistics
from gramfuse_server.merging.regmean import merge
from tests.client.checkpoints.models import ROWS, WEIGHTS, Change, Models, edit, refused
from tests.commands import gramfuse


def test_no_batch_is_no_measurement(models: Models) -> None:
    plan = plan_for("base", str(models.base), Task(task="classification", labels=("a", "b"), max_length=16))
    base = load_zero_headed(plan, Path())
    layout = plan_layout(plan, base)
    batches = iter([dict(base.tokenizer(["the cat"], return_tensors="pt"))])
    given = {"base": trainable(base.model), "examples": 1}
    assert collect_statistics(base.model, batches, layout, **given).examples == 1
    refused("no batches", lambda: collect_statistics(base.model, batches, layout, **given), ContributionError)


def test_a_model_of_one_example_among_those_of_many_is_told_where_it_weighs_as_much(
    models: Models, tmp_path: Path
) -> None:
    many = models.measure(None, None, "--name", "many")["file"]
    models.data.write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    one = tmp_path / "one.safetensors"
    given = ["measure", models.model, "--base", models.base, "--data", models.data, "-o", one, "--name", "one"]
    assert "1 examples are few" in CliRunner().invoke(cli, [*map(str, given)]).stderr
    report = gramfuse("merge", many, one, "-o", tmp_path / "merged", "--base", models.base)
    assert shares(report) == {("one", 3.5, "ok")}  # 1 of 7 examples has half of the weight
    models.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 10), encoding="utf-8")
    more = models.measure(None, None, "--name", "more")["file"]
    report = gramfuse("merge", more, one, "-o", tmp_path / "again", "--base", models.base)
    assert shares(report) == {("one", 30.5, "look")}
    report = gramfuse("merge", more, one, "-o", tmp_path / "third", "--base", models.base, "--weighting", "examples")
    assert shares(report) == set()


def shares(report: dict[str, Any]) -> set[tuple[str, float, str]]:
    return {(c["where"], c["value"], c["verdict"]) for c in report["checks"] if c["name"] == "share"}


HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def saved_as(half: torch.dtype, *, frozen: Path | None = None) -> Change:
    """Save a model in half precision, with the embeddings of another if it is to have those."""

    def change(copy: Path) -> None:
        tensors = load_file(copy / WEIGHTS)
        if frozen is not None:
            of = load_file(frozen / WEIGHTS)
            tensors |= {f"bert.{name}": tensor for name, tensor in of.items() if name.startswith("embeddings.")}
        save_file({name: t.to(half) for name, t in tensors.items()}, copy / WEIGHTS, metadata={"format": "pt"})
        edit(copy / "config.json", dtype=str(half).removeprefix("torch."))

    return change


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_frozen_embeddings_of_a_model_in_half_precision_are_those_of_the_base(
    models: Models, half: torch.dtype
) -> None:
    model = models.copy(models.model, saved_as(half, frozen=models.base))
    for base in (models.base, models.copy(models.base, saved_as(half))):
        file = read_statistics(models.measure(model, base, "--freeze", "embeddings")["file"])
        assert not any("embeddings" in tensor.name for tensor in file.about.layout.tensors)
    changed = models.copy(models.model, saved_as(half))
    refused("embeddings. frozen", lambda: models.measure(changed, None, "--freeze", "embeddings"))


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_models_that_transformers_loads_in_half_precision_merge_to_one_of_the_same(
    models: Models, half: torch.dtype
) -> None:
    directories = [models.copy(models.base, saved_as(half)), models.copy(models.model, saved_as(half))]
    base, model = (
        transformers.AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3)
        for directory in directories
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.base)
    batch = dict(tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt"))
    start, layout = trainable(base), derive_layout(base, batch)
    assert {array.dtype.name for array in start.values()} == {"float32"}
    statistics = [collect_statistics(model, [batch], layout, base=start, examples=len(ROWS)) for _ in range(2)]
    add_differences(base, merge(statistics, layout).deltas)
    own = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        assert parameter.dtype == half
        assert torch.equal(parameter, own[name]), name


def grown(copy: Path) -> None:
    """Give a model a token more, as people do."""
    with_token = transformers.AutoTokenizer.from_pretrained(copy)
    with_token.add_tokens(["<mine>"])
    with_token.save_pretrained(copy)
    auto = transformers.AutoModel if "Classification" not in (copy / "config.json").read_text() else None
    auto = auto or transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(copy)
    model.resize_token_embeddings(len(with_token))
    model.save_pretrained(copy)


def test_a_model_with_a_token_more_is_merged_over_a_base_that_has_it_too(models: Models, tmp_path: Path) -> None:
    model = models.copy(models.model, grown)
    refused("rows resize_token_embeddings", lambda: models.measure(base=models.copy(models.base, grown)))
    base = models.copy(models.base, grown)
    files = [models.measure(model, base, "--name", name)["file"] for name in ("one", "two")]
    gramfuse("merge", *files, "-o", tmp_path / "merged", "--base", base)
    own, merged = (load_file(directory / WEIGHTS) for directory in (model, tmp_path / "merged"))
    for name, tensor in own.items():
        assert torch.allclose(tensor, merged[name], atol=1e-5), name


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (transformers.PreTrainedModel, OSError(errno.ENOSPC, "No space left on device")),
        (transformers.PreTrainedModel, SafetensorError("I/O error: No space left on device (os error 28)")),
        (transformers.PreTrainedTokenizerBase, Exception("No space left on device (os error 28)")),
    ],
    ids=["weights", "weights in Rust", "tokenizer in Rust"],
)
def test_a_merge_that_finds_no_room_says_so_and_leaves_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, error: Exception
) -> None:
    def full(self: Any, directory: Path, **_: Any) -> None:
        Path(directory).mkdir(exist_ok=True)
        (Path(directory) / "begun").write_bytes(b"half of it")
        raise error

    file = models.measure()["file"]
    monkeypatch.setattr(kind, "save_pretrained", full)
    place = tmp_path / "place"
    place.mkdir()
    merging = ("merge", file, "-o", place / "merged", "--base", models.base)
    refused("no space left", lambda: gramfuse(*merging), RunDirectoryError)
    assert list(place.iterdir()) == []
