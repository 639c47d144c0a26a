"""Where a base model is that a plan or a silo file names by a path: at the file that names it, for everybody."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_client.dry_run.findings import Findings
from gramfuse_client.dry_run.of_inputs import check_base
from gramfuse_client.exchange.participant import Participant
from gramfuse_client.silo_file import Silo
from gramfuse_model.project import Project
from gramfuse_protocol.errors import GramfuseError, ModelError
from gramfuse_protocol.messages.phases import JoinReply, JoinRequest, Message, Refusal
from gramfuse_simulation.engine import simulated_silo
from tests.commands import gramfuse


@pytest.fixture
def project(pico_project: Callable[..., Any], pico_bert: Path, pico_gpt2: Path) -> Any:
    """A locked project whose plan has a relative path; where silos' paths start, there is another model."""
    made = pico_project(silos=2)
    made.replace(made.plan, f'base = "{pico_bert}"', 'base = "./base"')
    shutil.copytree(pico_bert, made.directory / "base")
    shutil.copytree(pico_gpt2, made.directory / "silos" / "base")
    gramfuse("plan", "lock", made.directory)
    digest = Project.read(made.directory).plan.digest
    for name in made.names:
        made.replace(made.silo(name), "approved = []", f'approved = ["{digest}"]')
    return made


def join(project: Any, silo: Silo) -> Message:
    read = Project.read(project.directory)
    about = {"plan": read.plan.digest, "session": secrets.token_hex(16)}
    layout = read.locked_layout().to_json()
    return Participant(silo).answer(JoinRequest(**about, plan_text=read.plan.to_toml(), layout=layout))


def test_a_path_in_a_plan_starts_at_the_plan_file(project: Any, tmp_path: Path) -> None:
    path, digest = project.silo("silo-a"), Project.read(project.directory).plan.digest
    assert isinstance(join(project, simulated_silo(str(path), str(tmp_path / "state"), digest)), JoinReply)
    gramfuse("measure", "--plan", project.directory, "--silo", "silo-a", "-o", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").exists()


def test_a_silo_that_has_no_plan_file_names_its_own_place(project: Any) -> None:
    """Over the network a plan is a message, and nothing says where a path in it starts."""
    reply = join(project, Silo.read(project.silo("silo-a")))
    assert isinstance(reply, Refusal)
    assert reply.error == "ModelError"
    found = Findings()
    assert check_base(found, Silo.read(project.silo("silo-a")), Project.read(project.directory).plan) is None
    assert "'./base'" in found.problems[0].what
    project.replace(project.silo("silo-a"), "[data]", 'base = "../base"\n\n[data]')
    assert isinstance(join(project, Silo.read(project.silo("silo-a"))), JoinReply)


def test_a_place_that_is_not_there_is_found_out_before_flower_starts(
    project: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("Flower was started")

    monkeypatch.setattr("gramfuse_simulation.simulate.contained", started)
    monkeypatch.setattr("gramfuse_cli.commands.run.Link.find", started)
    project.replace(project.silo("silo-b"), "[data]", 'base = "./nowhere"\n\n[data]')
    refused(f"{project.silo('silo-b')}: base", "simulate", project.directory, "--out", tmp_path / "out")
    project.replace(project.silo("silo-b"), 'base = "./nowhere"\n', "")
    (project.directory / "base").rename(tmp_path / "moved")
    for command in ("simulate", "run"):
        refused("./base", command, project.directory, "--out", tmp_path / "out")


def refused(named: str, *arguments: Any) -> None:
    with pytest.raises(GramfuseError) as caught:
        gramfuse(*arguments)
    assert isinstance(caught.value, ModelError)
    assert named in str(caught.value)
