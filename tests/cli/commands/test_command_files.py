"""A command is a file: a file that is added is a command, or an error that names it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gramfuse_cli import commands
from tests.cli.commands.outcomes import Outcome

COMMAND = '''
import click

@click.command()
def {name}() -> None:
    """Say nothing."""
'''


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Return a function that adds a file to the commands, until the test is over."""
    folder = tmp_path / "added"
    folder.mkdir()
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(folder)])

    def write(name: str, source: str) -> Path:
        path = folder / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        return path

    yield write
    for path in folder.glob("*.py"):
        sys.modules.pop(f"{commands.__name__}.{path.stem}", None)
        vars(commands).pop(path.stem, None)


@pytest.mark.parametrize(
    ("file", "name", "path"),
    [
        ("dry_run", "dry_run", ["dry-run"]),
        ("run_again", "run_again", ["run-again"]),
        ("silo_dry_run", "dry_run", ["silo", "dry-run"]),
        ("server_stop", "stop", ["server", "stop"]),
    ],
)
def test_an_added_file_is_a_command_of_its_group(
    file: str, name: str, path: list[str], add: Callable[[str, str], Path], gramfuse: Callable[..., Outcome]
) -> None:
    add(file, COMMAND.format(name=name))
    *group, command = path
    assert f"{command} " in gramfuse(*group, "--help").stdout
    assert f"Usage: gramfuse {' '.join(path)} " in gramfuse(*path, "--help").stdout
    assert gramfuse(*path).code == 0


def test_a_file_of_a_group_is_no_command_of_gramfuse(
    add: Callable[[str, str], Path], gramfuse: Callable[..., Outcome]
) -> None:
    add("silo_dry_run", COMMAND.format(name="dry_run"))
    assert "dry-run" not in gramfuse("--help").stdout
    assert gramfuse("silo-dry-run").code == 2
    assert gramfuse("silo", "dry_run").code == 2


@pytest.mark.parametrize("file", ["helper", "some_helper", "silo_helper"])
def test_a_file_without_its_command_is_named(
    file: str, add: Callable[[str, str], Path], gramfuse: Callable[..., Outcome]
) -> None:
    path = add(file, "helper = some_helper = 1\n")
    outcome = gramfuse(*(["silo"] if file.startswith("silo") else []), "--help")
    assert outcome.code == 1
    assert str(path) in outcome.stderr.replace("\n", "")
    assert "Traceback" not in outcome.stderr
    assert gramfuse("plan", "--help").code == 0
