"""A coordinator that pushes code of its own: the stock SuperNode runs it, a silo of gramfuse refuses and notes it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.silo_file import Silo
from gramfuse_deployment.endpoint import free_port
from gramfuse_deployment.processes import BIN, contained
from gramfuse_deployment.superlink import Link

SECRET = "a patient's letter that never leaves the silo"

CLIENT = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query("steal")
def steal(message, context):
    text = open(message.content["what"]["file"]).read()
    return Message(RecordDict({"loot": ConfigRecord({"text": text})}), reply_to=message)
"""

SERVER = """
import json
import time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    what = RecordDict({"what": ConfigRecord({"file": str(context.run_config["file"])})})
    asked = [Message(content=what, message_type="query.steal", dst_node_id=node) for node in nodes]
    got = [
        f"error {reply.error.code}: {reply.error.reason}" if reply.has_error() else reply.content["loot"]["text"]
        for reply in grid.send_and_receive(asked, timeout=100)
    ]
    Path(str(context.run_config["loot"])).write_text(json.dumps(got))
"""


def hostile_app(directory: Path, file: Path, loot: Path) -> Path:
    """Write a Flower app that names gramfuse's own modules, and brings other ones under their names."""
    for package, text in (("gramfuse_client", CLIENT), ("gramfuse_server", SERVER)):
        (directory / package).mkdir(parents=True)
        (directory / package / "__init__.py").touch()
        (directory / package / "app.py").write_text(text)
    (directory / "pyproject.toml").write_text(
        f"""[project]
name = "gramfuse-pico"
version = "1.0.0"
description = "One gramfuse exchange"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "gramfuse"

[tool.flwr.app.components]
serverapp = "gramfuse_server.app:app"
clientapp = "gramfuse_client.app:app"

[tool.flwr.app.config]
file = "{file}"
loot = "{loot}"
"""
    )
    return directory


def steal(link: Link, app: Path, loot: Path) -> list[str]:
    """Push an app to a SuperLink, as anybody can who reaches its control API, and return what it got."""
    link.flwr("run", str(app), link.name)
    deadline = time.monotonic() + 110
    while not loot.exists() or not loot.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    got: list[str] = json.loads(loot.read_text())
    return got


@pytest.mark.timeout(900)
def test_code_that_a_coordinator_pushes_does_not_run(
    deploy: Callable[..., Any], pico_project: Callable[..., Any], tmp_path: Path
) -> None:
    project = pico_project(silos=1, secure=False)
    project.replace(project.plan, "[privacy]", "[privacy]\nminimum-survivors = 1")
    deployment = deploy(project, insecure=True)
    deployment.start_server()
    link = Link.of_server(deployment.coordinator)
    file, loot = tmp_path / "letter.txt", tmp_path / "loot.json"
    file.write_text(SECRET)
    app = hostile_app(tmp_path / "hostile", file, loot)

    node = [str(BIN / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{deployment.port}"]
    node += ["--port", str(free_port()), "--node-config", f'silo="{project.silo("silo-a")}"']
    home = {"FLWR_HOME": str(tmp_path / "stock"), "PATH": f"{BIN}:/usr/bin:/bin"}
    (tmp_path / "stock").mkdir()
    with contained(node, tmp_path / "stock.log", home):
        assert steal(link, app, loot) == [SECRET]  # Flower's own SuperNode runs what it is sent

    loot.unlink()
    silo = deployment.start_silo("silo-a")
    time.sleep(1)
    refused = "error 6: RefusalError: the app bundle is not one of gramfuse's, which carry no code"
    got = steal(link, app, loot)
    assert SECRET not in json.dumps(got)
    assert refused in got  # beside it, perhaps, that the stock node is away
    opened = Silo.read(project.silo("silo-a"))
    (line,) = Ledger(opened.ledger, "silo-a").lines()
    assert (line.entry.kind, line.entry.form, line.entry.items) == ("error", "reason", ())
    assert "not one of gramfuse's" in line.entry.note
    said = silo.wait_for("not one of gramfuse's")
    assert "SHA-256" in said  # of the bundle, to find out whose it is
    installed = [path for path in opened.state.rglob("*") if "hostile" in path.name or path.name == "apps"]
    assert installed == []
