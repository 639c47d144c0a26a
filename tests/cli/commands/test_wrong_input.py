"""Wrong input: a clear error, an exit code, one JSON object, and nothing half-written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_cli.commands import simulate as simulate_module
from gramfuse_simulation import simulate as simulation
from tests.cli.commands.outcomes import GRAMFUSE, Outcome, check_failure, process, tree


def _append(name: str, line: str) -> Callable[[Any], None]:
    def change(project: Any) -> None:
        with project.train(name).open("a") as file:
            file.write(line + "\n")

    return change


def _labels_of_its_own(project: Any) -> None:
    path = project.directory / "data" / "silo-b" / "held-out.jsonl"
    path.write_text(path.read_text().replace('"animals"', '"Tiere"'))


def _replace(path_of: Callable[[Any], Path], old: str, new: str) -> Callable[[Any], None]:
    return lambda project: project.replace(path_of(project), old, new)


def _silo_b(project: Any) -> Path:
    path: Path = project.silo("silo-b")
    return path


def _plan(project: Any) -> Path:
    path: Path = project.plan
    return path


def _locked_to_another_base(project: Any) -> None:
    project.replace(project.plan, 'task = "class', f'sha256 = "{"ab" * 32}"\ntask = "class')


def _locked_to_another_tokenizer(project: Any) -> None:
    project.replace(project.plan, 'task = "class', f'processor = "{"ef" * 32}"\ntask = "class')


def _locked_to_another_configuration(project: Any) -> None:
    project.replace(project.plan, 'task = "class', f'config = "{"12" * 32}"\ntask = "class')


def _locked_to_another_layout(project: Any) -> None:
    project.replace(project.plan, "alpha = 0.9", f'alpha = 0.9\nlayout = "{"cd" * 32}"')


# Each: what goes wrong, the error's type and exit code, and what the message must quote.
# The training files have 24 lines.
WRONG: dict[str, tuple[Callable[[Any], None], str, int, list[str]]] = {
    "missing column": (
        _append("silo-b", '{"words": "a cat", "label": "animals"}'),
        "DataError",
        11,
        ["data/silo-b/train.jsonl:25: ", "'text'", "'words'"],
    ),
    "unknown label": (
        _append("silo-a", '{"text": "a cat", "label": "pets"}'),
        "DataError",
        11,
        ["data/silo-a/train.jsonl:25: ", "'pets'", "'animals', 'weather', 'kitchen'"],
    ),
    "labels that differ between silos": (
        _labels_of_its_own,
        "DataError",
        11,
        ["data/silo-b/held-out.jsonl:", "'Tiere'", "the plan's labels"],
    ),
    "malformed JSON line": (
        _append("silo-b", '{"text": "a cat", "label": "animals"'),
        "DataError",
        11,
        ["data/silo-b/train.jsonl:25: ", "JSON"],
    ),
    "empty file": (
        lambda project: project.train("silo-b").write_text(""),
        "DataError",
        11,
        ["data/silo-b/train.jsonl", "no examples"],
    ),
    "missing data file": (
        lambda project: project.train("silo-b").unlink(),
        "DataError",
        11,
        ["data/silo-b/train.jsonl", "no such file"],
    ),
    "fewer examples than the silo's minimum": (
        _replace(_silo_b, "minimum-examples = 10", "minimum-examples = 25"),
        "RefusalError",
        13,
        ["silos/silo-b.toml", "'limits.minimum-examples'", "24"],
    ),
    "a silo that allows no open uploads": (
        _replace(_silo_b, "open-uploads = true", "open-uploads = false"),
        "RefusalError",
        13,
        ["silos/silo-b.toml", "'limits.open-uploads'"],
    ),
    "unknown key in the plan": (
        _replace(_plan, "alpha = 0.9", "alhpa = 0.9"),
        "PlanError",
        10,
        ["plan.toml: ", "'merge.alhpa'", "alpha"],
    ),
    "unknown key in a silo file": (
        _replace(_silo_b, "open-uploads", "open-upload"),
        "PlanError",
        10,
        ["silos/silo-b.toml: ", "'limits.open-upload'", "open-uploads"],
    ),
    "a fraction of the training data that is none": (
        _replace(_silo_b, 'held-out = "../data/silo-b/held-out.jsonl"', "held-out = 1.5"),
        "PlanError",
        10,
        ["silos/silo-b.toml: 'data.held-out'", "1.5"],
    ),
    "a plan that is not TOML": (
        lambda project: project.plan.write_text("[plan\n"),
        "PlanError",
        10,
        ["plan.toml: not valid TOML", "line 1"],
    ),
    "missing silo file": (
        lambda project: project.silo("silo-b").unlink(),
        "PlanError",
        10,
        ["silos/silo-b.toml: no such file"],
    ),
    "a silo file of another silo": (
        _replace(_silo_b, 'name = "silo-b"', 'name = "silo-c"'),
        "PlanError",
        10,
        ["silos/silo-b.toml: 'name'", "'silo-c'", "'silo-b'"],
    ),
    "a plan locked to another base": (
        _locked_to_another_base,
        "ModelError",
        12,
        ["pico-bert", "ab" * 32, "SHA-256"],
    ),
    "a plan locked to another tokenizer": (
        _locked_to_another_tokenizer,
        "ModelError",
        12,
        ["pico-bert", "ef" * 32, "model.processor"],
    ),
    "a plan locked to another configuration": (
        _locked_to_another_configuration,
        "ModelError",
        12,
        ["pico-bert", "12" * 32, "model.config"],
    ),
    "a plan locked to another layout": (_locked_to_another_layout, "ModelError", 12, ["layout", "cd" * 32]),
    "a base that is not there": (
        _replace(_plan, 'base = "', 'base = "/nowhere'),
        "ModelError",
        12,
        ["/nowhere", "no such directory"],
    ),
    "a freeze pattern that fits nothing": (
        _replace(_plan, '"*embeddings*"', '"*embedings*"'),
        "ModelError",
        12,
        ["training.freeze", "'*embedings*'"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_to_simulate_is_an_error_that_leaves_nothing(
    case: str, pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome], place: Path
) -> None:
    change, kind, code, quoted = WRONG[case]
    project = pico_project(silos=2)
    change(project)
    before = tree(place)
    outcome = gramfuse("simulate", project.directory, "--json")
    check_failure(outcome, kind, code, quoted)
    assert tree(place) == before


def test_a_real_process_fails_the_same_way(pico_project: Callable[..., Any], place: Path) -> None:
    project = pico_project(silos=2)
    _append("silo-b", '{"text": "a cat", "label": "pets"}')(project)
    before = tree(place)
    module = process([sys.executable, "-m", "gramfuse_cli.main"], "simulate", project.directory, "--json")
    check_failure(module, "DataError", 11, ["data/silo-b/train.jsonl:25: unknown label 'pets'"])
    script = process([GRAMFUSE], "simulate", project.directory, "--out", "new/run")
    assert (script.code, script.stdout) == (11, "")
    assert "data/silo-b/train.jsonl:25: unknown label 'pets'" in script.stderr
    assert "gramfuse explain 11" in script.stderr
    assert "Traceback" not in script.stderr
    assert tree(place) == before


@pytest.mark.parametrize(("command", "there"), [("simulate", "one"), ("simulate", "one.partial"), ("run", "one")])
def test_a_run_directory_that_exists_stops_a_run_and_stays_as_it_is(
    command: str,
    there: str,
    pico_project: Callable[..., Any],
    gramfuse: Callable[..., Outcome],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("the run was started all the same")

    monkeypatch.setattr(simulation, "contained", started)
    monkeypatch.setenv("FLWR_HOME", str(place))
    (place / "config.toml").write_text('[superlink.here]\naddress = "127.0.0.1:1"\n')
    project = pico_project(silos=2)
    assert gramfuse("plan", "lock", project.directory).code == 0
    (place / "runs" / there).mkdir(parents=True)
    (place / "runs" / there / "report.json").write_text("precious")
    before = tree(place)
    connection = ["here"] if command == "run" else []
    outcome = gramfuse(command, project.directory, *connection, "--out", "runs/one", "--json")
    assert tree(place) == before, "what was there is another run's"
    check_failure(outcome, "RunDirectoryError", 15, [f"runs/{there} exists already", "--out"])


def test_run_wants_a_locked_plan_and_says_how_to_get_one(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome], place: Path
) -> None:
    project = pico_project(silos=2)
    before = tree(place)
    check_failure(gramfuse("run", project.directory, "--json"), "PlanError", 10, ["not locked", "gramfuse plan lock"])
    assert tree(place) == before


def test_run_refuses_a_layout_file_that_is_not_the_plans(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome], place: Path
) -> None:
    project = pico_project(silos=2)
    assert gramfuse("plan", "lock", project.directory).code == 0
    project.replace(project.directory / "layout.json", '"d_out":16', '"d_out":17')
    outcome = gramfuse("run", project.directory, "--json")
    check_failure(outcome, "PlanError", 10, ["layout.json", "gramfuse plan lock"])


def test_run_without_a_connection_shows_how_to_write_one(
    pico_project: Callable[..., Any],
    gramfuse: Callable[..., Outcome],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(place / "flower"))
    project = pico_project(silos=2)
    assert gramfuse("plan", "lock", project.directory).code == 0
    before = tree(place)
    outcome = gramfuse("run", project.directory, "nowhere", "--json")
    check_failure(outcome, "PlanError", 10, ["config.toml", "'nowhere'", "[superlink.NAME]", "address"])
    assert tree(place) == before


@pytest.mark.parametrize(
    ("setting", "quoted"),
    [
        ("merge.alhpa=1.0", ["'merge.alhpa'", "alpha"]),
        ("merge.alpha=1.5", ["'merge.alpha'", "1.5"]),
        ("merge.alpha", ["merge.alpha", "section.key=value"]),
        ("privacy.secure-aggregation=true", ["secure aggregation of 2 silos"]),
    ],
)
def test_a_setting_that_does_not_fit_is_named(
    setting: str,
    quoted: list[str],
    pico_project: Callable[..., Any],
    gramfuse: Callable[..., Outcome],
    place: Path,
) -> None:
    project = pico_project(silos=2)
    before = tree(place)
    outcome = gramfuse("simulate", project.directory, "--set", setting, "--json")
    check_failure(outcome, "PlanError", 10, ["--set", *quoted])
    assert tree(place) == before


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        (["simulate", "nowhere"], "'nowhere' does not exist"),
        (["simulate", ".", "--sett", "a.b=1"], "--sett"),
        (["simulate", ".", "--seed", "-1"], "--seed"),
        (["simulate", ".", "--compare", "best,fishr"], "'fishr'"),
        (["simulate"], "DIR"),
        (["fuse"], "'fuse'"),
    ],
)
def test_wrong_usage_exits_with_2_and_is_json_if_asked_for(
    arguments: list[str], quoted: str, gramfuse: Callable[..., Outcome]
) -> None:
    check_failure(gramfuse(*arguments, "--json"), "UsageError", 2, [quoted])
    outcome = gramfuse(*arguments)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert quoted in outcome.stderr


def test_a_bug_of_ours_is_an_error_too_and_stays_json(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(simulate_module, "run_simulation", fail)
    outcome = gramfuse("simulate", pico_project(silos=2).directory, "--json")
    assert outcome.code == 1
    assert (outcome.object["error"]["type"], outcome.object["error"]["exit_code"]) == ("InternalError", 1)
    assert "ZeroDivisionError" in outcome.stderr


def test_there_is_nothing_to_resume_where_nothing_was_interrupted(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome], place: Path
) -> None:
    project = pico_project(silos=4, secure=True)
    assert gramfuse("plan", "lock", project.directory).code == 0
    outcome = gramfuse("run", project.directory, "somewhere", "--resume", place / "run", "--json")
    check_failure(outcome, "RunDirectoryError", 15, ["nothing to resume", "run.partial"])
    both = gramfuse("run", project.directory, "somewhere", "--resume", place / "run", "--out", place / "other")
    assert both.code == 2
