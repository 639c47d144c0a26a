"""One Flower run: writes the app that Flower distributes, and follows the run's log until it ends."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomlkit

from gramfuse_deployment.superlink import Link
from gramfuse_model.project import Project
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import FederationError, PlanError
from gramfuse_server.run.patience import DEFAULT

AWAY_SECONDS = 300.0
"""How long the SuperLink may be down before the run is given up."""


def write_app(directory: Path, plan: Plan, layout: Layout) -> None:
    """Write the Flower app that the run distributes: configuration only, no code.

    Both components are modules of the installed gramfuse. The same plan always gives the same bundle.
    """
    directory.mkdir()
    document = {
        "project": {
            "name": f"gramfuse-{plan.plan.name}"[:32].rstrip("-"),
            "version": f"{plan.plan.version}.0.0",
            "description": f"One gramfuse exchange, plan {plan.digest}",
            "license": "Apache-2.0",
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "gramfuse",
                    "components": {"serverapp": "gramfuse_server.app:app", "clientapp": "gramfuse_client.app:app"},
                    "config": {
                        "plan": plan.to_toml(),
                        "layout": layout.to_json(),
                        "directory": "",
                        "run-directory": "",
                        "resume": False,
                        **DEFAULT.to_config(),
                    },
                }
            }
        },
    }
    (directory / "pyproject.toml").write_text(tomlkit.dumps(document), encoding="utf-8")


def check_roster(project: Project, link: Link) -> None:
    """Raise PlanError if the SuperLink requires node keys and a silo of the roster has none."""
    keyless = [] if link.insecure else [silo.name for silo in project.plan.silo if silo.node_key is None]
    if keyless:
        raise PlanError(
            f"{project.plan_path}: no node-key for {', '.join(keyless)}, and the SuperLink at {link.address} requires "
            "one; have each of these silos print its key with gramfuse silo keygen, write it into the silo's "
            f"[[silo]], and run: gramfuse plan lock {project.directory}"
        )


def watch(run_id: str, link: Link, take: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Pass a run's events to `take` until the run is finished, and return Flower's record of the run.

    The SuperLink may restart meanwhile: the run goes on, and its log is read again from the beginning.

    Raises:
        FederationError: if the SuperLink stays down for AWAY_SECONDS.
    """
    done, answered = 0, time.monotonic()
    while True:
        with subprocess.Popen(  # noqa: S603
            link.command("log", run_id, link.name, "--stream"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**link.environment, "PYTHONUNBUFFERED": "1"},  # without it, Flower's command block-buffers a pipe
        ) as log:
            try:
                for number, line in enumerate(log.stdout or (), 1):
                    if number > done and line.endswith("\n"):
                        done, event = number, _event(line)
                        if event is not None:
                            take(event)
            finally:
                log.terminate()
        try:
            (run,) = link.flwr("list", link.name, "--run-id", run_id)["runs"]
        except FederationError:
            if time.monotonic() > answered + AWAY_SECONDS:
                raise
        else:
            answered = time.monotonic()
            if str(run["status"]).startswith("finished"):
                return dict(run)
        time.sleep(1)


def _event(line: str) -> dict[str, Any] | None:
    """Parse a line of the ServerApp's log as an event; None if it is not one."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"phase", "state"} <= event.keys() else None
