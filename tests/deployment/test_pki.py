"""Node keys and the private authority: what Flower takes, what TLS accepts, and no file ever overwritten."""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from flwr.cli.supernode.register import try_load_public_key
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

from gramfuse_cli.commands.pki import pki
from gramfuse_cli.commands.silo import silo as silo_commands
from gramfuse_deployment.certificates import Authority, certificate_pem, key_pem, new_key, server_names
from gramfuse_protocol.contract import node_key
from gramfuse_protocol.documents import Section, parse
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.secure_sum.keys import Identity

NOW = datetime(2030, 1, 1, tzinfo=UTC)
EXPECTED = "expected the line that gramfuse silo keygen prints: ecdsa-sha2-nistp384 …"


class Roster(Section):
    """As a plan has it."""

    node_key: node_key.PublicNodeKey


def invoke(group: Any, *arguments: str | Path) -> Result:
    # As under gramfuse: click makes a command's help option once and keeps it, for the tests after this one too.
    return CliRunner().invoke(group, [*map(str, arguments)], help_option_names=["-h", "--help"])


def succeed(group: Any, *arguments: str | Path) -> dict[str, Any]:
    """Run a command with --json and return its object; nothing else is on standard output."""
    result = invoke(group, *arguments, "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    assert "PRIVATE" not in result.output
    return value


def refuse(words: str, group: Any, *arguments: str | Path) -> None:
    """Run a command that must end with a PlanError."""
    error = invoke(group, *arguments).exception
    assert isinstance(error, PlanError), error
    assert words in str(error)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def openssh(key: Any) -> str:
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    assert isinstance(line, bytes)
    return line.decode()


def spki(key: Any) -> bytes:
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert isinstance(pem, bytes)
    return pem


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


# Node keys


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
    with pytest.raises(PlanError, match=r"n\.key: is not a P-384 private key in OpenSSH format"):
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
        assert str(caught.value) == (
            "n.key: is not a P-384 private key in OpenSSH format; make one with: gramfuse pki silo SILO_TOML"
        )


# The authority


def handshake(directory: Path, trusted: Path, host: str) -> None:
    """Connect by TLS on the loopback as a client that trusts one authority and expects one host."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(directory / "server.crt", directory / "server.key")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    client.load_verify_locations(trusted)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            connection.settimeout(10)
            # The client hangs up if it does not trust the certificate; that is its own affair.
            with connection, contextlib.suppress(OSError), server.wrap_socket(connection, server_side=True) as secure:
                secure.sendall(b"merge")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as plain,
                client.wrap_socket(plain, server_hostname=host) as secure,
            ):
                assert secure.recv(5) == b"merge"
        finally:
            thread.join()


def test_tls_accepts_the_hosts_of_the_certificate_and_the_machine_itself_and_nobody_else(
    authority: Path, tmp_path: Path
) -> None:
    for host in ("merge.example.org", "10.0.0.5", "127.0.0.1", "localhost", "::1"):
        handshake(authority, authority / "ca.crt", host)
    for host in ("example.org", "other.merge.example.org", "10.0.0.6"):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname mismatch|IP address mismatch"):
            handshake(authority, authority / "ca.crt", host)
    succeed(pki, "init", tmp_path / "other", "--host", "merge.example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        handshake(authority, tmp_path / "other" / "ca.crt", "merge.example.org")
    # A server's certificate is no authority's, though a real authority signed it.
    shutil.copy(authority / "server.key", tmp_path / "other" / "ca.key")
    shutil.copy(authority / "server.crt", tmp_path / "other" / "ca.crt")
    refuse("is not a certificate that gramfuse pki init made", pki, "server", tmp_path / "other")


def test_certificates_say_what_they_are_for_and_end_when_they_must() -> None:
    hosts = server_names(["Merge.Example.org.", "10.0.0.5", "localhost"])
    made = Authority.create("north CA", hosts, NOW, 30)
    own = made.certificate
    assert own.issuer == own.subject
    assert own.not_valid_after_utc == NOW + timedelta(days=30)
    assert own.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    usage = own.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    assert list(own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [x509.OID_SERVER_AUTH]
    constraints = own.extensions.get_extension_for_class(x509.NameConstraints)
    assert (constraints.critical, made.hosts) == (True, hosts)

    leaf = made.certify(new_key().public_key(), hosts, NOW, 397)
    leaf.verify_directly_issued_by(own)
    assert leaf.not_valid_before_utc == NOW - timedelta(days=1)
    assert leaf.not_valid_after_utc == own.not_valid_after_utc, "no longer than the authority"
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["merge.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address(a) for a in ("10.0.0.5", "127.0.0.1", "::1")]
    extensions = leaf.extensions
    assert extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(False, None)
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [x509.OID_SERVER_AUTH]
    assert (
        extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        == own.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    )


def test_private_files_are_private_and_public_ones_hold_one_certificate(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        made = succeed(pki, "init", tmp_path / "a" / "b", "--host", "h.example", "--name", "north CA", "--days", "10")
        server = succeed(pki, "server", tmp_path / "a" / "b")
    finally:
        os.umask(before)
    directory = tmp_path / "a" / "b"
    assert [mode(directory.parent), mode(directory)] == [0o700, 0o700]
    assert {name: mode(directory / name) for name in tree(directory)} == {
        "ca.key": 0o600,
        "ca.crt": 0o644,
        "server.key": 0o600,
        "server.crt": 0o644,
    }
    (certificate,) = x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())
    assert made["name"] == "north CA"
    assert certificate.subject.rfc4514_string() == "CN=north CA"
    assert (
        made["sha256"].replace(":", "").lower()
        == hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()
    )
    (leaf,) = x509.load_pem_x509_certificates((directory / "server.crt").read_bytes())
    assert server["hosts"] == ["h.example", "localhost", "127.0.0.1", "::1"]
    assert datetime.fromisoformat(server["valid_until"]) == leaf.not_valid_after_utc == certificate.not_valid_after_utc


def test_nothing_is_overwritten(authority: Path) -> None:
    before = tree(authority)
    refuse("ca.key exists already; every silo trusts that authority", pki, "init", authority, "--host", "a")
    refuse("server.key exists already; to replace it", pki, "server", authority)
    (authority / "server.key").unlink()
    refuse("server.crt exists already", pki, "server", authority)
    assert tree(authority) == {name: data for name, data in before.items() if name != "server.key"}


def test_renewal_keeps_the_old_pair_once_and_clients_notice_nothing(authority: Path) -> None:
    before = tree(authority)
    made = succeed(pki, "server", authority, "--host", "new.merge.example.org", "--renew")
    after = tree(authority)
    for name in ("server.key", "server.crt"):
        assert after[f"{name}.old"] == before[name] != after[name]
    assert made["kept"] == [str(authority / "server.key.old"), str(authority / "server.crt.old")]
    assert mode(authority / "server.key") == mode(authority / "server.key.old") == 0o600
    handshake(authority, authority / "ca.crt", "new.merge.example.org")
    refuse("server.key.old exists already", pki, "server", authority, "--renew")
    assert tree(authority) == after


@pytest.mark.parametrize("renew", [True, False])
def test_a_failure_half_way_leaves_everything_as_it_was(
    renew: bool, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not renew:
        (authority / "server.key").unlink()
        (authority / "server.crt").unlink()
    before = tree(authority)
    real = {"link": os.link, "replace": os.replace}

    def fail(name: str) -> None:
        def function(source: Any, target: Any) -> None:
            if Path(target).name == "server.crt" and not str(source).endswith(".old"):
                raise OSError(28, "No space left on device")
            real[name](source, target)

        monkeypatch.setattr(os, name, function)

    fail("link")
    fail("replace")
    refuse("No space left on device", pki, "server", authority, *(["--renew"] if renew else []))
    assert tree(authority) == before


def test_an_authority_that_cannot_be_used_is_refused(authority: Path, tmp_path: Path) -> None:
    refuse(f"make the authority with: gramfuse pki init {tmp_path}", pki, "server", tmp_path)
    (authority / "ca.key").chmod(0o640)
    refuse(f"run: chmod 600 {authority / 'ca.key'}", pki, "server", authority, "--renew")
    (authority / "ca.key").write_bytes(key_pem(new_key()))
    (authority / "ca.key").chmod(0o600)
    refuse("is not the authority's certificate of ca.key", pki, "server", authority, "--renew")
    (authority / "ca.key").write_text("nothing")
    refuse("ca.key: is not a private key", pki, "server", authority, "--renew")

    old = Authority.create("old", server_names([]), NOW, 30)
    (authority / "ca.key").write_bytes(key_pem(old.key))
    (authority / "ca.crt").write_bytes(certificate_pem(old.certificate))
    assert Authority.read(authority, NOW + timedelta(days=29)).certificate == old.certificate
    for now in (NOW + timedelta(days=30), NOW - timedelta(days=2)):
        with pytest.raises(PlanError, match=r"ca\.crt: valid from 2029-12-31 to 2030-01-31 only"):
            Authority.read(authority, now)
    (authority / "ca.crt").write_text("nothing")
    with pytest.raises(PlanError, match=r"ca\.crt: is not a certificate"):
        Authority.read(authority, NOW)


@pytest.mark.parametrize(
    "host",
    [
        "",
        " ",
        "https://a.example",
        "a.example:8000",
        "[::1]",
        "*.example.org",
        "a_b",
        "-a",
        "a..b",
        "10.0.0",
        "10.0.0.256",
        "münchen.example",
        "0.0.0.0",
        "::",
        "fe80::1%eth0",
        "a" * 64,
        ".".join(["a" * 63] * 4),
    ],
)
def test_what_is_no_host_is_refused(host: str, authority: Path) -> None:
    before = tree(authority)
    result = invoke(pki, "server", authority, "--host", host, "--renew")
    assert result.exit_code == 2
    assert "--host" in result.stderr
    assert tree(authority) == before
    assert invoke(pki, "init", authority.parent / "new", "--host", host).exit_code == 2
    assert not (authority.parent / "new").exists()


def test_an_authority_signs_for_its_own_hosts_only(authority: Path, tmp_path: Path) -> None:
    before = tree(authority)
    for host in ("example.org", "bank.example.org", "evilmerge.example.org", "10.0.0.6", "fd00::5"):
        refuse(f"does not vouch for {host}", pki, "server", authority, "--host", host, "--renew")
    assert tree(authority) == before
    assert invoke(pki, "init", tmp_path / "new").exit_code == 2  # it has to know which hosts are its own


# Its passphrase


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
    refuse("ca.key: has a passphrase; give it by --passphrase-file", pki, "server", directory)
    other.touch(mode=0o600)
    other.write_text("another one that is long enough")
    refuse("its passphrase is another", pki, "server", directory, "--passphrase-file", other)
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
        refuse("needs 20 at least", *arguments)
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


# A silo's keys


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
