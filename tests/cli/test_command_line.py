"""Wrong input at the command line: a clear error, an exit code, one JSON object, and nothing half-written.

Most tests call the entry point in this process, with all that `main` does; a few start a real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import tomlkit

from gramfuse_cli.commands import simulate as simulate_module
from gramfuse_cli.main import cli, main
from gramfuse_model.project import Project
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.node_key import public_of
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.secure_sum.keys import Identity

GRAMFUSE = str(Path(sys.executable).with_name("gramfuse"))


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def object(self) -> dict[str, Any]:
        """The one JSON object that standard output must be, whole."""
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        return value


@pytest.fixture
def gramfuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Return a function that runs a command in this process, as the console script does."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["gramfuse", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        stdout, stderr = capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, stdout, stderr)

    yield run
    signal.signal(signal.SIGTERM, before)


def process(command: list[str], *arguments: str | Path) -> Outcome:
    """Run a command as a process of its own."""
    done = subprocess.run(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, and a directory for temporary files, which is empty afterwards; Ray's paths are short."""
    with tempfile.TemporaryDirectory() as temporary:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield tmp_path
        assert os.listdir(temporary) == []


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory: the bytes of each file, None for a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def check_failure(outcome: Outcome, kind: str, code: int, quoted: list[str]) -> None:
    """Check a failure under --json: the code, the only object on standard output, and the text for people."""
    assert outcome.code == code, outcome.stderr
    assert outcome.object.keys() == {"error"}
    error = outcome.object["error"]
    assert error.keys() == {"type", "message", "exit_code"}
    assert (error["type"], error["exit_code"]) == (kind, code)
    for words in quoted:
        assert words in error["message"]
        assert words in outcome.stderr
    assert "Traceback" not in outcome.stderr


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
        ["data/silo-b/held-out.jsonl:", "'Tiere'", "All silos must use the plan's labels"],
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

    monkeypatch.setattr(simulate_module, "contained", started)
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
        (["simulate", ".", "--compare", "best,fishr"], "'fishr' is nothing to compare with; there are best, ensemble"),
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


def test_init_makes_a_project_whose_plan_and_silos_read(gramfuse: Callable[..., Outcome], place: Path) -> None:
    from gramfuse_client.data.examples import load
    from gramfuse_client.silo_file import Silo

    outcome = gramfuse("init", "new/merge", "--json")
    assert outcome.code == 0
    directory = place / "new" / "merge"
    assert outcome.object == {"directory": str(directory)}
    plan = Plan.read(directory / "plan.toml")
    assert {path.stem for path in (directory / "silos").iterdir()} == set(plan.names)
    for name in plan.names:
        silo = Silo.read(directory / "silos" / f"{name}.toml")
        assert silo.name == name
        assert silo.file.approved == (), "a project from a template has approved nothing"
        train, held_out = load(silo, plan.task_of(name))
        assert len(train) >= 250
        assert len(held_out) >= 50
        assert not set(train.inputs) & set(held_out.inputs)


def test_init_fills_an_empty_directory_and_says_what_comes_next(gramfuse: Callable[..., Outcome], place: Path) -> None:
    (place / "merge").mkdir()
    outcome = gramfuse("init", "merge")
    assert outcome.code == 0
    assert "gramfuse simulate merge" in outcome.stdout
    assert (place / "merge" / "plan.toml").is_file()


@pytest.mark.parametrize("there", ["merge/.hidden", "merge"], ids=["a file in it", "a file"])
def test_init_refuses_what_is_not_empty(there: str, gramfuse: Callable[..., Outcome], place: Path) -> None:
    (place / there).parent.mkdir(exist_ok=True)
    (place / there).write_text("precious")
    before = tree(place)
    check_failure(gramfuse("init", "merge", "--json"), "PlanError", 10, ["merge", "not empty"])
    assert tree(place) == before


def test_init_where_nothing_can_be_made_is_an_error_not_a_bug(gramfuse: Callable[..., Outcome], place: Path) -> None:
    (place / "file").write_text("not a directory")
    outcome = gramfuse("init", "file/merge", "--json")
    assert outcome.object["error"]["type"] != "InternalError"
    assert "Traceback" not in outcome.stderr
    assert "file/merge" in outcome.object["error"]["message"]


def test_lock_pins_base_and_layout_keeps_all_else_and_is_idempotent(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=2)
    project.replace(project.plan, "[merge]\n", "# Why alpha is so large.\n[merge] # of merging\n")
    written = project.plan.read_text()
    first = gramfuse("plan", "lock", project.directory, "--json")
    assert first.code == 0
    locked = project.plan.read_text()
    files = tree(project.directory)
    added = [line for line in locked.splitlines() if line not in written.splitlines()]
    assert [line for line in locked.splitlines() if line not in added] == written.splitlines()
    assert added == [
        f'sha256 = "{first.object["base_sha256"]}"',
        f'config = "{first.object["config_sha256"]}"',
        f'processor = "{first.object["processor_sha256"]}"',
        f'layout = "{first.object["layout_digest"]}"',
    ]
    plan = Plan.read(project.plan)
    assert plan.locked
    assert plan.digest == first.object["plan_digest"]
    assert Layout.read(project.directory / "layout.json").digest == plan.merge.layout
    again = gramfuse("plan", "lock", project.directory, "--json")
    assert again.object == first.object
    assert tree(project.directory) == files


def test_lock_again_follows_a_change_of_the_plan(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=2)
    first = gramfuse("plan", "lock", project.directory, "--json").object
    project.replace(project.plan, '"full"', '"block:4"')
    stale = gramfuse("plan", "show", project.directory, "--json")
    check_failure(stale, "ModelError", 12, ["layout", first["layout_digest"]])
    second = gramfuse("plan", "lock", project.directory, "--json").object
    assert second["base_sha256"] == first["base_sha256"]
    assert second["layout_digest"] != first["layout_digest"]
    assert second["plan_digest"] != first["plan_digest"]
    assert gramfuse("plan", "show", project.directory, "--json").object["plan_digest"] == second["plan_digest"]


def test_lock_makes_a_merge_section_where_the_plan_has_none(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=2)
    document = tomlkit.parse(project.plan.read_text())
    del document["merge"]
    project.plan.write_text(tomlkit.dumps(document))
    outcome = gramfuse("plan", "lock", project.directory, "--json")
    assert outcome.code == 0
    assert Plan.read(project.plan).digest == outcome.object["plan_digest"]


def test_a_lock_that_fails_changes_nothing(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome], place: Path
) -> None:
    project = pico_project(silos=2)
    assert gramfuse("plan", "lock", project.directory).code == 0
    project.replace(project.plan, 'base = "', 'base = "/nowhere')
    before = tree(place)
    check_failure(gramfuse("plan", "lock", project.directory, "--json"), "ModelError", 12, ["/nowhere"])
    assert tree(place) == before


def test_lock_of_another_plan_file_does_not_change_plan_toml(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=2)
    variant = project.directory / "variant.toml"
    variant.write_text(project.plan.read_text().replace('"full"', '"diagonal"'))
    before = project.plan.read_bytes()
    outcome = gramfuse("plan", "lock", variant, "--json")
    assert project.plan.read_bytes() == before
    assert outcome.code != 0 or Plan.read(variant).digest == outcome.object["plan_digest"]


@pytest.mark.parametrize("structure", ["full", "block:5", "diagonal"])
def test_show_agrees_with_the_layout_that_lock_writes(
    structure: str, pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome], place: Path
) -> None:
    project = pico_project(silos=3)
    project.replace(project.plan, '"full"', f'"{structure}"')
    before = tree(place)
    unlocked = gramfuse("plan", "show", project.directory, "--json").object
    assert tree(place) == before, "show writes nothing"
    assert unlocked["locked"] is False
    lock = gramfuse("plan", "lock", project.directory, "--json").object
    shown = gramfuse("plan", "show", project.directory, "--json").object
    assert shown["locked"] is True
    for key in ("plan_digest", "base_sha256", "layout_digest"):
        assert shown[key] == lock[key] == unlocked[key]

    layout = json.loads((project.directory / "layout.json").read_text())
    gram_entries = 0
    for group, laid in zip(shown["groups"], layout["groups"], strict=True):
        assert (group["name"], group["d_in"]) == (laid["name"], laid["d_in"])
        assert group["weights"] == [weight["weight"] for weight in laid["weights"]]
        width = {"full": laid["d_in"], "block:5": 5, "diagonal": 1}[structure]
        blocks = [min(width, laid["d_in"] - start) for start in range(0, laid["d_in"], width)]
        assert group["entries"] == sum(block * (block + 1) // 2 for block in blocks)
        assert group["bytes"] == 4 * group["entries"]
        gram_entries += group["entries"]
    sizes = {tensor["name"]: tensor["shape"] for tensor in layout["tensors"]}
    delta_entries = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in sizes.values())
    in_closed_form = {weight for group in shown["groups"] for weight in group["weights"]}
    assert in_closed_form | set(shown["averaged"]) == set(sizes)
    assert not in_closed_form & set(shown["averaged"])
    assert shown["frozen"] == layout["frozen"]
    assert all("embeddings" in name for name in shown["frozen"])
    cost = shown["cost"]
    assert cost["gram_bytes"] == 4 * gram_entries
    assert cost["delta_bytes"] == 4 * delta_entries
    assert cost["upload_bytes"] == cost["gram_bytes"] + cost["delta_bytes"]
    assert cost["coordinator_disk_bytes"] >= 3 * cost["upload_bytes"]


def test_show_prints_a_line_for_each_gram_matrix(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=2)
    shown = gramfuse("plan", "show", project.directory, "--json").object
    printed = gramfuse("plan", "show", project.directory).stdout
    assert shown["plan_digest"] in printed
    assert "not locked" in printed
    lines = printed.splitlines()
    for group in shown["groups"]:
        modules = [weight.removesuffix(".weight") for weight in group["weights"]]
        words = [modules[0].rpartition(".")[0], *(module.rpartition(".")[2] for module in modules)]
        numbers = [f"{group['d_in']:,}", group["structure"], f"{group['entries']:,}", f"{group['bytes']:,}"]
        assert any(line.split()[-4:] == numbers and all(word in line for word in words) for line in lines), modules


def test_keygen_makes_private_files_once_and_prints_what_the_plan_takes(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=3)
    made = gramfuse("silo", "keygen", project.silo("silo-a"))
    assert made.code == 0, made.stderr
    key = project.identity("silo-a")
    assert key.stat().st_mode & 0o777 == 0o600
    identity = Identity.parse(key.read_text(), str(key))
    node_key = project.silo("silo-a").with_suffix(".key")
    assert node_key.stat().st_mode & 0o777 == 0o600
    line = public_of(node_key.read_text(), str(node_key))
    assert made.stdout == f'[[silo]]\nname = "silo-a"\npublic-key = "{identity.public.hex()}"\nnode-key = "{line}"\n'
    assert "PRIVATE" not in made.stdout + made.stderr

    before = key.read_bytes(), node_key.read_bytes()
    assert gramfuse("silo", "keygen", project.silo("silo-a")).stdout == made.stdout
    assert (key.read_bytes(), node_key.read_bytes()) == before
    other = gramfuse("silo", "keygen", project.silo("silo-b"), "--json").object
    assert other["name"] == "silo-b"
    assert other["identity"] == str(project.identity("silo-b"))
    assert other["public_key"] != identity.public.hex()
    assert other["node_key_file"] == str(project.silo("silo-b").with_suffix(".key"))
    assert other["node_key"] != line


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        (('public-key = "', 'version = "'), ["silo.0.version"]),
        (("[privacy]", "[privacy]\nthreshold = 2"), ["'privacy.threshold' = 2", "set it to 3 or more"]),
        (("[privacy]", "[privacy]\nminimum-survivors = 2"), ["'privacy.minimum-survivors' = 2", "threshold of 3"]),
        (("[privacy]", "[privacy]\ncolluding = 3"), ["'privacy.colluding' = 3"]),
    ],
    ids=["unknown key of a silo", "2t ≤ n + c", "survivors below t", "too many colluding"],
)
def test_lock_refuses_a_plan_that_is_not_safe(
    change: tuple[str, str],
    quoted: list[str],
    pico_project: Callable[..., Any],
    gramfuse: Callable[..., Outcome],
) -> None:
    project = pico_project(silos=4, secure=True)
    project.replace(project.plan, *change)
    before = tree(project.directory)
    check_failure(gramfuse("plan", "lock", project.directory, "--json"), "PlanError", 10, quoted)
    assert tree(project.directory) == before


def test_lock_wants_every_silos_key_and_two_silos_are_too_few(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=4, secure=True, name="four")
    text = project.plan.read_text()
    project.plan.write_text(re.sub(r'public-key = "[0-9a-f]+"\n', "", text, count=1))
    quoted = ["no public key for silo-a", "gramfuse silo keygen"]
    check_failure(gramfuse("plan", "lock", project.directory, "--json"), "PlanError", 10, quoted)
    project = pico_project(silos=2, secure=True, name="two")
    quoted = ["secure aggregation of 2 silos hides nothing"]
    check_failure(gramfuse("plan", "lock", project.directory, "--json"), "PlanError", 10, quoted)


def test_show_says_what_a_secure_plan_tolerates(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=5, secure=True)
    shown = gramfuse("plan", "show", project.directory)
    assert shown.code == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    assert "sums over at least 4 silos only" in words
    assert "silos 5, threshold 4, minimum of survivors 4" in words
    assert "may drop out 1 " in words
    preview = gramfuse("plan", "show", project.directory, "--json").object
    assert preview["privacy"]["tolerates"] == {"dropouts": 1, "colluding": 2}
    _, layout = Project.read(project.directory).locked()
    assert preview["cost"]["upload_bytes"] == 8 * layout.sum_entries


def test_there_is_nothing_to_resume_where_nothing_was_interrupted(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome], place: Path
) -> None:
    project = pico_project(silos=4, secure=True)
    assert gramfuse("plan", "lock", project.directory).code == 0
    outcome = gramfuse("run", project.directory, "somewhere", "--resume", place / "run", "--json")
    check_failure(outcome, "RunDirectoryError", 15, ["nothing to resume", "run.partial"])
    both = gramfuse("run", project.directory, "somewhere", "--resume", place / "run", "--out", place / "other")
    assert both.code == 2


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _commands(inner, (*path, name))


@pytest.mark.parametrize(
    ("path", "command"), [pytest.param(p, c, id=" ".join(p) or "gramfuse") for p, c in _commands(cli)]
)
def test_help_teaches(path: tuple[str, ...], command: click.Command, gramfuse: Callable[..., Outcome]) -> None:
    outcome = gramfuse(*path, "--help")
    assert gramfuse(*path, "-h") == outcome
    assert (outcome.code, outcome.stderr) == (0, "")
    flat = " ".join(outcome.stdout.split())
    assert flat.startswith("Usage: ")
    assert " ".join(["", *path, ""]) in flat
    assert len(command.help or "") > 100, "a sentence at least on what it does"
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            assert f"{inner.name} " in flat
        return
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.name} is not explained"
            assert parameter.opts[0] in flat
        else:
            words = re.findall("[A-Z]+", parameter.make_metavar(click.Context(command)))
            assert all(word in (command.help or "") for word in words), parameter.name
    assert "--json" in flat


def test_help_of_the_installed_script_and_its_version() -> None:
    outcome = process([GRAMFUSE], "--help")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith("Usage: gramfuse ")
    for name in ("demo", "init", "plan", "run", "simulate", "--json"):
        assert name in outcome.stdout
    version = process([GRAMFUSE], "--version")
    assert version.code == 0
    assert "0.1.0" in version.stdout
