"""Connections to a SuperLink from Flower's configuration: run Flower's commands, and list, admit or revoke nodes.

Only this module uses private names of Flower, because its command line does not show which node has which key.
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
from gramfuse_deployment.processes import BIN, FLOWER_ENVIRONMENT
from gramfuse_protocol.contract import node_key
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.documents import read_text
from gramfuse_protocol.errors import FederationError, PlanError

SERVER = "server"
"""Name of the connection that `gramfuse server start` makes to its own SuperLink."""

UNREGISTERED = "unregistered"


def home_of(directory: Path) -> Path:
    """Return the directory in which `gramfuse server start DIR` keeps Flower's configuration."""
    return directory / "superlink" / "flwr"


@dataclass(frozen=True)
class Node:
    """A node that a SuperLink knows.

    Args:
        key: the public line of its node key; empty if it is not a key of gramfuse.
        status: Flower's word: registered (and never connected), online, offline, unregistered.
    """

    id: int
    name: str
    key: str
    status: str

    @property
    def fingerprint(self) -> str:
        """The node key's fingerprint, as `ssh-keygen -l` prints it."""
        return node_key.fingerprint(self.key) if self.key else ""


@dataclass(frozen=True)
class Link:
    """A connection to a SuperLink.

    Args:
        argument: the user's command-line argument for it.
        home: the FLWR_HOME with its configuration.
        name: its name in that configuration.
        address: `host:port`.
        insecure: whether it does not use TLS.
        ca: PEM file of the authority to trust; None means the system's authorities.
    """

    argument: str
    home: Path
    name: str
    address: str
    insecure: bool
    ca: str | None

    @staticmethod
    def find(connection: str | None) -> Link:
        """Find a connection.

        Args:
            connection: its name in Flower's configuration, or the directory of a `gramfuse server start`; None means
                Flower's default connection.

        Raises:
            PlanError: if there is no such connection, it would start a local SuperLink, or it goes to another machine
                without TLS.
        """
        if connection and Path(connection).is_dir():
            return Link.of_server(Path(connection))
        return Link._read(connection or "", Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")), connection or "")

    @staticmethod
    def of_server(directory: Path) -> Link:
        """Return the connection to the SuperLink that `gramfuse server start DIR` started.

        Raises:
            PlanError: if none was ever started there.
        """
        home = home_of(directory.resolve())
        if not (home / "config.toml").exists():
            raise PlanError(f"{directory}: no SuperLink was started there; run: gramfuse server start {directory}")
        return Link._read(str(directory), home, SERVER)

    @staticmethod
    def _read(argument: str, home: Path, name: str) -> Link:
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
            names = ", ".join(key for key, value in links.items() if _is_remote(value))
            raise PlanError(
                f"{path}: {name!r} is not a connection to a SuperLink; known: {names or 'none'}. Give the directory of "
                'gramfuse server start, or write\n[superlink.NAME]\naddress = "HOST:PORT"\n'
                'root-certificates = "/path/to/ca.crt"\nor, to run all silos on this machine, use gramfuse simulate'
            )
        address, insecure = str(link["address"]), bool(link.get("insecure", False))
        if insecure and not is_loopback(host_of(address)):
            raise PlanError(
                f"{path}: the connection {name!r} goes to {address} without TLS, so anyone on the network path could "
                "command all silos; replace insecure by root-certificates"
            )
        return Link(argument or name, home, name, address, insecure, link.get("root-certificates"))

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for Flower's commands."""
        return {**os.environ, **FLOWER_ENVIRONMENT, "FLWR_HOME": str(self.home)}

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of `flwr`, the one installed beside this Python, with arguments."""
        return [str(BIN / "flwr"), *arguments]

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run `flwr` and return the JSON object that it prints.

        Raises:
            FederationError: if it fails, with Flower's own message.
        """
        result = subprocess.run(  # noqa: S603
            self.command(*arguments, "--format", "json"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
        )
        try:
            answer: dict[str, Any] = json.loads(result.stdout[result.stdout.index("{") :])
        except ValueError:
            answer = {"success": False, "error-message": (result.stderr or result.stdout).strip()}
        if result.returncode or not answer.get("success", True):
            raise FederationError(f"flwr {arguments[0]}: {answer.get('error-message') or result.stderr.strip()}")
        return answer

    def nodes(self) -> list[Node]:
        """Return all nodes ever registered, including those unregistered since."""
        from flwr.proto.control_pb2 import ListNodesRequest

        answer = self._call(lambda client: client.ListNodes(ListNodesRequest()))
        return [Node(node.node_id, node.name, _public_line(node.public_key), node.status) for node in answer.nodes_info]

    def admit(self, plan: Plan) -> None:
        """Register the silos of a plan's roster that are not registered yet, so that they can connect.

        Raises:
            PlanError: if one of their keys was revoked.
        """
        nodes = {node.key: node for node in self.nodes()}
        for silo in plan.silo:
            if silo.node_key is None:
                continue
            node = nodes.get(silo.node_key)
            if node is None:
                self.register(silo.name, silo.node_key)
            elif node.status == UNREGISTERED:
                raise PlanError(
                    f"the node key of {silo.name!r} in the plan ({node.fingerprint}) was revoked, and the SuperLink "
                    "never accepts it again; have the silo make a new one (gramfuse pki silo SILO_TOML --renew), write "
                    "it into the plan, and lock the plan again"
                )

    def register(self, name: str, key: str) -> None:
        """Register a node, so that it can connect.

        Args:
            name: the silo's name.
            key: the public line of its node key.
        """
        from cryptography.hazmat.primitives import serialization
        from flwr.proto.control_pb2 import RegisterNodeRequest

        pem = serialization.load_ssh_public_key(key.encode("ascii")).public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._call(lambda client: client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name)))

    def unregister(self, node: Node) -> None:
        """Disconnect a node and block its key permanently."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._call(lambda client: client.UnregisterNode(UnregisterNodeRequest(node_id=node.id)))

    def _call(self, call: Callable[[Any], Any]) -> Any:
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
    """Return whether a connection goes to a running SuperLink; Flower starts a local one for any other."""
    return isinstance(link, dict) and not str(link.get("address", ":local")).startswith(":local")


def _public_line(key: bytes) -> str:
    with suppress(ValueError):
        return node_key.canonical(key)
    return ""
