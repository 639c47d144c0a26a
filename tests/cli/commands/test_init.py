"""`gramfuse init`: a project whose plan and silos read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gramfuse_protocol.contract.plan import Plan
from tests.cli.commands.outcomes import Outcome, check_failure, tree


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
