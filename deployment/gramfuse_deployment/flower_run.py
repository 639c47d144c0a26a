"""One run as Flower has it: the app that is sent around, and its log and end as they come."""

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
from gramfuse_server.run.patience import Patience

DEFAULT = Patience()

AWAY_SECONDS = 300.0
"""How long a SuperLink may be away that somebody starts again."""


def write_app(directory: Path, plan: Plan, layout: Layout) -> None:
    """Write the Flower app that is sent around: configuration only, no code.

    Both components are modules of the installed gramfuse; the same plan always gives the same bundle.
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
    """Raise PlanError if a silo of the roster could not connect, since the SuperLink asks for a key that it lacks."""
    lacking = [] if link.insecure else [silo.name for silo in project.plan.silo if silo.node_key is None]
    if lacking:
        raise PlanError(
            f"{project.plan_path}: has no node-key for {', '.join(lacking)}, and the SuperLink at {link.address} lets "
            "nobody connect without one; have each print it with gramfuse silo keygen, write it into its [[silo]], and "
            f"run: gramfuse plan lock {project.directory}"
        )


def watch(run_id: str, link: Link, take: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Hand on the events of a run until it is finished, and return what Flower says of it then.

    The SuperLink may go away meanwhile and come back, and the run goes on; its log is read again from the beginning.

    Raises:
        FederationError: if the SuperLink stays away for AWAY_SECONDS.
    """
    done, answered = 0, time.monotonic()
    while True:
        with subprocess.Popen(  # noqa: S603
            link.command("log", run_id, link.name, "--stream"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**link.environment, "PYTHONUNBUFFERED": "1"},  # into a pipe, Flower's command writes in blocks
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
    """Return the event that a line of the ServerApp's log is, or None."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"phase", "state"} <= event.keys() else None
