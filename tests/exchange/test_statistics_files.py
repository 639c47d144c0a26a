"""`gramfuse measure` and `gramfuse merge`: what goes through files is what goes through Flower."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from gramfuse_cli.main import cli
from gramfuse_client.app import SiloApp
from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.state import State
from gramfuse_model.project import Project
from gramfuse_protocol.errors import DataError, GramfuseError
from gramfuse_server.app import coordinate
from gramfuse_simulation.engine import simulated_silo
from tests.commands import gramfuse
from tests.reports import read_back


def lock(project: Any) -> str:
    """Lock a project's plan, have all silos approve it, and return its digest."""
    digest: str = gramfuse("plan", "lock", project.directory)["plan_digest"]
    for name in project.names:
        project.replace(project.silo(name), "approved = []", f'approved = ["{digest}"]')
    return digest


def test_files_give_the_model_of_a_simulation_bit_for_bit(
    tmp_path: Path, pico_project: Callable[..., Any], in_process_grid: Callable[..., Any]
) -> None:
    project = pico_project(silos=3)
    # A roster in another order than that of the names, and weights that are not all one.
    project.replace(project.plan, 'name = "silo-a"', 'name = "silo-z"')
    project.replace(project.plan, 'name = "silo-c"', 'name = "silo-a"')
    project.replace(project.plan, 'name = "silo-z"', 'name = "silo-c"')
    project.replace(project.plan, "alpha = 0.9", 'alpha = 0.7\nweighting = "examples"')
    # One silo does not annotate all labels.
    project.replace(project.plan, 'name = "silo-b"', 'name = "silo-b"\nlabels = ["animals", "weather"]')
    for data in project.train("silo-b").parent.iterdir():
        rows = data.read_text(encoding="utf-8").splitlines(keepends=True)
        data.write_text("".join(row for row in rows if '"kitchen"' not in row), encoding="utf-8")
    digest = lock(project)
    plan, layout = Project.read(project.directory).locked()
    apps = {}
    for name in plan.names:
        silo = simulated_silo(str(project.silo(name)), str(tmp_path / "state"), digest)
        apps[name] = SiloApp(lambda _, silo=silo: silo)
    coordinate(in_process_grid(apps), plan, layout, project.directory, tmp_path / "simulated")

    files = []
    for name in project.names:
        files.append(tmp_path / f"{name}.safetensors")
        report = gramfuse("measure", "--plan", project.directory, "--silo", name, "-o", files[-1])
        assert report["plan_digest"] == digest
        assert report["bytes"] == files[-1].stat().st_size
        assert files[-1].stat().st_mode & 0o777 == 0o600
    merged = gramfuse("merge", files[2], files[0], files[1], "-o", tmp_path / "merged", "--base", plan.model.base)

    simulated = load_file(tmp_path / "simulated" / "model" / "model.safetensors")
    by_files = load_file(tmp_path / "merged" / "model.safetensors")
    assert simulated.keys() == by_files.keys()
    for name in simulated:
        assert simulated[name].tobytes() == by_files[name].tobytes(), name
    assert merged["solve"] == read_back(tmp_path / "simulated")["solve"]
    assert merged == read_back(tmp_path / "merged") | {"run": str(tmp_path / "merged")}
    assert [silo["name"] for silo in merged["silos"]] == list(plan.names)
    assert (merged["alpha"], merged["weighting"], merged["plan_digest"]) == (0.7, "examples", digest)

    # What left is in the ledger, and a second file of the same plan needs no second training.
    silo = Silo.read(project.silo("silo-b"))
    (line,) = Ledger(silo.ledger, silo.name).lines()
    assert line.entry.phase == "measure"
    assert line.entry.plan == digest
    assert [item.name for item in line.entry.items] == [block.name for block in layout.blocks]
    again = tmp_path / "again.safetensors"
    gramfuse("measure", "--plan", project.directory, "--silo", project.silo("silo-b"), "-o", again)
    assert again.read_bytes() == files[1].read_bytes()

    # The plan says how few silos will do, and other data cannot go into a second file.
    with pytest.raises(GramfuseError, match=r"at least 3 silos .*missing: silo-b"):
        gramfuse("merge", files[0], files[2], "-o", tmp_path / "two", "--base", plan.model.base)
    with project.train("silo-b").open("a") as data:
        data.write('{"text": "the dog", "label": "animals"}\n')
    with pytest.raises(GramfuseError, match=r"silo-b\.toml: .*other data"):
        gramfuse("measure", "--plan", project.directory, "--silo", "silo-b", "-o", tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_bad_rows_that_a_silo_leaves_out_are_in_no_contribution(
    tmp_path: Path, pico_project: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    project = pico_project(silos=2)
    lock(project)
    arguments = ("measure", "--plan", project.directory, "--silo", "silo-a", "-o")
    gramfuse(*arguments, tmp_path / "clean.safetensors")
    with project.train("silo-a").open("a") as data:
        data.write('{"text": "the dog", "label": "dogs"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:25: unknown label 'dogs'"):
        gramfuse(*arguments, tmp_path / "refused.safetensors")
    project.replace(project.silo("silo-a"), "[data]", "[data]\nskip-bad = 1")
    shutil.rmtree(Silo.read(project.silo("silo-a")).state)
    gramfuse(*arguments, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "clean.safetensors").read_bytes()
    assert "silo-a leaves out" in caplog.text


def test_silos_that_keep_their_heads_get_whole_models_back(
    tmp_path: Path, pico_project: Callable[..., Any], in_process_grid: Callable[..., Any]
) -> None:
    project = pico_project(silos=2)
    project.replace(project.plan, 'head = "same"', 'head = "own"')
    digest = lock(project)
    plan, layout = Project.read(project.directory).locked()
    silos = {name: simulated_silo(str(project.silo(name)), str(tmp_path / "state"), digest) for name in plan.names}
    apps = {name: SiloApp(lambda _, silo=silo: silo) for name, silo in silos.items()}
    coordinate(in_process_grid(apps), plan, layout, project.directory, tmp_path / "simulated")
    files = [tmp_path / f"{name}.safetensors" for name in plan.names]
    for name, file in zip(plan.names, files, strict=True):
        gramfuse("measure", "--plan", project.directory, "--silo", name, "-o", file)
    report = gramfuse("merge", *files, "-o", tmp_path / "merged", "--base", plan.model.base)
    assert report["heads"] == "own"
    assert report["layout_digest"] == layout.digest
    body = load_file(tmp_path / "simulated" / "model" / "model.safetensors")
    for name, silo in silos.items():
        whole = load_file(tmp_path / "merged" / name / "model.safetensors")
        head = State(silo.state, digest).head()
        assert whole.keys() == {f"bert.{key}" for key in body} | head.keys()
        assert all(whole[f"bert.{key}"].tobytes() == value.tobytes() for key, value in body.items())
        assert all(whole[key].tobytes() == value.tobytes() for key, value in head.items())


def test_a_silo_writes_no_file_that_its_own_file_or_the_plan_does_not_allow(
    tmp_path: Path, pico_project: Callable[..., Any]
) -> None:
    out = tmp_path / "silo-a.safetensors"

    def refused(message: str, project: Any) -> None:
        with pytest.raises(GramfuseError, match=message):
            gramfuse("measure", "--plan", project.directory, "--silo", "silo-a", "-o", out)
        assert not out.exists()

    secure = pico_project(silos=4, name="secure", secure=True)
    lock(secure)
    refused("secure-aggregation.* file is not masked", secure)
    rounds = pico_project(silos=2, name="rounds")
    rounds.replace(rounds.plan, "alpha = 0.9", "alpha = 0.9\nrounds = 2")
    refused("gramfuse plan lock", rounds)
    lock(rounds)
    refused("2 exchanges", rounds)
    project = pico_project(silos=2, name="open")
    gramfuse("plan", "lock", project.directory)
    refused("is not approved here", project)
    lock(project)
    project.replace(project.silo("silo-a"), "open-uploads = true", "open-uploads = false")
    refused("'limits.open-uploads' is false here", project)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--data", "D"], "--base is missing"),
        (["--base", "B", "--data", "D"], "MODEL is missing"),
        (["--plan", ".", "--silo", "a", "--gram", "*=full"], "--gram cannot be used with --plan"),
        (["--plan", "."], "--plan needs --silo NAME"),
        (["MODEL", "--base", "B", "--data", "D", "--silo", "a"], "--silo needs --plan"),
        (["MODEL", "--base", "B", "--data", "D", "--name", "A/B"], "lowercase letters"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["measure", *arguments, "-o", "out"])
    assert result.exit_code == 2
    assert message in result.output


TOPICS = {"animals": "cat dog horse sheep", "weather": "rain snow wind sun", "kitchen": "pan pot knife spoon"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, pico_bert: Path) -> Callable[..., Path]:
    """Return a function that fine-tunes the pico model on two of the three topics, once, and returns its directory."""
    root = tmp_path_factory.mktemp("published")

    @cache
    def make(unknown: str, labels: tuple[str, ...] = tuple(TOPICS)) -> Path:
        return _publish(root / f"no-{unknown}-{len(set(labels))}", pico_bert, unknown, labels)

    return make


def examples(count: int, seed: int, unknown: str = "") -> list[dict[str, str]]:
    """Short texts about all topics but one."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        topic = rng.choice([topic for topic in TOPICS if topic != unknown])
        words = [*rng.sample(TOPICS[topic].split(), 3), *rng.choices(["the", "my", "old", "with"], k=2)]
        rows.append({"text": " ".join(words), "label": topic})
    return rows


def _publish(directory: Path, base: Path, unknown: str, labels: tuple[str, ...]) -> Path:
    """Fine-tune with transformers and torch alone, as somebody else would have."""
    seed = list(TOPICS).index(unknown)
    rows = examples(192, seed, unknown)
    names = dict(zip(TOPICS, labels, strict=True))
    torch.manual_seed(seed)  # so that each begins with another head
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(set(labels)), id2label=dict(enumerate(dict.fromkeys(labels)))
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    order = list(dict.fromkeys(labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(15):
        for start in range(0, len(rows), 16):
            batch = rows[start : start + 16]
            inputs = tokenizer([row["text"] for row in batch], padding=True, return_tensors="pt")
            truth = torch.tensor([order.index(names[row["label"]]) for row in batch])
            model(**inputs, labels=truth).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    lines = [json.dumps({"text": row["text"], "label": names[row["label"]]}) + "\n" for row in rows]
    (directory / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return directory


def measured(model: Path, base: Path, *options: Any, out: Path) -> Path:
    """Measure a published model."""
    data = model / "train.jsonl"
    gramfuse("measure", model, "--base", base, "--data", data, "-o", out, *options)
    return out


def accuracy(directory: Path) -> float:
    """Accuracy on new texts of all topics, with transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = examples(300, 99)
    with torch.no_grad():
        logits = model(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits
    predicted = [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
    return float(np.mean([guess == row["label"] for guess, row in zip(predicted, rows, strict=True)]))


LAYER = "bert.encoder.layer.1.output.dense"


def by_hand(files: list[Path], models: list[Path], factors: tuple[int, int]) -> np.ndarray:
    """W = (Σ c Ĝ)⁻¹ Σ c Ĝ W of one layer, with α = 0.9, as torch stores it."""
    s, t = np.zeros((24, 24)), np.zeros((24, 16))
    for file, model, factor in zip(files, models, factors, strict=True):
        with safe_open(file, "numpy") as tensors:
            packed = tensors.get_tensor(f"gram:{LAYER}").astype(np.float64)
        gram = np.zeros((24, 24))
        gram[np.triu_indices(24)] = packed
        gram = 0.9 * (gram + np.triu(gram, 1).T) + 0.1 * np.diag(np.diag(gram))
        weight = load_file(model / "model.safetensors")[f"{LAYER}.weight"].T.astype(np.float64)
        s, t = s + factor * gram, t + factor * gram @ weight
    return np.linalg.solve(s, t).T


def test_two_published_models_are_merged_from_their_files(
    tmp_path: Path, published: Callable[..., Path], pico_bert: Path
) -> None:
    models = [published("animals"), published("weather")]
    files = [measured(model, pico_bert, out=tmp_path / f"{model.name}.safetensors") for model in models]
    report = gramfuse("merge", *files, "-o", tmp_path / "merged", "--base", pico_bert)
    swapped = gramfuse("merge", *files[::-1], "-o", tmp_path / "swapped", "--base", pico_bert)
    assert [silo["name"] for silo in report["silos"]] == ["no-animals-3", "no-weather-3"]
    assert report["silos"] == swapped["silos"]
    weights = [load_file(tmp_path / way / "model.safetensors") for way in ("merged", "swapped")]
    assert all(weights[0][name].tobytes() == weights[1][name].tobytes() for name in weights[0])
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "merged").returncode == 0

    # One layer against equation 2 of the paper, with the base nowhere in it.
    gramfuse("merge", *files, "-o", tmp_path / "weighed", "--base", pico_bert, "--weight", "no-weather-3=3")
    for way, factors in (("merged", (1, 1)), ("weighed", (1, 3))):
        merged = load_file(tmp_path / way / "model.safetensors")[f"{LAYER}.weight"]
        np.testing.assert_allclose(merged, by_hand(files, models, factors), rtol=1e-3, atol=1e-4)

    scores = [accuracy(directory) for directory in (*models, tmp_path / "merged")]
    assert scores[2] > max(scores[:2]) + 0.1, scores  # alone, no model knows more than two of three topics


def test_models_of_different_labels_keep_their_heads(
    tmp_path: Path, published: Callable[..., Path], pico_bert: Path
) -> None:
    models = [published("animals"), published("weather", ("beast", "other", "other"))]
    files = [measured(model, pico_bert, out=tmp_path / f"{model.name}.safetensors") for model in models]
    with pytest.raises(GramfuseError, match=r"different labels: classification, 3 labels .* --heads own"):
        gramfuse("merge", *files, "-o", tmp_path / "no", "--base", pico_bert)
    gramfuse("merge", *files, "-o", tmp_path / "bodies", "--base", pico_bert, "--heads", "own")
    assert {path.name for path in (tmp_path / "bodies").iterdir()} == {
        *(m.name for m in models),
        "report.html",
        "report.json",
        "SHA256SUMS",
    }
    merged = [load_file(tmp_path / "bodies" / model.name / "model.safetensors") for model in models]
    for tensors, model in zip(merged, models, strict=True):
        own = load_file(model / "model.safetensors")
        assert np.array_equal(tensors["classifier.weight"], own["classifier.weight"])
        assert not np.array_equal(tensors["bert.pooler.dense.weight"], own["bert.pooler.dense.weight"])
        config = AutoConfig.from_pretrained(tmp_path / "bodies" / model.name)
        assert config.id2label == AutoConfig.from_pretrained(model).id2label
    body = [{name: value for name, value in one.items() if not name.startswith("classifier")} for one in merged]
    assert all(np.array_equal(body[0][name], body[1][name]) for name in body[0])


def moved_base(base: Path, to: Path) -> Path:
    """Copy a base and change one number of one tensor."""
    shutil.copytree(base, to)
    changed = AutoModelForSequenceClassification.from_pretrained(base)
    with torch.no_grad():
        changed.bert.encoder.layer[0].output.dense.bias[3] += 1
    changed.bert.save_pretrained(to)
    return to


def with_another_word(model: Path, to: Path) -> Path:
    """Copy a model and change one word of its tokenizer."""
    shutil.copytree(model, to)
    text = (to / "tokenizer.json").read_text(encoding="utf-8")
    (to / "tokenizer.json").write_text(text.replace('"cat"', '"lynx"'), encoding="utf-8")
    return to


def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, published: Callable[..., Path], pico_bert: Path, pico_gpt2: Path
) -> None:
    model = published("animals")
    good = measured(model, pico_bert, "--name", "good", out=tmp_path / "good.safetensors")
    out = tmp_path / "merged"

    def refused(message: str, *arguments: Any) -> None:
        with pytest.raises(GramfuseError, match=message):
            gramfuse(*arguments)
        assert not out.exists()
        assert not list(tmp_path.glob("*.partial"))

    def merge(message: str, other: Path, *options: Any) -> None:
        refused(message, "merge", good, other, "-o", out, "--base", pico_bert, *options)

    # Another base: one number of one tensor is enough; another layout; another tokenizer.
    moved = moved_base(pico_bert, tmp_path / "moved")
    merge(
        r"different base models .*'bert.encoder.layer.0.output.dense.bias'",
        measured(model, moved, "--name", "moved", out=tmp_path / "moved.safetensors"),
    )
    blocks = measured(model, pico_bert, "--name", "blocks", "--gram", "*=block:4", out=tmp_path / "blocks.safetensors")
    merge(r"different layouts: group .* is full and block:4", blocks)
    merge(r"different layouts: group .* is block:4 and full", blocks, "--heads", "own")
    renamed = [with_another_word(path, tmp_path / f"renamed-{path.name}") for path in (model, pico_bert)]
    other = measured(renamed[0], renamed[1], "--name", "lynx", out=tmp_path / "lynx.safetensors")
    merge("bases with different tokenizers", other)
    refused("their tokenizers .* differ", "merge", good, "-o", out, "--base", renamed[1])
    # Another configuration is another base too: what was measured does not mean the same in it.
    louder = shutil.copytree(pico_bert, tmp_path / "louder")
    config = json.loads((louder / "config.json").read_text(encoding="utf-8"))
    (louder / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.5}), encoding="utf-8")
    merge(
        "bases with different configurations",
        measured(model, louder, "--name", "louder", out=tmp_path / "louder.safetensors"),
    )
    refused("their configurations differ", "merge", good, "-o", out, "--base", louder)
    merge("both named 'good'", good)
    three = measured(model, pico_bert, "--name", "three", out=tmp_path / "three.safetensors")
    dense = "'bert.encoder.layer.0.output.dense.bias'"
    refused(dense, "merge", good, three, "-o", out, "--base", moved)
    refused("pass it as --base", "merge", good, three, "-o", out)
    merge("'four'", three, "--weight", "four=2")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(three.read_bytes()[:-1])
    merge(r"cut\.safetensors: .*truncated", cut)

    # What measure refuses, before it measures.
    base = ("--data", model / "train.jsonl", "-o", out)
    refused("BertModel.*--task", "measure", pico_bert, "--base", pico_bert, *base)
    refused("type 'bert'.* 'gpt2'", "measure", model, "--base", pico_gpt2, *base)
    refused("different tokenizers", "measure", model, "--base", renamed[1], *base)
    (louder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}), encoding="utf-8")
    refused("differ in 'hidden_act'", "measure", model, "--base", louder, *base)
    refused("--freeze", "measure", model, "--base", pico_bert, *base, "--freeze", "*layer.0*")
    renamed_column = ("--data", model / "train.jsonl", "-o", out, "--label", "topic")
    refused(
        r"(?s)column 'topic' is missing.*Name yours with --text", "measure", model, "--base", pico_bert, *renamed_column
    )
    refused("PATTERN=STRUCTURE", "measure", model, "--base", pico_bert, *base, "--gram", "full")
    refused("exists already", "measure", model, "--base", pico_bert, "--data", model / "train.jsonl", "-o", good)

    # What fine-tuning did not change may be left out: here nothing but the head differs from the base.
    headed = shutil.copytree(model, tmp_path / "headed")
    config = AutoConfig.from_pretrained(model)
    AutoModelForSequenceClassification.from_pretrained(pico_bert, config=config).save_pretrained(headed)
    same = measured(headed, pico_bert, "--freeze", "embeddings", out=tmp_path / "same.safetensors")
    with safe_open(same, "numpy") as file:
        deltas = {name for name in file.keys() if name.startswith("delta:")}  # noqa: SIM118
        changed = {name for name in deltas if file.get_tensor(name).any()}
    assert changed == {"delta:classifier.weight"}  # its bias begins at zero, as that of the base does
    assert not any("embeddings" in name for name in deltas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_example_merges_two_checkpoints(
    tmp_path: Path, published: Callable[..., Path], pico_bert: Path, dtype: torch.dtype
) -> None:
    models = [published("animals"), published("weather")]
    for directory in models:
        AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype).save_pretrained(directory)
    pairs = [path for model in models for path in (model, model / "train.jsonl")]
    example = Path(__file__).parents[2] / "examples" / "merge_two_checkpoints.py"
    done = subprocess.run(
        [sys.executable, example, pico_bert, *pairs, tmp_path / "merged"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert accuracy(tmp_path / "merged") > max(map(accuracy, models)) + 0.1
