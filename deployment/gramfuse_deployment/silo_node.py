"""A silo's node: its processes, and how it is kept running."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gramfuse_deployment.endpoint import free_port, host_of, is_loopback
from gramfuse_deployment.processes import BIN, GIVE_BACK
from gramfuse_deployment.silo_watch import Watch
from gramfuse_deployment.supervisor import POLL_SECONDS, Service, Supervisor, say
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.files import write_private

if TYPE_CHECKING:
    from gramfuse_client.silo_file import Silo

NODE, RUNNER = "SuperNode", "SuperExec"


def check_keys(silo: Silo, *, insecure: bool) -> None:
    """Raise PlanError if a key or certificate is missing or can be read by others, or TLS must not be left out."""
    if not insecure:
        if not silo.ca_path.is_file():
            raise PlanError(
                f"{silo.ca_path}: no such file; get the coordinator's ca.crt, from a source that you trust (there it "
                "is made by: gramfuse pki init DIR), and put it there"
            )
        silo.node_key()
        silo.identity()
    elif not is_loopback(host_of(silo.coordinator.address)):
        raise PlanError(
            f"{silo.path}: --insecure-loopback is for a coordinator on this machine (127.0.0.1, ::1, localhost), and "
            f"'coordinator.address' is {silo.coordinator.address}; leave it out"
        )
    elif silo.identity_path.exists():
        silo.identity()


def services(silo: Silo, directory: Path, address: str, ca: Path | None, watch: Watch) -> Iterator[Service]:
    """Write what a node needs into its directory, and yield its processes in the order of their start."""
    secret, home = directory / "secret", directory / "flwr"
    write_private(secret, secrets.token_hex(32).encode("ascii"))
    home.mkdir(mode=0o700, exist_ok=True)
    port = free_port()
    environment = {**GIVE_BACK, "FLWR_HOME": str(home)}

    node = [str(BIN / "flower-supernode"), "--superlink", address, "--host", "127.0.0.1", "--port", str(port)]
    node += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    node += ["--node-config", node_config(silo.path.resolve())]
    if ca is None:
        node += ["--insecure"]
    else:
        node += ["--root-certificates", str(ca), "--auth-supernode-private-key", str(silo.node_key_path)]
    yield Service(NODE, node, watch.node_log.path, environment, advice=watch.advice)

    # -P: nothing is imported from the directory that it happens to run in.
    runner = [sys.executable, "-P", "-c", "from gramfuse_client.runner import main; main()"]
    runner += ["--runtime-api-address", f"127.0.0.1:{port}", "--insecure", "--superexec-auth-secret-file", str(secret)]
    yield Service(RUNNER, runner, watch.worker_log.path, environment)


def node_config(path: Path) -> str:
    """Return the option by which a SuperNode tells its worker where the silo file is.

    Raises:
        PlanError: if Flower could not read the path.
    """
    text = str(path)
    if text.isprintable():
        if "'" not in text:
            return f"silo='{text}'"
        if '"' not in text and "\\" not in text:
            return f'silo="{text}"'
    raise PlanError(
        f"{text!r}: Flower cannot be told this path; use one with fewer quotes and backslashes, and without control "
        "characters"
    )


def follow(supervisor: Supervisor, watch: Watch, *, once: bool) -> None:
    """Keep a node running and say what it does; with `once`, return when one exchange is over."""
    while not (once and watch.over):
        supervisor.poll()
        watch.look()
        if watch.forsaken(lambda: supervisor.works(RUNNER)):
            say("a request came and no worker answers it: the SuperNode is started again, so that it is asked anew")
            supervisor.restart(NODE)
        time.sleep(POLL_SECONDS)
