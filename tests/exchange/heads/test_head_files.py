"""`gramfuse head`: a head that is fitted by files is the head of all silos' examples together."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gramfuse_cli.main import cli
from gramfuse_protocol.errors import ContributionError, DataError, GramfuseError, ModelError, PlanError
from gramfuse_protocol.statistics.head_file import read_head, write_head
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.merging.closed_form_head import fit_head, without_bias
from tests.commands import gramfuse
from tests.conftest import TOPICS

LABELS = tuple(TOPICS)
Rows = list[dict[str, str]]


def about(count: int, seed: int, topics: Sequence[str] = LABELS) -> Rows:
    """Short texts about some topics."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        topic = rng.choice(topics)
        words = [*rng.sample(TOPICS[topic].split(), 2), *rng.choices(["the", "my", "old", "with"], k=3)]
        rows.append({"text": " ".join(words), "label": topic})
    return rows


def written(rows: Rows, path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tuned(base: Path, rows: Rows, directory: Path, seed: int) -> Path:
    """Fine-tune with transformers and torch alone, from a head of its own."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(LABELS), id2label=dict(enumerate(LABELS))
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in range(0, len(rows), 16):
        inputs = tokenizer([row["text"] for row in rows[start : start + 16]], padding=True, return_tensors="pt")
        truth = torch.tensor([LABELS.index(row["label"]) for row in rows[start : start + 16]])
        model(**inputs, labels=truth).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def sums_by_hand(model: Any, tokenizer: Any, rows: Rows, labels: Sequence[str] = LABELS) -> HeadSums:
    """The sums over examples, each alone in its batch, with a hook on the last layer."""
    layer, seen = model.classifier if hasattr(model, "classifier") else model.score, []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double().numpy()))
    with torch.no_grad():
        for row in rows:
            model.eval()(**tokenizer(row["text"], return_tensors="pt"))
    hook.remove()
    features = np.stack([x.reshape(-1, x.shape[-1])[-1] for x in seen])  # of a sequence, its last token
    return HeadSums.of(features, np.eye(len(labels))[[labels.index(row["label"]) for row in rows]])


def accuracy(directory: Path, rows: Rows) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        logits = model(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits
    guesses = [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
    return float(np.mean([guess == row["label"] for guess, row in zip(guesses, rows, strict=True)]))


def test_a_merged_model_gets_the_head_of_all_examples_together(tmp_path: Path, loud_bert: Path) -> None:
    # Each silo lacks a topic, and began with a head of its own; one example of a label is left out.
    data = {"north": about(60, 1, LABELS[:2]), "south": about(50, 2, LABELS[1:])}
    statistics, files = [], []
    for seed, (name, rows) in enumerate(data.items()):
        model = tuned(loud_bert, rows, tmp_path / name, seed)
        train = written(rows, tmp_path / f"{name}.jsonl")
        statistics.append(tmp_path / f"{name}.safetensors")
        gramfuse("measure", model, "--base", loud_bert, "--data", train, "-o", statistics[-1])
    merged = tmp_path / "merged"
    gramfuse("merge", *statistics, "--base", loud_bert, "-o", merged)
    alone = {"text": "the pan", "label": LABELS[2]}
    for name, rows in data.items():
        train = written([*rows, *([alone] if name == "north" else [])], tmp_path / f"{name}.jsonl")
        files.append(tmp_path / f"{name}.head.safetensors")
        report = gramfuse("head", "measure", merged, "--data", train, "-o", files[-1])
        assert (report["name"], report["examples"]) == (name, len(rows))
        assert report["rare_labels"] == ({LABELS[2]: 1} if name == "north" else {})
        assert report["bytes"] == files[-1].stat().st_size
        assert files[-1].stat().st_mode & 0o777 == 0o600
    fitted = gramfuse("head", "fit", merged, *files, "-o", tmp_path / "fitted")
    gramfuse("head", "fit", merged, *files[::-1], "-o", tmp_path / "swapped")

    before, after = load_file(merged / "model.safetensors"), load_file(tmp_path / "fitted" / "model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    head = fit_head(sums_by_hand(model, tokenizer, data["north"] + data["south"]), prior=True).calibrated
    assert np.allclose(after["classifier.weight"], head.weight, rtol=1e-4, atol=1e-5 * np.abs(head.weight).max())
    assert np.allclose(after["classifier.bias"], head.bias, rtol=1e-4, atol=1e-5 * np.abs(head.bias).max())
    assert {name for name in before if not np.array_equal(before[name], after[name])} == set(fitted["tensors"])
    swapped = load_file(tmp_path / "swapped" / "model.safetensors")
    assert all(np.array_equal(after[name], swapped[name]) for name in after)
    test = about(200, 9)
    assert accuracy(tmp_path / "fitted", test) > accuracy(merged, test) + 0.1

    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "fitted").returncode == 0
    card = (tmp_path / "fitted" / "README.md").read_text(encoding="utf-8")
    assert all(silo["sha256"] in card for silo in fitted["silos"])
    assert fitted["examples"] == {
        label: sum(row["label"] == label for rows in data.values() for row in rows) for label in LABELS
    }
    # A head that is fitted again to the same features is the same: its own weights are in no file.
    again = tmp_path / "again.head.safetensors"
    gramfuse("head", "measure", tmp_path / "fitted", "--data", tmp_path / "south.jsonl", "-o", again)
    assert np.array_equal(read_head(again).sums.second, read_head(files[1]).sums.second)
    gramfuse("head", "fit", merged, files[0], again, "--out", tmp_path / "third")


@pytest.mark.parametrize("family", ["loud_bert", "pico_gpt2"])
def test_an_untouched_base_gets_a_head_for_labels_of_its_own(
    tmp_path: Path, family: str, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(family)
    labels = ("weather", "kitchen", "animals", "none of these")
    data = {"north": about(40, 1, labels[:2]), "south": about(40, 2, labels[1:3])}
    files = []
    for name, rows in data.items():
        files.append(tmp_path / f"{name}.safetensors")
        train = written(rows, tmp_path / f"{name}.jsonl")
        gramfuse("head", "measure", base, "--labels", ",".join(labels), "--data", train, "-o", files[-1])
    result = CliRunner().invoke(cli, ["head", "fit", *map(str, [base, *files]), "-o", str(tmp_path / "fitted")])
    assert result.exit_code == 0, result.output
    assert "'none of these'" in result.output

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fitted")
    assert tuple(model.config.id2label.values()) == labels
    sums = sums_by_hand(model, AutoTokenizer.from_pretrained(base), data["north"] + data["south"], labels)
    head = fit_head(sums, prior=True).calibrated
    layer = model.classifier if family == "loud_bert" else model.score
    if layer.bias is None:
        head = without_bias(head, sums, relative=True)
    else:
        assert np.allclose(layer.bias.detach(), head.bias, rtol=1e-3, atol=1e-4 * np.abs(head.bias).max())
    assert np.allclose(layer.weight.detach(), head.weight, rtol=1e-3, atol=1e-4 * np.abs(head.weight).max())
    body = load_file(base / "model.safetensors")
    after = {name.partition(".")[2]: value for name, value in load_file(tmp_path / "fitted/model.safetensors").items()}
    assert all(np.array_equal(after[name.removeprefix("transformer.")], value) for name, value in body.items())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, loud_bert: Path) -> Path:
    """A directory with a model, data of two silos and their head files."""
    place = tmp_path_factory.mktemp("place")
    tuned(loud_bert, about(32, 5), place / "model", 0)
    for seed, name in enumerate(("north", "south")):
        written(about(30, seed), place / f"{name}.jsonl")
        gramfuse("head", "measure", place / "model", "--data", place / f"{name}.jsonl", "-o", place / f"{name}.head")
    return place


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path, place: Path, loud_bert: Path) -> None:
    model, north, out = place / "model", place / "north.head", tmp_path / "fitted"

    def measured(name: str, *options: Any, of: Path = model) -> Path:
        file = tmp_path / f"{name}.head"
        gramfuse("head", "measure", of, "--data", place / "south.jsonl", "-o", file, *options)
        return file

    def refused(kind: type[GramfuseError], message: str, *files: Path, of: Path = model) -> None:
        with pytest.raises(kind, match=message):
            gramfuse("head", "fit", of, *files, "-o", out)
        assert not out.exists()
        assert not out.with_name("fitted.partial").exists()

    def conflict(message: str, other: Path) -> None:
        both = rf"(?=.*north\.head)(?=.*{other.name})"
        refused(ContributionError, rf"{both}.*{message}", north, other)

    copy = shutil.copy(north, tmp_path / "copy.head")
    conflict("same sums.* leave one", Path(copy))
    conflict("both named 'north'.*--name", measured("twin", "--name", "north"))
    conflict("their labels are 3 .* and 3 .*same order", measured("order", "--labels", ",".join(LABELS[::-1])))
    conflict("'max-length' is 32 and 4.*same options", measured("short", "--max-length", 4))
    other = tuned(loud_bert, about(32, 6), tmp_path / "other", 1)
    conflict(r"different models \('./other', './model'\): tensor 'bert\.", measured("foreign", of=other))
    words = shutil.copytree(model, tmp_path / "words")
    text = (words / "tokenizer.json").read_text(encoding="utf-8")
    (words / "tokenizer.json").write_text(text.replace('"cat"', '"lynx"'), encoding="utf-8")
    conflict("different tokenizers", measured("lynx", of=words))
    refused(ModelError, r"other' is not the model that .*north\.head .*'\./model': .*'bert\.", north, of=other)
    refused(ModelError, r"words' is not the model .*tokenizers", north, of=words)

    cut = tmp_path / "cut.head"
    cut.write_bytes(north.read_bytes()[:-1])
    refused(ContributionError, r"cut\.head: .*truncated", north, cut)
    edited = tmp_path / "edited.head"
    edited.write_bytes(north.read_bytes()[:-3] + b"abc")
    refused(ContributionError, r"edited\.head: was changed", north, edited)
    statistics = tmp_path / "stats.safetensors"
    gramfuse("measure", model, "--base", loud_bert, "--data", place / "north.jsonl", "-o", statistics)
    refused(
        ContributionError, r"stats\.safetensors: is a statistics file, not a head file.*head measure", north, statistics
    )
    with pytest.raises(ContributionError, match=r"north\.head: is a head file, not a statistics file.*head fit"):
        gramfuse("merge", statistics, north, "--base", loud_bert, "-o", out)
    with pytest.raises(GramfuseError, match="exists already"):
        gramfuse("head", "fit", model, north, "-o", place)


def test_the_same_examples_in_other_batches_are_the_same_examples(tmp_path: Path, place: Path) -> None:
    again = tmp_path / "again.head"
    data = place / "north.jsonl"
    gramfuse("head", "measure", place / "model", "--data", data, "-o", again, "--batch-size", 7, "--name", "other")
    with pytest.raises(ContributionError, match="same sums"):
        gramfuse("head", "fit", place / "model", place / "north.head", again, "-o", tmp_path / "fitted")


def test_a_head_for_examples_that_the_body_has_seen_is_half_as_sure(tmp_path: Path, place: Path) -> None:
    heads = {}
    for name, options in (("unseen", ()), ("seen", ("--seen",))):
        gramfuse("head", "fit", place / "model", place / "north.head", "-o", tmp_path / name, *options)
        heads[name] = load_file(tmp_path / name / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        assert np.allclose(heads["seen"][name], 0.5 * heads["unseen"][name], rtol=1e-5)


def test_sums_that_no_examples_have_are_refused(tmp_path: Path, place: Path) -> None:
    good = read_head(place / "north.head")

    def forged(name: str, change: Any) -> Path:
        second, first = good.sums.second.copy(), good.sums.first.copy()
        change(second, first)
        known, path = good.about, tmp_path / f"{name}.head"
        write_head(
            path,
            HeadSums(second, first),
            name=name,
            model=known.model,
            task=known.task,
            head=known.head,
            least=known.least,
        )
        return path

    def counts(second: Any, first: Any) -> None:
        first[-1] += (0.5, -0.5, 0)

    def rare(second: Any, first: Any) -> None:
        first[-1] = (1, 0, good.about.examples - 1)

    def fewer(second: Any, first: Any) -> None:
        first[-1, np.argmax(first[-1])] -= 1

    def elsewhere(second: Any, first: Any) -> None:
        first[0] += 0.1

    def beyond(second: Any, first: Any) -> None:
        second[0, 1] = second[1, 0] = 2 * np.sqrt(second[0, 0] * second[1, 1])

    def negative(second: Any, first: Any) -> None:
        second[2, 2] = -1

    def huge(second: Any, first: Any) -> None:
        second[2, 2] = 1e300

    for change in (counts, rare, fewer, elsewhere, beyond, negative, huge):
        with pytest.raises(ContributionError, match=rf"{change.__name__}\.head: "):
            read_head(forged(change.__name__, change))

    # Each pair of features for itself is possible, all of them together are not.
    def turned(second: Any, first: Any) -> None:
        scale = np.sqrt(second.diagonal()[:-1])
        second[:-1, :-1] = np.outer(scale, scale) * (2 * np.eye(len(scale)) - 1)

    with pytest.raises(ContributionError, match=r"turned\.head: .*eigenvalue"):
        gramfuse("head", "fit", place / "model", forged("turned", turned), "-o", tmp_path / "fitted")
    assert not (tmp_path / "fitted").exists()


def test_what_cannot_be_measured_is_refused_before_a_file_is_written(
    tmp_path: Path, place: Path, loud_bert: Path
) -> None:
    out, data = tmp_path / "north.head", place / "north.jsonl"

    def refused(kind: type[GramfuseError], message: str, *arguments: Any) -> None:
        with pytest.raises(kind, match=message):
            gramfuse("head", "measure", *arguments, "-o", out)
        assert not list(tmp_path.glob("north.head*"))

    refused(PlanError, "no labels .*--labels", loud_bert, "--data", data)
    refused(DataError, "unknown label 'kitchen'", loud_bert, "--data", data, "--labels", "animals,weather")
    refused(PlanError, "listed twice", loud_bert, "--data", data, "--labels", "animals,animals")
    refused(DataError, "--minimum-label-examples", place / "model", "--data", data, "--minimum-label-examples", 99)
    several = shutil.copytree(place / "model", tmp_path / "several")
    config = json.loads((several / "config.json").read_text(encoding="utf-8"))
    several.joinpath("config.json").write_text(
        json.dumps({**config, "problem_type": "multi_label_classification"}), encoding="utf-8"
    )
    refused(PlanError, "multi-label.* classification", several, "--data", data)
    unlabelled = written([{"text": "the cat"}], tmp_path / "unlabelled.jsonl")  # type: ignore[list-item]
    refused(DataError, "label", place / "model", "--data", unlabelled)
    with pytest.raises(GramfuseError, match="exists already"):
        gramfuse("head", "measure", place / "model", "--data", data, "-o", place / "north.head")


def test_a_head_file_can_be_read_without_gramfuse(place: Path) -> None:
    with safe_open(place / "north.head", "numpy") as file:
        document = json.loads(file.metadata()["gramfuse-head"])
        packed, first = file.get_tensor("head:second"), file.get_tensor("head:first")
    assert (document["weight"], document["task"]["labels"]) == ("classifier.weight", list(LABELS))
    second = np.zeros((document["features"] + 1,) * 2)
    second[np.triu_indices(len(second))] = packed
    model = AutoModelForSequenceClassification.from_pretrained(place / "model")
    rows = [json.loads(line) for line in (place / "north.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = sums_by_hand(model, AutoTokenizer.from_pretrained(place / "model"), rows)
    assert np.allclose(second + np.triu(second, 1).T, expected.second, rtol=1e-4, atol=1e-4)
    assert np.allclose(first, expected.first, rtol=1e-4, atol=1e-4)
