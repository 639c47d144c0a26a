"""An authority, and a silo file."""

from __future__ import annotations

from pathlib import Path

import pytest

from gramfuse_cli.commands.pki import pki
from tests.deployment.pki.commands import succeed


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A directory with an authority and a server's certificate."""
    directory = tmp_path / "pki"
    succeed(pki, "init", directory, "--host", "merge.example.org", "--host", "10.0.0.5")
    succeed(pki, "server", directory)
    return directory


@pytest.fixture
def silo_file(tmp_path: Path) -> Path:
    path = tmp_path / "silo.toml"
    path.write_text(
        'name = "north"\n[data]\ntrain = "t.jsonl"\nheld-out = 0.2\n'
        '[coordinator]\naddress = "merge.example.org:9092"\nnode-key = "keys/n.key"\n'
    )
    return path
