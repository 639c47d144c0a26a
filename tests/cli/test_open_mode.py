"""`gramfuse tune` and `--compare` at the command line: what they print and leave, and what they refuse."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gramfuse_cli.commands.tune import show_tuning
from gramfuse_cli.main import cli
from gramfuse_protocol.errors import DataError, GramfuseError, PlanError
from gramfuse_server.report.choices import Tuning
from loopback import BIN


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["tune", *map(str, arguments)])


def command(*arguments: str | Path) -> dict[str, Any]:
    """Run a command that has to succeed, in this process; return its object."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_a_secure_project_is_compared_in_open_mode_only(tmp_path: Path, pico_project: Callable[..., Any]) -> None:
    project = pico_project(silos=4, secure=True)
    compare = ["--compare", "simple,best,fedavg:1", "--out", str(tmp_path / "run")]
    refused = CliRunner().invoke(cli, ["simulate", str(project.directory), *compare])
    assert isinstance(refused.exception, PlanError)
    assert str(refused.exception).startswith("--compare best,fedavg:1: ")
    assert "--open" in str(refused.exception)
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(500)
def test_a_project_is_tuned_and_the_report_is_of_the_other_half(
    tmp_path: Path, pico_project: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    project = pico_project(silos=3, secure=True)
    out = tmp_path / "run"
    done = subprocess.run(
        [
            str(BIN / "gramfuse"),
            "tune",
            str(project.directory),
            *["--open", "--alpha", "0.5,0.9", "--influence", "--compare", "best,fedavg:1", "--json", "--out"],
            str(out),
        ],
        capture_output=True,
        text=True,
        timeout=450,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert json.loads((out / "report.json").read_text()) == {k: v for k, v in report.items() if k != "run"} | {
        "run": out.name
    }
    tuning = report["tuning"]
    assert [entry["alpha"] for entry in tuning["alpha"]] == [0.5, 0.9]
    assert {model["metrics"]["examples"] for model in report["models"]} == {30}
    assert "alpha 0.5" in done.stderr
    assert report["mode"] == "open"
    assert "open-uploads = false" in project.silo("silo-a").read_text()
    models = {model["kind"]: model["metrics"] for model in report["models"]}
    assert models["fedavg"] == pytest.approx(models["simple"], rel=1e-5)
    assert max(m["metrics"]["accuracy"] for m in report["models"] if m["kind"] == "silo") == models["best"]["accuracy"]
    for shown in ("  best         …", "  fedavg, round 1 of 1 measured", "  fedavg (1 round) measured"):
        assert shown in done.stderr
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=out, check=False).returncode == 0
    card = (out / "model" / "README.md").read_text()
    assert "% of the trained parameters" in card
    assert (
        f"alpha {tuning['chosen']['alpha']}, uniform weighting with silo-a × 1, silo-b × 1, silo-c × 1, chosen on"
        in card
    )

    show_tuning(Tuning.read(tuning))
    shown = capsys.readouterr().out
    assert f"α = {tuning['chosen']['alpha']:g}, chosen" in shown
    assert "without silo-a" in shown


@pytest.fixture
def files(pico_project: Callable[..., Any], tmp_path: Path) -> list[Path]:
    """Statistics files of the three silos of a project; validation.jsonl and test.jsonl share one text."""
    project = pico_project(silos=3)
    digest = command("plan", "lock", project.directory)["plan_digest"]
    found = []
    for name in project.names:
        project.replace(project.silo(name), "approved = []", f'approved = ["{digest}"]')
        found.append(tmp_path / f"{name}.safetensors")
        command("measure", "--plan", project.directory, "--silo", name, "-o", found[-1])
    rows = [
        (project.directory / "data" / name / "held-out.jsonl").read_text().splitlines(keepends=True)
        for name in project.names
    ]
    (tmp_path / "validation.jsonl").write_text("".join([*rows[0], *rows[1]]))
    (tmp_path / "test.jsonl").write_text("".join([rows[0][0], *rows[2]]))
    return found


def test_files_are_tuned_and_the_model_is_that_of_merge_with_what_was_chosen(
    files: list[Path], tmp_path: Path, pico_bert: Path
) -> None:
    data = ["--base", pico_bert, "--validation", tmp_path / "validation.jsonl", "--test", tmp_path / "test.jsonl"]
    wanted = ["--alpha", "0,0.5,0.9", "--weights", "--order", "given", "--influence"]
    report = command("tune", *files, *data, *wanted, "-o", tmp_path / "tuned")
    tuning, chosen = report["tuning"], report["tuning"]["chosen"]
    assert sum(tuning["examples"].values()) == 39, "the text that is reported on is not chosen by"
    assert {model["metrics"]["examples"] for model in report["models"]} == {21}
    assert [step["silos"][-1] for step in tuning["order"]] == ["silo-a", "silo-b", "silo-c"]
    assert report["alpha"] == chosen["alpha"]
    assert {silo["name"]: silo["weight"] for silo in report["silos"]} == chosen["weights"]

    weights = [part for silo, weight in chosen["weights"].items() for part in ("--weight", f"{silo}={weight}")]
    command("merge", *files, "--base", pico_bert, "--alpha", chosen["alpha"], *weights, "-o", tmp_path / "merged")
    model = "model.safetensors"
    assert (tmp_path / "tuned" / model).read_bytes() == (tmp_path / "merged" / model).read_bytes()

    assert run(*files, *data).exit_code == 2
    assert run(*files, *data, "-o", tmp_path / "other", "--open").exit_code == 2
    test = tmp_path / "test.jsonl"
    same = run(*files, "--base", pico_bert, "--validation", test, "--test", test, "-o", tmp_path / "x")
    assert isinstance(same.exception, DataError)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("secure", "settings", "words"),
    [
        (True, (), ["secure-aggregation", "Agree on merge.alpha before the run", "--open"]),
        (False, ("--set", "privacy.metrics=none"), ["held-out metrics", "privacy.metrics=sum"]),
        (False, ("--set", "merge.rounds=2"), ["one round", "merge.rounds=1"]),
    ],
    ids=["secure", "no metrics", "rounds"],
)
def test_what_cannot_be_compared_is_refused(
    secure: bool, settings: tuple[str, ...], words: list[str], tmp_path: Path, pico_project: Callable[..., Any]
) -> None:
    project = pico_project(silos=4, secure=secure)
    result = run(project.directory, "--out", tmp_path / "run", *settings)
    assert isinstance(result.exception, GramfuseError)
    for word in words:
        assert word in str(result.exception)
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize("grid", ["0.5;0.7", "0.5,1.1", ""])
def test_a_grid_is_numbers_between_0_and_1(grid: str, pico_project: Callable[..., Any]) -> None:
    result = run(pico_project().directory, "--alpha", grid)
    assert result.exit_code == 2
    assert "--alpha" in result.output
