"""`gramfuse measure` on data as people have them: in any order, with numbers for labels or without, with bad rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from gramfuse_cli.main import cli
from gramfuse_protocol.contract.layout import gram_block
from gramfuse_protocol.errors import DataError, GramfuseError, ModelError, PlanError
from gramfuse_protocol.statistics.file import StatisticsFile, read_statistics

TOPICS = {"animals": "cat dog horse sheep", "weather": "rain snow wind sun", "kitchen": "pan pot knife spoon"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, pico_bert: Path) -> Path:
    """A classifier whose weights are somewhat apart from those of its base; its labels are LABEL_0, LABEL_1, …."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(5)
    tuned = AutoModelForSequenceClassification.from_pretrained(pico_bert, num_labels=3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "embeddings" not in name:
                parameter += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(directory)
    AutoTokenizer.from_pretrained(pico_bert).save_pretrained(directory)
    return directory


def copied(model: Path, to: Path) -> Path:
    """Copy a model, with another table of tokens."""
    tuned = AutoModelForSequenceClassification.from_pretrained(model)
    with torch.no_grad():
        tuned.get_input_embeddings().weight += 0.01
    tuned.save_pretrained(to)
    AutoTokenizer.from_pretrained(model).save_pretrained(to)
    return to


def rows(count: int) -> list[dict[str, Any]]:
    """Texts about one topic after the other, as in a file that is sorted by label; the last topic's are longest."""
    rng = random.Random(3)
    return [
        {"text": " ".join(rng.choices(words.split(), k=rng.randint(2, 4 + 4 * label))), "label": label}
        for label, words in enumerate(TOPICS.values())
        for _ in range(count // 3)
    ]


def measure(model: Path, base: Path, data: Path, *options: Any) -> tuple[StatisticsFile, dict[str, Any]]:
    """Return the statistics and what the command says of them; what it raises is raised here."""
    out = data.with_suffix(".safetensors")
    out.unlink(missing_ok=True)
    arguments = [
        "measure",
        model,
        "--base",
        base,
        "--data",
        data,
        "-o",
        out,
        "--device",
        "cpu",
        "--max-length",
        32,
        "--json",
    ]
    result = CliRunner().invoke(cli, [*map(str, [*arguments, *options])])
    if isinstance(result.exception, GramfuseError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return read_statistics(out), json.loads(result.stdout)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def grams(file: StatisticsFile) -> dict[str, Any]:
    return {group.name: file.block(gram_block(group.name)).astype(np.float64) for group in file.about.layout.groups}


def distance(one: StatisticsFile, other: StatisticsFile) -> float:
    """The largest relative distance between the Gram matrices of two files."""
    mine, theirs = grams(one), grams(other)
    return max(float(np.linalg.norm(mine[name] - theirs[name]) / np.linalg.norm(theirs[name])) for name in theirs)


def test_the_order_of_the_rows_does_not_decide_the_gram_matrices(tmp_path: Path, model: Path, pico_bert: Path) -> None:
    ordered = rows(900)
    quarter = len(ordered) // 4

    def measured(name: str, some: list[dict[str, Any]], *options: Any) -> StatisticsFile:
        return measure(model, pico_bert, write(tmp_path / f"{name}.jsonl", some), *options)[0]

    full = measured("all", ordered)
    limit = ("--tokens", max(full.tokens.values()) // 4)
    rng = random.Random(8)
    noise = [distance(measured(f"drawn-{n}", rng.sample(ordered, quarter)), full) for n in range(12)]
    drawn = [measured("sorted", ordered, *limit), measured("shuffled", rng.sample(ordered, len(ordered)), *limit)]
    assert max(distance(one, full) for one in drawn) < 1.5 * max(noise)
    # The first rows of the sorted file are another matter.
    assert distance(measured("first", ordered[:quarter]), full) > 5 * max(noise)
    # A file that is drawn from twice gives the same.
    again = measured("again", ordered, *limit)
    assert all(np.array_equal(one, grams(drawn[0])[name]) for name, one in grams(again).items())


def test_labels_change_nothing_of_what_is_measured(tmp_path: Path, model: Path, pico_bert: Path) -> None:
    numbered = rows(30)
    names = ["good, mostly", "bad", "so-so"]
    files = {
        "numbers": (numbered, []),
        "fractions": ([{**row, "label": float(row["label"])} for row in numbered], []),
        "names": ([{**row, "label": f"LABEL_{row['label']}"} for row in numbered], []),
        "other names": (
            [{**row, "label": names[row["label"]]} for row in numbered],
            ["--labels", '"good, mostly",bad, so-so'],
        ),
        "none": ([{"text": row["text"]} for row in numbered], []),
    }
    found = {
        name: grams(measure(model, pico_bert, write(tmp_path / f"{name}.jsonl", some), *options)[0])
        for name, (some, options) in files.items()
    }
    for name, gram in found.items():
        assert all(np.array_equal(gram[group], found["numbers"][group]) for group in gram), name
    with pytest.raises(DataError, match=r"other names\.jsonl: 30 of 30 rows(?s:.*)--labels"):
        measure(model, pico_bert, write(tmp_path / "other names.jsonl", files["other names"][0]))
    with pytest.raises(PlanError, match=r"3 different names.*'LABEL_0'"):
        measure(model, pico_bert, tmp_path / "numbers.jsonl", "--labels", "good,bad")


def test_bad_rows_are_left_out_as_many_as_one_says(tmp_path: Path, model: Path, pico_bert: Path) -> None:
    good = rows(30)
    bad = [*good[:7], {"text": "", "label": 0}, *good[7:], {"text": "cat", "label": "pets"}]
    clean, _ = measure(model, pico_bert, write(tmp_path / "good.jsonl", good))
    found, said = measure(model, pico_bert, write(tmp_path / "bad.jsonl", bad), "--skip-bad", 2)
    assert distance(found, clean) == 0
    assert said["examples"] == 30
    assert [line.split(": ")[0] for line in said["left_out"]] == [f"{tmp_path / 'bad.jsonl'}:{n}" for n in (8, 32)]
    with pytest.raises(DataError, match="2 of 32 rows cannot be used"):
        measure(model, pico_bert, tmp_path / "bad.jsonl", "--skip-bad", 1)
    with pytest.raises(
        DataError, match=r"none\.jsonl: 3 of 3 rows cannot be used:\n.*:1: (?s:.*):3: (?s:.*)--labels"
    ) as none:
        measure(model, pico_bert, write(tmp_path / "none.jsonl", [bad[-1]] * 3), "--skip-bad", 3)
    assert "To leave them out" not in str(none.value)
    with pytest.raises(DataError, match=r"none\.jsonl:1: (?s:.*)unknown label 'pets'"):
        measure(model, pico_bert, write(tmp_path / "none.jsonl", [bad[-1]]), "--skip-bad", 1)
    assert not list(tmp_path.glob("bad.safetensors")) + list(tmp_path.glob("none.safetensors"))


def test_files_are_tuned_on_data_with_labels_of_its_own_and_bad_rows(
    tmp_path: Path, model: Path, pico_bert: Path
) -> None:
    file = measure(model, pico_bert, write(tmp_path / "train.jsonl", rows(30)))[0].path
    names = {0: "good, mostly", 1: "bad", 2: "so-so"}
    parts: dict[str, dict[str, Path]] = {"numbers": {}, "names": {}}
    for part, words in (("validation", "the big"), ("test", "my old")):
        some = [{"text": f"{row['text']} {words}", "label": row["label"]} for row in rows(30)]
        renamed = [{**row, "label": names[row["label"]]} for row in some]
        parts["numbers"][part] = write(tmp_path / f"{part}-numbers.jsonl", some)
        parts["names"][part] = write(tmp_path / f"{part}-names.jsonl", [{"text": "cat", "label": "pets"}, *renamed])

    def tune(data: dict[str, Path], *options: Any) -> dict[str, Any]:
        out = tmp_path / f"merged-{len(list(tmp_path.iterdir()))}"
        given = ["--base", pico_bert, "--validation", data["validation"], "--test", data["test"], "--alpha", "0.5,0.9"]
        result = CliRunner().invoke(cli, [*map(str, ["tune", file, *given, "-o", out, "--json", *options])])
        if isinstance(result.exception, GramfuseError):
            raise result.exception
        assert result.exit_code == 0, result.output
        report: dict[str, Any] = json.loads(result.stdout)
        return report

    labels = ("--labels", '"good, mostly",bad, so-so')
    numbered, named = tune(parts["numbers"]), tune(parts["names"], *labels, "--skip-bad", 1)
    assert [one["metrics"] for one in named["models"]] == [one["metrics"] for one in numbered["models"]]
    assert named["tuning"]["alpha"] == numbered["tuning"]["alpha"]
    places = {line.split(": ")[0] for line in named["left_out"]}
    assert places == {f"{path}:1" for path in parts["names"].values()}
    with pytest.raises(DataError, match=r"unknown label .pets.(?s:.*)--labels(?s:.*)--skip-bad"):
        tune(parts["names"], *labels)
    with pytest.raises(DataError, match="31 of 31 rows"):
        tune(parts["names"])
    with pytest.raises(PlanError, match="expected 3 different names"):
        tune(parts["numbers"], "--labels", "good,bad")
    with pytest.raises(DataError, match=r"^--validation: .*30 examples.* --test"):
        tune({"validation": parts["numbers"]["test"], "test": parts["numbers"]["test"]})


OF_A_PLAN = ("plan", "silo file", "[[silo]]", "skip-bad =", "data.", "[data]")
"""Words of settings that a command without a plan does not have."""


@pytest.mark.parametrize(
    ("some", "options", "said"),
    [
        ([{"text": "cat", "label": "pets"}], [], ["unknown label 'pets'", "--labels", "--skip-bad"]),
        ([{"text": "cat", "label": "pets"}] * 2, ["--skip-bad", "1"], ["--skip-bad allows 1", "--skip-bad 2"]),
        ([{"body": "cat"}], [], ["'text' is missing", "'body'", "--text or --text-pair or --image or --label"]),
        ([{"text": "cat", "label": [1]}] * 2, [], ["--skip-bad allows 0", "--skip-bad 2"]),
    ],
    ids=["a label", "several", "a column", "no labels"],
)
def test_what_is_wrong_with_data_is_said_in_the_commands_own_words(
    tmp_path: Path, model: Path, pico_bert: Path, some: list[dict[str, Any]], options: list[str], said: list[str]
) -> None:
    data = write(tmp_path / "train.jsonl", [*rows(3), *some])
    with pytest.raises(DataError) as caught:
        measure(model, pico_bert, data, *options)
    message = str(caught.value).replace(str(tmp_path), "")
    for words in said:
        assert words in message
    for words in OF_A_PLAN:
        assert words not in message


def test_what_is_wrong_with_targets_of_a_new_project_is_said_in_the_commands_own_words(tmp_path: Path) -> None:
    data = write(tmp_path / "prices.jsonl", [{"body": "cat", "label": 3}, {"body": "dog", "label": 4}])
    made = CliRunner().invoke(cli, ["init", str(tmp_path / "new"), "--targets", str(data)])
    assert isinstance(made.exception, DataError)
    assert "--text or --label" in str(made.exception)
    assert not [
        words for words in (*OF_A_PLAN, "--skip-bad") if words in str(made.exception).replace(str(tmp_path), "")
    ]


def test_what_fine_tuning_left_as_it_was_does_not_count_as_trained(
    tmp_path: Path, model: Path, pico_bert: Path
) -> None:
    data = write(tmp_path / "train.jsonl", rows(9))
    _, frozen = measure(model, pico_bert, data, "--freeze", "embeddings")
    _, more = measure(copied(model, tmp_path / "trained"), pico_bert, data)
    _, said = measure(model, pico_bert, data)
    assert said["closed"] == frozen["closed"] > more["closed"]
    arguments = ["merge", data.with_suffix(".safetensors"), "-o", tmp_path / "merged", "--base", pico_bert]
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert f"{frozen['closed']:.1%} of the trained parameters" in result.output
    assert json.loads((tmp_path / "merged" / "report.json").read_text())["closed"] == frozen["closed"]


def test_one_file_alone_is_said_to_become_its_own_model(tmp_path: Path, model: Path, pico_bert: Path) -> None:
    file = measure(model, pico_bert, write(tmp_path / "train.jsonl", rows(30)))[0].path
    merged = ["merge", str(file), "--base", str(pico_bert), "-o", str(tmp_path / "merged")]
    result = CliRunner().invoke(cli, merged)
    assert result.exit_code == 0, result.output
    assert "merged 1 model " in result.stdout
    assert "merged with no other" in result.stderr
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(place) for place in (model, tmp_path / "merged")
    )
    for name, parameter in before.state_dict().items():
        assert torch.allclose(parameter, after.state_dict()[name], atol=1e-6), name


def test_a_batch_that_the_model_cannot_compute_is_named_with_its_rows(
    tmp_path: Path, model: Path, pico_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [{"text": "", "label": 0}, *rows(30)]
    some[18]["text"] = "spoon spoon spoon"
    forward = BertForSequenceClassification.forward
    spoon = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("spoon")

    def fails(self: Any, input_ids: Any = None, **inputs: Any) -> Any:
        if ((input_ids == spoon).sum(1) == 3).any():
            raise RuntimeError("no room for so many spoons")
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", fails)
    data = write(tmp_path / "train.jsonl", some)
    with pytest.raises(ModelError) as caught:
        measure(model, pico_bert, data, "--skip-bad", 1, "--batch-size", 1)
    said = str(caught.value)
    for word in (f"model '{model}'", f"{data}, row 19:", "no room for so many spoons", "--batch-size"):
        assert word in said
    with pytest.raises(ModelError, match=r"row (\d+, )*19(, \d+)*: RuntimeError"):
        measure(model, pico_bert, data, "--skip-bad", 1, "--batch-size", 4)
