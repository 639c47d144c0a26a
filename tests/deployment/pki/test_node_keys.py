"""Node keys: what Flower, ssh-keygen and plans take, and what is no key."""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from flwr.cli.supernode.register import try_load_public_key
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

from gramfuse_deployment.certificates import key_pem, new_key
from gramfuse_protocol.contract import node_key
from gramfuse_protocol.documents import parse
from gramfuse_protocol.errors import PlanError
from tests.deployment.pki.commands import EXPECTED, Roster, openssh, spki


def test_flower_loads_both_halves_and_its_pem_is_the_same_key_as_the_line(tmp_path: Path) -> None:
    private, line = node_key.generate()
    (tmp_path / "node.key").write_text(private)
    (tmp_path / "node.pub").write_text(line)
    loaded = _try_setup_client_authentication(
        argparse.Namespace(auth_supernode_private_key=str(tmp_path / "node.key"), auth_supernode_public_key=None)
    )
    assert loaded is not None
    registered = try_load_public_key(tmp_path / "node.pub")
    assert registered == spki(loaded[0])
    assert node_key.canonical(registered) == node_key.canonical(registered.decode()) == line
    assert node_key.canonical(line) == node_key.canonical(line.encode()) == line
    assert node_key.public_of(private, "node.key") == line
    assert line.split()[0] == "ecdsa-sha2-nistp384"
    assert len(line.split()) == 2
    assert node_key.generate()[1] != line


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_ssh_keygen_agrees_and_a_passphrase_is_refused(tmp_path: Path) -> None:
    private, line = node_key.generate()
    path = tmp_path / "node.key"
    path.touch(mode=0o600)
    path.write_text(private)
    derived = subprocess.run(["ssh-keygen", "-y", "-f", path], capture_output=True, text=True, check=True).stdout
    assert node_key.canonical(derived) == line
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", path], capture_output=True, check=True)
    with pytest.raises(PlanError, match=r"north\.key: has a passphrase"):
        node_key.public_of(path.read_text(), "north.key")


def test_a_plan_takes_a_line_with_a_comment_and_keeps_the_key_alone() -> None:
    _, line = node_key.generate()
    for given in (line, f"  {line} someone@north\n", line.replace(" ", "   ")):
        assert parse(Roster, f"node-key = {json.dumps(given)}", "plan.toml").node_key == line


OTHERS = {
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
    "rsa": rsa.generate_private_key(65537, 2048),
    "p-256": ec.generate_private_key(ec.SECP256R1()),
    "p-521": ec.generate_private_key(ec.SECP521R1()),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_keys_of_other_kinds_are_refused(kind: str) -> None:
    key = OTHERS[kind]
    for given in (openssh(key), spki(key), openssh(key).replace(openssh(key).split()[0], node_key.KEY_TYPE)):
        with pytest.raises(ValueError, match=EXPECTED):
            node_key.canonical(given)
    with pytest.raises(PlanError, match=rf"plan\.toml: 'node-key': {EXPECTED}"):
        parse(Roster, f"node-key = {json.dumps(openssh(key))}", "plan.toml")
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    with pytest.raises(PlanError, match=r"n\.key: .*P-384"):
        node_key.public_of(private.decode(), "n.key")


def _with_blob(change: Callable[[bytearray], None]) -> str:
    """A line whose key's bytes were changed."""
    kind, blob = node_key.generate()[1].split()
    data = bytearray(base64.b64decode(blob))
    change(data)
    return f"{kind} {base64.b64encode(data).decode()}"


def _flip_last(data: bytearray) -> None:
    data[-1] ^= 1


def _compressed(data: bytearray) -> None:
    data[-97] = 2


def _shorter(data: bytearray) -> None:
    del data[-1]


@pytest.mark.parametrize(
    "given",
    [
        "",
        "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp384 AAAA",
        "ecdsa-sha2-nistp384 ÄÖÜ",
        b"\xff",
        _with_blob(_flip_last),
        _with_blob(_compressed),
        _with_blob(_shorter),
        f"{node_key.generate()[1]}\n{node_key.generate()[1]}",
        node_key.generate()[0],
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    ],
    ids=["empty", "no key", "short", "not ASCII", "bytes", "off curve", "compressed", "cut", "two", "private", "PEM"],
)
def test_what_is_no_public_key_is_refused(given: str | bytes) -> None:
    with pytest.raises(ValueError, match=EXPECTED):
        node_key.canonical(given)


def test_a_private_key_in_another_format_is_refused_and_never_quoted() -> None:
    for text in (key_pem(new_key()).decode(), "", "secret-looking text", node_key.generate()[0][:200]):
        with pytest.raises(PlanError) as caught:
            node_key.public_of(text, "n.key")
        said = str(caught.value)
        assert said.startswith("n.key: ")
        assert "gramfuse pki silo" in said
        assert not text or text not in said
