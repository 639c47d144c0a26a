"""A silo's node: starts its processes and keeps them running."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gramfuse_deployment.endpoint import free_port, host_of, is_loopback
from gramfuse_deployment.processes import BIN, MALLOC_SETTINGS
from gramfuse_deployment.silo_watch import Watch
from gramfuse_deployment.supervisor import POLL_SECONDS, Service, Supervisor, say
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.files import write_private

if TYPE_CHECKING:
    from gramfuse_client.silo_file import Silo

NODE, RUNNER = "SuperNode", "SuperExec"


def check_keys(silo: Silo, *, insecure: bool) -> None:
    """Raise PlanError if a key or certificate is missing or readable by others, or if TLS is required but disabled."""
    if not insecure:
        if not silo.ca_path.is_file():
            raise PlanError(
                f"{silo.ca_path}: no such file; get ca.crt from the coordinator, over a channel that you trust (the "
                "coordinator makes it with: gramfuse pki init DIR), and put it there"
            )
        silo.node_key()
        silo.identity()
    elif not is_loopback(host_of(silo.coordinator.address)):
        raise PlanError(
            f"{silo.path}: --insecure-loopback is only for a coordinator on this machine (127.0.0.1, ::1, localhost), "
            f"but 'coordinator.address' is {silo.coordinator.address}; leave the option out"
        )
    elif silo.identity_path.exists():
        silo.identity()


def services(silo: Silo, directory: Path, address: str, ca: Path | None, watch: Watch) -> Iterator[Service]:
    """Write a node's files into its directory, and yield its processes in start order."""
    secret, home = directory / "secret", directory / "flwr"
    write_private(secret, secrets.token_hex(32).encode("ascii"))
    home.mkdir(mode=0o700, exist_ok=True)
    port = free_port()
    environment = {**MALLOC_SETTINGS, "FLWR_HOME": str(home)}

    node = [str(BIN / "flower-supernode"), "--superlink", address, "--host", "127.0.0.1", "--port", str(port)]
    node += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    node += ["--node-config", node_config(silo.path.resolve())]
    if ca is None:
        node += ["--insecure"]
    else:
        node += ["--root-certificates", str(ca), "--auth-supernode-private-key", str(silo.node_key_path)]
    yield Service(NODE, node, watch.node_log.path, environment, advice=watch.advice)

    # -P: import nothing from the working directory.
    runner = [sys.executable, "-P", "-c", "from gramfuse_client.runner import main; main()"]
    runner += ["--runtime-api-address", f"127.0.0.1:{port}", "--insecure", "--superexec-auth-secret-file", str(secret)]
    yield Service(RUNNER, runner, watch.worker_log.path, environment)


def node_config(path: Path) -> str:
    """Return the value of --node-config that tells a SuperNode's worker where the silo file is.

    Raises:
        PlanError: if Flower's option cannot express the path.
    """
    text = str(path)
    if text.isprintable():
        if "'" not in text:
            return f"silo='{text}'"
        if '"' not in text and "\\" not in text:
            return f'silo="{text}"'
    raise PlanError(
        f"{text!r}: Flower's --node-config cannot express this path; use one without control characters, and with "
        "fewer quotes and backslashes"
    )


def follow(supervisor: Supervisor, watch: Watch, *, once: bool) -> None:
    """Keep a node running and print what it does; with `once`, return when one exchange is over."""
    while not (once and watch.over):
        supervisor.poll()
        watch.look()
        if watch.request_stalled(lambda: supervisor.has_worker(RUNNER)):
            say("no worker is answering a request that came in; restarting the SuperNode, so that it fetches it again")
            supervisor.restart(NODE)
        time.sleep(POLL_SECONDS)
