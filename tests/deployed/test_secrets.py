"""After a run, no secret is anywhere but in the key files: whatever its processes wrote is searched for all of them."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from gramfuse_client.silo_file import Silo
from gramfuse_client.state.session import Record

SMALLEST = 16
"""Bytes of the smallest secret that is looked for."""


class Collector(threading.Thread):
    """Reads what silos keep of their sessions, again and again while a run lasts."""

    def __init__(self, states: list[Path]) -> None:
        super().__init__(daemon=True)
        self.states = states
        self.over = threading.Event()
        self.secrets: set[bytes] = set()

    def run(self) -> None:
        while not self.over.wait(0.02):
            for state in self.states:
                for file in state.glob("*/sessions/*/session.json"):
                    try:
                        member = Record.model_validate_json(file.read_bytes()).member
                    except (OSError, ValueError):
                        continue
                    if member is not None:
                        for part in (member.secrets, member.own_shares, member.held):
                            self.secrets |= set(_bytes(part))


def _bytes(part: Any) -> Iterator[bytes]:
    """Yield everything in a part of a silo's state that is a secret."""
    if isinstance(part, BaseModel):
        part = dict(part)
    if isinstance(part, dict):
        for value in part.values():
            yield from _bytes(value)
    elif isinstance(part, str) and len(part) >= 2 * SMALLEST:
        yield bytes.fromhex(part)
    elif isinstance(part, bytes):
        yield part


def _forms(secret: bytes) -> list[bytes]:
    """Return how a secret may be written."""
    return [secret, secret.hex().encode(), base64.b64encode(secret)[:-4]]


def _key_material(path: Path) -> list[bytes]:
    """Return what is secret in a key file: its base64 but for the first line, which may be public; its last bytes."""
    lines = [line for line in path.read_bytes().splitlines() if not line.startswith(b"-----")]
    if len(lines) > 1:
        return [*lines[1:-1], b"".join(lines)[-60:]]
    return [lines[0], *_forms(base64.b64decode(lines[0])[-32:])]


@pytest.mark.timeout(900)
def test_no_secret_is_in_any_log_ledger_report_database_or_context(
    deploy: Callable[..., Any], pico_project: Callable[..., Any], tmp_path: Path
) -> None:
    project = pico_project(silos=3, secure=True)
    deployment = deploy(project)
    server = deployment.start_server()
    deployment.register()
    silos = {name: Silo.read(project.silo(name)) for name in project.names}
    for name in project.names:
        deployment.start_silo(name, connected=False)
    collector = Collector([silo.state for silo in silos.values()])
    collector.start()
    deployment.run()
    collector.over.set()
    collector.join()
    assert len(collector.secrets) >= 3 * (5 + 2 * 4)  # seeds and keys of each silo, and shares of each with each

    keys = [deployment.coordinator / "server.key", *(silo.node_key_path for silo in silos.values())]
    keys += [silo.identity_path for silo in silos.values()]
    keys += [started.directory / "secret" for started in deployment.started]
    secrets = {part for path in keys for part in _key_material(path)}
    secrets |= {form for secret in collector.secrets for form in _forms(secret)}
    deployment.stop()

    written = [deployment.directory, tmp_path / "run", *(silo.state for silo in silos.values())]
    files = {path for place in written for path in place.rglob("*") if path.is_file()} - set(keys)
    names = {path.name for path in files}
    assert {"state.db", "superlink.log", "supernode.log", "ledger.jsonl", "report.json", "transcript.jsonl"} <= names
    found = [(path, secret[:8]) for path in files for secret in secrets if secret in path.read_bytes()]
    assert found == [], server.logs()
