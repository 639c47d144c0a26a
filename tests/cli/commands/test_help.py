"""What `--help` and `--version` say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import click
import pytest

from gramfuse_cli.main import cli
from tests.cli.commands.outcomes import GRAMFUSE, Outcome, process


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from _commands(_inner(command, name), (*path, name))


def _inner(command: click.Group, name: str) -> click.Command:
    inner = command.get_command(click.Context(command), name)
    assert inner is not None
    return inner


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
        for name in command.list_commands(click.Context(command)):
            assert f"{name} " in flat
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
