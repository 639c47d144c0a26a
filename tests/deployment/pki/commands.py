"""Commands that make keys and certificates, and what they leave."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization

from gramfuse_protocol.contract import node_key
from gramfuse_protocol.documents import Section
from gramfuse_protocol.errors import PlanError

NOW = datetime(2030, 1, 1, tzinfo=UTC)
EXPECTED = "expected .*ecdsa-sha2-nistp384"


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
