"""The passphrase of the authority's key."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization

from gramfuse_cli.commands.pki import pki
from tests.deployment.pki.commands import handshake, invoke, refuse, succeed, tree


@pytest.fixture
def passphrase(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.touch(mode=0o600)
    path.write_text("correct horse battery staple\nnot this line\n")
    return path


def test_a_key_with_a_passphrase_is_of_no_use_without_it(tmp_path: Path, passphrase: Path) -> None:
    directory, other = tmp_path / "pki", tmp_path / "other"
    succeed(pki, "init", directory, "--host", "merge.example.org", "--passphrase-file", passphrase)
    text = (directory / "ca.key").read_text()
    assert text.startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    serialization.load_pem_private_key(text.encode(), b"correct horse battery staple")
    before = tree(directory)
    refuse("ca.key: is encrypted; give its passphrase with --passphrase-file", pki, "server", directory)
    other.touch(mode=0o600)
    other.write_text("another one that is long enough")
    refuse("ca.key: wrong passphrase", pki, "server", directory, "--passphrase-file", other)
    assert tree(directory) == before
    succeed(pki, "server", directory, "--passphrase-file", passphrase)
    handshake(directory, directory / "ca.crt", "merge.example.org")
    assert b"ENCRYPTED" not in (directory / "server.key").read_bytes()  # nginx and the SuperLink start by themselves


def test_a_passphrase_that_protects_little_is_refused(tmp_path: Path, passphrase: Path) -> None:
    arguments = (pki, "init", tmp_path / "pki", "--host", "a", "--passphrase-file", passphrase)
    passphrase.chmod(0o640)
    refuse("others on this machine can read it", *arguments)
    passphrase.chmod(0o600)
    for text in ("", "\n" + "x" * 40, "x" * 19):
        passphrase.write_text(text)
        refuse("needs at least 20", *arguments)
    passphrase.unlink()
    refuse("passphrase", *arguments)
    assert not (tmp_path / "pki").exists()


def test_a_passphrase_can_be_typed(tmp_path: Path) -> None:
    typed = "correct horse battery staple"
    arguments = ["init", str(tmp_path / "pki"), "--host", "a", "--passphrase"]
    result = CliRunner().invoke(pki, arguments, input=f"{typed}\n{typed}\n", help_option_names=["-h", "--help"])
    assert result.exit_code == 0, result.output
    assert typed not in result.output
    serialization.load_pem_private_key((tmp_path / "pki" / "ca.key").read_bytes(), typed.encode())


@pytest.mark.parametrize("arguments", [["--name", ""], ["--name", "a" * 65], ["--name", "a\nb"], ["--days", "0"]])
def test_an_authority_without_a_name_or_a_day_is_refused(arguments: list[str], tmp_path: Path) -> None:
    assert invoke(pki, "init", tmp_path / "pki", "--host", "a", *arguments).exit_code == 2
    assert not (tmp_path / "pki").exists()
