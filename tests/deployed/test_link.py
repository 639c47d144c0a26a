"""Which SuperLinks `gramfuse run` goes to, and what it wants of a plan before it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_deployment.flower_run import check_roster
from gramfuse_deployment.superlink import Link
from gramfuse_model.project import Project
from gramfuse_protocol.contract import node_key
from gramfuse_protocol.errors import FederationError, PlanError


def configure(home: Path, text: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(text, encoding="utf-8")


def test_a_connection_is_a_name_or_the_directory_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    configure(
        tmp_path / "home",
        '[superlink]\ndefault = "far"\n[superlink.far]\naddress = "far.example.org:443"\n'
        'root-certificates = "/ca.crt"\n[superlink.near]\naddress = "[::1]:8000"\ninsecure = true\n'
        '[superlink.wire]\naddress = "10.0.0.5:8000"\ninsecure = true\n[superlink.local]\naddress = ":local:"\n',
    )
    far = Link.find(None)
    assert far == Link("far", tmp_path / "home", "far", "far.example.org:443", False, "/ca.crt")
    assert far.environment["FLWR_HOME"] == str(tmp_path / "home")
    assert Link.find("near").insecure
    with pytest.raises(PlanError, match=r"'wire' goes to 10\.0\.0\.5:8000 without TLS"):
        Link.find("wire")
    for name in ("local", "nowhere", "near.example.org"):
        with pytest.raises(PlanError, match=f"'{name}' .*far, near, wire"):
            Link.find(name)

    configure(
        tmp_path / "near" / "superlink" / "flwr",
        '[superlink.server]\naddress = "127.0.0.1:8001"\nroot-certificates = "/ca.crt"\n',
    )
    server = Link.find("near")
    assert (server.argument, server.name, server.address) == ("near", "server", "127.0.0.1:8001")
    assert server.home == tmp_path / "near" / "superlink" / "flwr"
    assert Link.of_server(Path("near")) == server
    with pytest.raises(PlanError, match="run: gramfuse server start elsewhere"):
        Link.of_server(Path("elsewhere"))


def test_a_superlink_that_is_not_there_is_said(tmp_path: Path) -> None:
    link = Link("", tmp_path, "server", "127.0.0.1:9", True, None)
    with pytest.raises(FederationError, match=r"127\.0\.0\.1:9 does not answer .*gramfuse server start"):
        link.nodes()
    with pytest.raises(PlanError, match=r"nowhere\.crt"):
        Link("", tmp_path, "server", "127.0.0.1:9", False, str(tmp_path / "nowhere.crt")).nodes()


def test_over_tls_every_silo_of_the_plan_has_a_node_key(tmp_path: Path, pico_project: Callable[..., Any]) -> None:
    project = pico_project(silos=2)
    secure = Link("", tmp_path, "server", "127.0.0.1:8001", False, "/ca.crt")
    open_link = Link("", tmp_path, "server", "127.0.0.1:8001", True, None)
    check_roster(Project.read(project.directory), open_link)
    with pytest.raises(PlanError, match=r"plan\.toml: .*silo-a, silo-b.*gramfuse silo keygen"):
        check_roster(Project.read(project.directory), secure)
    for name in project.names:
        with pytest.raises(PlanError, match="no node-key"):
            check_roster(Project.read(project.directory), secure)
        line = f'name = "{name}"\n'
        project.replace(project.plan, line, f'{line}node-key = "{node_key.generate()[1]}"\n')
    check_roster(Project.read(project.directory), secure)
