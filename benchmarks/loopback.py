"""A SuperLink and SuperNodes as real processes on the loopback interface."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from gramfuse_deployment.processes import contained

BIN = Path(sys.executable).parent
CONNECTION = "loopback"
START_SECONDS = 120


@contextlib.contextmanager
def deployment(directory: Path, silos: Sequence[Path]) -> Iterator[Path]:
    """Start a SuperLink and one SuperNode for each silo file; stop all of them on exit.

    Yields:
        The FLWR_HOME whose configuration names the SuperLink CONNECTION.
    """
    port = free_port()
    home = directory / "flwr"
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        f'[superlink]\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8"
    )
    environment = {
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # Flower starts its own commands by name
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }
    with contextlib.ExitStack() as stack:
        log = directory / "superlink.log"
        link = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        stack.enter_context(contained([*link, "--disable-runtime-dependency-installation"], log, environment))
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                if time.monotonic() > deadline:
                    raise TimeoutError(log.read_text(encoding="utf-8")) from None
                time.sleep(0.2)
        for number, silo in enumerate(silos):
            node = [str(BIN / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}"]
            node += ["--port", str(free_port()), "--node-config", f'silo="{silo}"']
            stack.enter_context(contained(node, directory / f"supernode-{number}.log", environment))
        yield home


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
