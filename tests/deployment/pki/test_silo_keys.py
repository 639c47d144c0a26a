"""A silo's node key and identity."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gramfuse_cli.commands.pki import pki
from gramfuse_cli.commands.silo import silo as silo_commands
from gramfuse_protocol.contract import node_key
from gramfuse_protocol.secure_sum.keys import Identity
from tests.deployment.pki.commands import invoke, mode, refuse, succeed


def test_a_silos_node_key_is_made_once_and_renewed_on_request(silo_file: Path) -> None:
    path = silo_file.parent / "keys" / "n.key"
    made = succeed(pki, "silo", silo_file)
    assert made == {"name": "north", "node_key_file": str(path), "node_key": made["node_key"], "kept": []}
    assert node_key.public_of(path.read_text(), "n.key") == made["node_key"]
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)

    before = path.read_text()
    refuse("n.key exists already", pki, "silo", silo_file)
    assert path.read_text() == before
    renewed = invoke(pki, "silo", silo_file, "--renew")
    assert renewed.stdout == f'node-key = "{node_key.public_of(path.read_text(), "n.key")}"\n'
    assert made["node_key"] not in renewed.stdout
    assert (path.parent / "n.key.old").read_text() == before
    assert sorted(os.listdir(path.parent)) == ["n.key", "n.key.old"]


@pytest.mark.parametrize("missing", ["both", "identity", "node key"])
def test_keygen_makes_what_is_missing_and_prints_both(missing: str, silo_file: Path) -> None:
    files = {"identity": silo_file.parent / "silo.pem", "node key": silo_file.parent / "keys" / "n.key"}
    if missing != "both":
        succeed(silo_commands, "keygen", silo_file)
        files[missing].unlink()
    before = {name: path.read_text() for name, path in files.items() if path.exists()}
    made = invoke(silo_commands, "keygen", silo_file)
    assert made.exit_code == 0, made.output
    assert {name: files[name].read_text() for name in before} == before
    public = Identity.parse(files["identity"].read_text(), "").public.hex()
    line = node_key.public_of(files["node key"].read_text(), "")
    assert made.stdout == f'[[silo]]\nname = "north"\npublic-key = "{public}"\nnode-key = "{line}"\n'
    assert [mode(path) for path in files.values()] == [0o600, 0o600]
    again = invoke(silo_commands, "keygen", silo_file)
    assert (again.exit_code, again.stdout) == (0, made.stdout)

    files["identity"].unlink()
    assert succeed(silo_commands, "keygen", silo_file) == {
        "name": "north",
        "identity": str(files["identity"]),
        "node_key_file": str(files["node key"]),
        "public_key": Identity.parse(files["identity"].read_text(), "").public.hex(),
        "node_key": line,
        "fingerprint": node_key.fingerprint(line),
    }


@pytest.mark.parametrize(("kept", "gone"), [("silo.pem", "keys/n.key"), ("keys/n.key", "silo.pem")])
def test_keygen_writes_nothing_beside_a_key_that_others_can_read(kept: str, gone: str, silo_file: Path) -> None:
    succeed(silo_commands, "keygen", silo_file)
    (silo_file.parent / gone).unlink()
    (silo_file.parent / kept).chmod(0o644)
    refuse("chmod 600", silo_commands, "keygen", silo_file)
    assert not (silo_file.parent / gone).exists()
