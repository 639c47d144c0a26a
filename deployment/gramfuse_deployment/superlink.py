"""A connection to a SuperLink, as Flower's configuration has it: its command line, and the nodes that it knows.

This is the one place here that takes private names of Flower: its command line does not say which node has which key.
"""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramfuse_deployment.endpoint import host_of, is_loopback
from gramfuse_deployment.processes import BIN, FLOWER_OFF
from gramfuse_protocol.contract import node_key
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.documents import read_text
from gramfuse_protocol.errors import FederationError, PlanError

SERVER = "server"
"""What `gramfuse server start` calls the connection to its own SuperLink."""

UNREGISTERED = "unregistered"


def home_of(directory: Path) -> Path:
    """Return where `gramfuse server start DIR` keeps Flower's configuration."""
    return directory / "superlink" / "flwr"


@dataclass(frozen=True)
class Node:
    """A node that a SuperLink knows.

    Args:
        key: the public line of its node key; empty if it has none of ours.
        status: Flower's word: registered (and never connected), online, offline, unregistered.
    """

    id: int
    name: str
    key: str
    status: str

    @property
    def fingerprint(self) -> str:
        """Of its node key, as `ssh-keygen -l` prints it."""
        return node_key.fingerprint(self.key) if self.key else ""


@dataclass(frozen=True)
class Link:
    """A connection to a SuperLink.

    Args:
        given: what the user called it.
        home: the FLWR_HOME whose configuration has it.
        name: what it is called there.
        address: `host:port`.
        insecure: whether it is without TLS.
        ca: PEM file of the authority that the SuperLink is trusted by; None is the system's.
    """

    given: str
    home: Path
    name: str
    address: str
    insecure: bool
    ca: str | None

    @staticmethod
    def find(connection: str | None) -> Link:
        """Return a connection.

        Args:
            connection: its name in Flower's configuration, or the directory of a `gramfuse server start`; None is
                Flower's default.

        Raises:
            PlanError: if there is no such connection, it would start a SuperLink on the side, or it goes to another
                machine without TLS.
        """
        if connection and Path(connection).is_dir():
            return Link.of_server(Path(connection))
        return Link._read(connection or "", Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")), connection or "")

    @staticmethod
    def of_server(directory: Path) -> Link:
        """Return the connection to what `gramfuse server start DIR` started.

        Raises:
            PlanError: if it was never started there.
        """
        home = home_of(directory.resolve())
        if not (home / "config.toml").exists():
            raise PlanError(f"{directory}: no SuperLink was started there; run: gramfuse server start {directory}")
        return Link._read(str(directory), home, SERVER)

    @staticmethod
    def _read(given: str, home: Path, name: str) -> Link:
        path = home / "config.toml"
        try:
            links = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
        except FileNotFoundError:
            links = {}
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"{path}: not valid TOML: {error}") from None
        name = name or str(links.get("default", ""))
        link = links.get(name)
        if not _is_remote(link):
            known = ", ".join(key for key, value in links.items() if _is_remote(value))
            raise PlanError(
                f"{path}: {name!r} is not a connection to a SuperLink; known: {known or 'none'}. Give the directory of "
                'gramfuse server start, or write\n[superlink.NAME]\naddress = "HOST:PORT"\n'
                'root-certificates = "/path/to/ca.crt"\nor, to run all silos on this machine, use gramfuse simulate'
            )
        address, insecure = str(link["address"]), bool(link.get("insecure", False))
        if insecure and not is_loopback(host_of(address)):
            raise PlanError(
                f"{path}: the connection {name!r} goes to {address} without TLS, and whoever is on the way could "
                "command all silos; write root-certificates in place of insecure"
            )
        return Link(given or name, home, name, address, insecure, link.get("root-certificates"))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of Flower's commands."""
        return {**os.environ, **FLOWER_OFF, "FLWR_HOME": str(self.home)}

    def command(self, *arguments: str) -> list[str]:
        """Return a call of Flower's command line, the one that is installed beside this Python."""
        return [str(BIN / "flwr"), *arguments]

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Call Flower's command line and return the JSON object that it prints.

        Raises:
            FederationError: with what Flower says.
        """
        done = subprocess.run(  # noqa: S603
            self.command(*arguments, "--format", "json"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
        )
        try:
            answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            answer = {"success": False, "error-message": (done.stderr or done.stdout).strip()}
        if done.returncode or not answer.get("success", True):
            raise FederationError(f"flwr {arguments[0]}: {answer.get('error-message') or done.stderr.strip()}")
        return answer

    def nodes(self) -> list[Node]:
        """Return all nodes that were ever registered, those unregistered since among them."""
        from flwr.proto.control_pb2 import ListNodesRequest

        found = self._ask(lambda client: client.ListNodes(ListNodesRequest()))
        return [Node(node.node_id, node.name, _line(node.public_key), node.status) for node in found.nodes_info]

    def admit(self, plan: Plan) -> None:
        """Let the silos of a plan's roster connect, those that may not yet.

        Raises:
            PlanError: if one of their keys was revoked.
        """
        known = {node.key: node for node in self.nodes()}
        for silo in plan.silo:
            if silo.node_key is None:
                continue
            node = known.get(silo.node_key)
            if node is None:
                self.register(silo.name, silo.node_key)
            elif node.status == UNREGISTERED:
                raise PlanError(
                    f"the node key of {silo.name!r} in the plan ({node.fingerprint}) was revoked at the SuperLink, "
                    "which never takes it again; have the silo make another (gramfuse pki silo SILO_TOML --renew), "
                    "write that one into the plan, and lock it again"
                )

    def register(self, name: str, key: str) -> None:
        """Let a node with this key, its public line, connect."""
        from cryptography.hazmat.primitives import serialization
        from flwr.proto.control_pb2 import RegisterNodeRequest

        pem = serialization.load_ssh_public_key(key.encode("ascii")).public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._ask(lambda client: client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name)))

    def unregister(self, node: Node) -> None:
        """Let a node connect no more, ever: the SuperLink never takes its key again."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._ask(lambda client: client.UnregisterNode(UnregisterNodeRequest(node_id=node.id)))

    def _ask(self, call: Callable[[Any], Any]) -> Any:
        import httpx
        from flwr.supercore.control import ControlHttpClient

        ca = read_text(Path(self.ca)).encode("utf-8") if self.ca else None
        try:
            with ControlHttpClient.from_server_address(self.address, self.insecure, ca, interceptors=[]) as client:
                return call(client)
        except httpx.HTTPStatusError as error:
            raise FederationError(f"the SuperLink at {self.address} refused: {error.response.text}") from None
        except (httpx.HTTPError, OSError) as error:
            raise FederationError(
                f"the SuperLink at {self.address} does not answer ({error}); is it up (gramfuse server start)?"
            ) from None


def _is_remote(link: Any) -> bool:
    """Return whether a connection goes to a SuperLink; others start one on the side."""
    return isinstance(link, dict) and not str(link.get("address", ":local")).startswith(":local")


def _line(key: bytes) -> str:
    with suppress(ValueError):
        return node_key.canonical(key)
    return ""
