"""A regression of any size: trained on numbers of about 1, measured and written on the targets' own scale."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers import BertModel, GPT2Config, GPT2ForSequenceClassification

from gramfuse_cli.main import cli
from gramfuse_cli.show.progress import RunProgress
from gramfuse_client.data.examples import load
from gramfuse_client.data.targets import propose
from gramfuse_client.exchange.offline import contribute
from gramfuse_client.guard.policy import check_data
from gramfuse_client.state.state import State
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.probing.suitable import check_suitable
from gramfuse_model.project import Project
from gramfuse_model.rescaling import fold
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError, ModelError
from gramfuse_server.merging.files import Settings, merge_files
from gramfuse_simulation.engine import simulated_silo
from gramfuse_simulation.simulate import run_simulation
from tests.projects import Simulated, bert_config, write_project

SILOS = ("north", "south", "east")
ANIMALS, OTHERS = ["cat", "dog", "horse", "sheep"], ["rain", "snow", "the", "a", "of", "and"]
SIZES = {"small": (3e-5, 1e-4), "usual": (0.0, 1.0), "large": (-4e6, 1e5)}
"""Centre and scale of the targets."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, pico_tokenizer: Any) -> Path:
    """A BERT whose random weights are large enough to tell words apart."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(4)
    config = bert_config(len(pico_tokenizer), initializer_range=0.2)
    BertModel(config).save_pretrained(directory)
    pico_tokenizer.save_pretrained(directory)
    return directory


def rows(count: int, seed: int, centre: float, scale: float) -> list[dict[str, Any]]:
    """Texts, and how many of their words are animals, on some scale."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        words = [rng.choice(rng.choice([ANIMALS, OTHERS])) for _ in range(6)]
        size = (sum(word in ANIMALS for word in words) - 3) / 1.5
        found.append({"text": " ".join(words), "label": centre + scale * size})
    return found


def project(directory: Path, base: Path, size: str, settings: str) -> Path:
    centre, scale = SIZES[size]
    data = {
        name: ("", rows(64, number, centre, scale), rows(24, 100 + number, centre, scale))
        for number, name in enumerate(SILOS)
    }
    return write_project(
        directory,
        f'[plan]\nname = "numbers"\n[model]\nbase = "{base}"\ntask = "regression"\nmax-length = 16\n{settings}\n'
        "[training]\nepochs = 12\nlearning-rate = 3e-3\nbatch-size = 8\n"
        '[privacy]\nmetrics-epsilon = "none"\n',
        data,
        "exact-metrics = true\n",
    )


def settings_of(size: str) -> str:
    centre, scale = SIZES[size]
    return f"centre = {centre}\nscale = {scale}\nrange = [{centre - 3 * scale}, {centre + 3 * scale}]"


def run(directory: Path, place: Path, grid: Any, *settings: str) -> dict[str, Any]:
    here = Simulated(directory, place, *settings, identities=True)
    report = here.run(grid, own_heads=here.finish).document()
    assert report["unmeasured"] is None, report["checks"]
    return report


def answers(model: Path, directory: Path, silos: tuple[str, ...] = SILOS) -> tuple[np.ndarray, np.ndarray]:
    """What a written model gives, as anybody would ask it, and the truth."""
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lines = [line for n in silos for line in (directory / f"{n}-held-out.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in lines]
    with torch.no_grad():
        given = tokenizer([row["text"] for row in found], padding=True, return_tensors="pt")
        said = loaded(**given).logits.squeeze(-1).double().numpy()
    return said, np.array([row["label"] for row in found])


def test_targets_of_every_size_are_learned_measured_and_answered_alike(
    tmp_path: Path, base: Path, in_process_grid: Any
) -> None:
    found = {}
    for size, (centre, scale) in SIZES.items():
        directory = project(tmp_path / size, base, size, settings_of(size))
        report = run(directory, tmp_path / size, in_process_grid)
        metrics = next(model["metrics"] for model in report["models"] if model["name"] == "regmean")
        said, true = answers(tmp_path / size / "run" / "model", directory)
        assert metrics["pearson"] == pytest.approx(np.corrcoef(said, true)[0, 1], abs=1e-4)
        assert metrics["pearson"] > 0.7
        assert metrics["rmse"] == pytest.approx(math.sqrt(np.mean((said - true) ** 2)), rel=1e-3)
        assert metrics["mae"] == pytest.approx(np.mean(np.abs(said - true)), rel=1e-3)
        assert metrics["rmse"] < 0.5 * scale
        found[size] = (said - centre) / scale
    assert found["small"] == pytest.approx(found["usual"], abs=1e-3)
    assert found["large"] == pytest.approx(found["usual"], abs=1e-2), "float32 has no more digits at that size"


def test_models_with_heads_of_their_own_and_models_from_files_give_targets_too(
    tmp_path: Path, base: Path, in_process_grid: Any
) -> None:
    directory = project(tmp_path / "own", base, "large", settings_of("large"))
    report = run(directory, tmp_path / "own", in_process_grid, "model.head=own", "privacy.metrics=silo")
    (found,) = (model["silos"] for model in report["models"] if model["name"] == "regmean")
    for silo in SILOS:
        (kept,) = (tmp_path / "own" / "state" / silo).glob("*/model")
        for place in (kept, tmp_path / "own" / "run" / "models" / silo):
            said, true = answers(place, directory, (silo,))
            assert found[silo]["rmse"] == pytest.approx(math.sqrt(np.mean((said - true) ** 2)), rel=1e-3)
            assert found[silo]["rmse"] < 0.7 * SIZES["large"][1]

    opened = ["privacy.secure-aggregation=false", "privacy.metrics=none"]
    plan, layout = Project.read(directory, opened).locked()
    files = []
    for name in SILOS:
        silo = simulated_silo(str(directory / "silos" / f"{name}.toml"), str(tmp_path / "files"), plan.digest)
        files.append(tmp_path / f"{name}.safetensors")
        contribute(silo, plan, layout, files[-1], State(silo.state, plan.digest))
    merge_files(files, tmp_path / "merged", Settings(base=str(base)), tmp_path)
    said, true = answers(tmp_path / "merged", directory)
    assert math.sqrt(np.mean((said - true) ** 2)) < 0.5 * SIZES["large"][1]


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_plan_whose_scale_does_not_fit_is_refused_where_the_data_are_and_what_fits_is_said(
    tmp_path: Path, base: Path, size: str
) -> None:
    centre, scale = SIZES[size]
    wide = f"range = [{centre - 5 * scale}, {centre + 5 * scale}]"
    directory = project(tmp_path / "numbers", base, size, wide)
    with pytest.raises(DataError, match="centre = ") as caught:
        run_simulation(Project.read(directory), tmp_path / "run", RunProgress)
    assert "north.toml" in str(caught.value)
    assert not (tmp_path / "run").exists()
    check = CliRunner().invoke(
        cli, ["silo", "check", str(directory / "silos" / "north.toml"), "--plan", str(directory), "--offline", "--json"]
    )
    (data,) = (found for found in json.loads(check.stdout)["findings"] if found["subject"] == "data")
    assert data["state"] == "problem"
    assert "scale = " in data["remedy"]

    fitting = propose([row["label"] for row in rows(64, 0, centre, scale)])
    assert fitting is not None
    assert 0.5 < fitting.scale / scale < 2
    assert abs(fitting.centre - centre) < scale
    (directory / "plan.toml").write_text((directory / "plan.toml").read_text().replace(wide, "\n".join(fitting.lines)))
    check = CliRunner().invoke(
        cli, ["silo", "check", str(directory / "silos" / "north.toml"), "--plan", str(directory), "--offline", "--json"]
    )
    (data,) = (found for found in json.loads(check.stdout)["findings"] if found["subject"] == "data")
    assert (data["state"], data["remedy"]) == ("ok", "")


Targets = Callable[[float], float]
"""What is made of a number of about 1 around 0."""


def with_targets(directory: Path, change: Targets) -> None:
    for path in directory.glob("*.jsonl"):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "label": change(row["label"])}) + "\n" for row in found))


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ("centre = 0\nscale = 1", lambda x: 50 + 5 * x, ["mean 50", "centre = 50.0", "scale = 4.0"]),
        ("centre = 0\nscale = 2e6", lambda x: 2e6 + 1e3 * x, ["deviation 0.000", "centre = 2000"]),
        ("centre = 0\nscale = 1", lambda _: 50.0, ["all targets are 50"]),
        ("centre = 0\nscale = 2e6", lambda x: 2e6 + 0.005 * x, ["float32", "the same number", "2000000.0"]),
        ("centre = 2e6\nscale = 0.005", lambda x: 2e6 + 0.005 * x, ["float32", "centre = ", "scale = 0.004"]),
        ("centre = 2e6\nscale = 1", lambda x: 2e6 + 1e-9 * round(x), ["float32"]),
        ("centre = 0\nscale = 1", lambda x: 1e39 * x, ["another unit"]),
        ("centre = 0\nscale = 1", lambda x: 1e-200 * x, ["another unit"]),
    ],
    ids=[
        "far off",
        "all but alike",
        "alike and far off",
        "too fine",
        "too fine",
        "finer still",
        "huge",
        "tiny",
    ],
)
def test_targets_that_no_model_would_tell_apart_are_refused_with_what_to_do(
    tmp_path: Path, base: Path, settings: str, change: Targets, said: list[str]
) -> None:
    directory = project(tmp_path / "numbers", base, "usual", f"{settings}\nrange = [-1e300, 1e300]")
    with_targets(directory, change)
    with pytest.raises(DataError) as caught:
        run_simulation(Project.read(directory), tmp_path / "run", RunProgress)
    for words in ["north.toml", *said]:
        assert words in str(caught.value)


def test_targets_on_a_scale_that_fits_badly_are_told_before_and_while_a_silo_takes_part(
    tmp_path: Path,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = project(tmp_path / "numbers", base, "usual", "centre = 0\nscale = 1\nrange = [-1e3, 1e3]")
    with_targets(directory, lambda x: 5 + 2 * x)
    advice = "for these data: centre = 5.0, scale = "
    with monkeypatch.context() as patch:
        patch.setattr(Project, "locked", lambda _: (_ for _ in ()).throw(ModelError("no further")))
        with pytest.raises(ModelError, match="no further"):
            run_simulation(Project.read(directory), tmp_path / "run", RunProgress)
    said = capsys.readouterr().err.replace("\n", " ")
    assert all(f"{silo}: targets from " in said for silo in SILOS)
    assert said.count(advice) == len(SILOS)
    check = CliRunner().invoke(
        cli, ["silo", "check", str(directory / "silos" / "north.toml"), "--plan", str(directory), "--offline", "--json"]
    )
    (data,) = (found for found in json.loads(check.stdout)["findings"] if found["subject"] == "data")
    assert (data["state"], advice in data["remedy"]) == ("ok", True)
    plan = Project.read(directory).plan
    silo = simulated_silo(str(directory / "silos" / "north.toml"), str(tmp_path / "state"), plan.digest)
    task = plan.task_of("north")
    with caplog.at_level("WARNING"):
        check_data(silo, task, *load(silo, task))
    assert advice in caplog.text


def test_who_approves_a_plan_sees_the_scale_of_its_targets(tmp_path: Path, base: Path) -> None:
    directory = project(tmp_path / "numbers", base, "large", settings_of("large"))
    shown = CliRunner().invoke(cli, ["plan", "show", str(directory)]).stdout
    assert "task regression, targets: (value + 4e+06) / 100000" in shown


def test_a_project_for_targets_begins_with_what_fits_them(tmp_path: Path) -> None:
    data = tmp_path / "prices.jsonl"
    data.write_text(
        "".join(json.dumps({"text": row["text"], "price": row["label"]}) + "\n" for row in rows(64, 0, 250, 40))
    )
    made = CliRunner().invoke(
        cli, ["init", str(tmp_path / "project"), "--targets", str(data), "--label", "price", "--json"]
    )
    assert made.exit_code == 0, made.output
    plan = Project.read(tmp_path / "project").plan
    task = plan.task_of("bank")
    assert (task.task, task.centre, task.scale, task.range) == ("regression", 250.0, 30.0, (190.0, 330.0))
    refused = CliRunner().invoke(cli, ["init", str(tmp_path / "other"), "--targets", str(data)])
    assert isinstance(refused.exception, DataError)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([0.0, 5.0, 2.5, 1.0], (2.0, 2.0, 0.0, 5.0)),
        ([1e-5, 2e-5, 4e-5], (2e-5, 1e-5, 1e-5, 4e-5)),
        ([-3e5, 4e5], (0.0, 4e5, -3e5, 4e5)),
        ([1e6, 1e6 + 3], (1000002.0, 2.0, 1000000.0, 1000003.0)),
        ([7.0, 7.0], None),
    ],
)
def test_what_is_proposed_is_round_and_no_target_is_beyond(targets: list[float], expected: Any) -> None:
    found = propose(targets)
    assert (found and (found.centre, found.scale, found.low, found.high)) == expected


def test_without_a_range_a_secure_plan_has_one_scale_on_each_side_of_the_centre(tmp_path: Path, base: Path) -> None:
    directory = project(tmp_path / "numbers", base, "large", "centre = 5\nscale = 2")
    assert Project.read(directory).plan.task_of("north").range == (3.0, 7.0)
    with pytest.raises(DataError, match="range of 3 to 7"):
        run_simulation(Project.read(directory), tmp_path / "run", RunProgress)


def test_a_head_that_cannot_give_targets_is_refused_before_a_plan_is_locked(
    tmp_path: Path, pico_gpt2: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = project(tmp_path / "numbers", pico_gpt2, "large", settings_of("large"))
    with pytest.raises(ModelError, match=r"no bias.*'centre'"):
        Project.read(directory).locked()
    Project.read(directory, ["model.centre=0"]).locked()

    directory = project(tmp_path / "others", base, "large", settings_of("large"))
    plan = Project.read(directory).plan
    loaded, task = load_base(plan, directory), plan.task_of("north")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    check_suitable(loaded, task)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())

    forward = type(loaded.model.classifier).forward
    monkeypatch.setattr(type(loaded.model.classifier), "forward", lambda self, x: forward(self, x) ** 3)
    with pytest.raises(ModelError, match="not linear"):
        check_suitable(loaded, task)
    loaded.model.classifier = torch.nn.Identity()
    with pytest.raises(ModelError, match="one output"):
        check_suitable(loaded, task)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("head", ["same", "different", "own"])
def test_a_base_that_is_right_already_stays_right(
    tmp_path: Path, base: Path, in_process_grid: Any, size: str, head: str
) -> None:
    centre, scale = SIZES[size]
    torch.manual_seed(9)
    right = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).eval()
    with torch.no_grad():
        right.classifier.weight.copy_(3 * scale * right.classifier.weight / right.classifier.weight.norm())
        right.classifier.bias.fill_(centre + 0.5 * scale)
    right.save_pretrained(tmp_path / "right")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "right")
    wide = f"centre = {centre}\nscale = {scale}\nrange = [{centre - 9 * scale}, {centre + 9 * scale}]"
    directory = project(tmp_path / "numbers", tmp_path / "right", size, wide)
    for path in directory.glob("*.jsonl"):
        found = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        with torch.no_grad():
            said = right(**tokenizer(found, padding=True, return_tensors="pt")).logits.squeeze(-1).tolist()
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in zip(found, said, strict=True)]
        path.write_text("".join(lines))
    loaded = load_base(Project.read(directory).plan, directory)
    given = tokenizer(["the cat", "a dog and rain"], padding=True, return_tensors="pt")
    with torch.no_grad():
        before = (right(**given).logits.double() - centre) / scale
        assert torch.allclose(loaded.model(**given).logits.double(), before, atol=1e-3)
    metrics = "silo" if head == "own" else "sum"
    settings = (f"model.head={head}", f"privacy.metrics={metrics}", "training.learning-rate=1e-7", "training.epochs=1")
    run(directory, tmp_path / "numbers", in_process_grid, *settings)
    places = [tmp_path / "numbers" / "run" / "model"]
    if head == "own":
        places = [tmp_path / "numbers" / "run" / "models" / silo for silo in SILOS]
    for place in places:
        answered, true = answers(place, directory)
        assert np.abs(answered - true).max() < 0.01 * scale


def test_a_scale_without_a_bias_is_folded_where_the_centre_is_zero() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    given = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with torch.no_grad():
        before = model(given).logits
        fold(model, Task(task="regression", scale=1e4))
        assert torch.allclose(model(given).logits, 1e4 * before, rtol=1e-5)


def test_what_travels_does_not_say_how_large_targets_are(tmp_path: Path, base: Path, in_process_grid: Any) -> None:
    """A silo whose targets do not fit fails with the text of any other failure."""
    directory = project(tmp_path / "numbers", base, "usual", "range = [-1e9, 1e9]\ncentre = 0\nscale = 1")
    far = [{**row, "label": 1e8 * row["label"]} for row in rows(64, 2, 0.0, 1.0)]
    (directory / "east-train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in far))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(directory, tmp_path / "numbers", in_process_grid)
    assert "own log" in str(caught.value)
    assert "scale" not in str(caught.value)
