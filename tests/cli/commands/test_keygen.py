"""`gramfuse silo keygen`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gramfuse_protocol.contract.node_key import public_of
from gramfuse_protocol.secure_sum.keys import Identity
from tests.cli.commands.outcomes import Outcome


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
