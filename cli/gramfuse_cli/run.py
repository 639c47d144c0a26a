"""`gramfuse run`: an exchange between real silos."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import click
import tomlkit

from gramfuse_cli import options
from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import project_directory
from gramfuse_cli.processes import FLOWER_OFF
from gramfuse_cli.progress import RunProgress
from gramfuse_cli.project import Project
from gramfuse_cli.report import show_report
from gramfuse_protocol.errors import FederationError, PlanError, error_types
from gramfuse_protocol.layout import Layout
from gramfuse_protocol.plan import Plan

WAIT = 600.0


@click.command()
@project_directory
@click.argument("connection", metavar="[CONNECTION]", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Run directory to make.  [default: runs/<plan>-<time>]")
@click.option(
    "--resume",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Go on with an interrupted run, given by the run directory that it was to make.",
)
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=WAIT,
    show_default=True,
    help="Seconds to wait for all silos; then the run goes on without the missing ones, if the plan allows it.",
)
@json_option
def run(
    directory: Path, connection: str | None, out: Path | None, resume: Path | None, wait: float, as_json: bool
) -> None:
    """Run the locked plan in DIR between the silos that are connected to a SuperLink.

    CONNECTION is the name of a SuperLink in Flower's configuration ($FLWR_HOME/config.toml, by default
    ~/.flwr/config.toml), where each has an address and its certificates; without it, Flower's default is taken.
    Run this on the coordinator's host: the SuperLink's ServerApp writes the run directory there.

    Each silo runs a SuperNode with its own silo file: flower-supernode --superlink HOST:PORT
    --node-config 'silo="/path/to/silo.toml"', and has the plan's digest among 'approved'.

    A silo that goes away is left out, as long as the plan's minimum-survivors are there. A run that was interrupted
    after the silos had trained (the ServerApp was killed, too many silos went away) can go on with --resume: no silo
    trains again.
    """
    from gramfuse_server.run import check_free, read_checkpoint

    if out is not None and resume is not None:
        raise click.UsageError("--resume goes on in the directory of the interrupted run; leave out --out")
    project = Project.read(directory)
    layout = project.locked_layout()
    path = options.run_path(out or resume, project.plan)
    if resume is None:
        check_free(path)
    else:
        path = path.with_name(path.name.removesuffix(".partial"))
        read_checkpoint(path)
    link = _connection(connection)
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch:
        app = Path(scratch) / "app"
        write_app(app, project.plan, layout)
        report = _follow(app, link, project, path, {"resume": resume is not None, "wait": wait})
    show_report(report, path, as_json)


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
                        "wait": WAIT,
                    },
                }
            }
        },
    }
    (directory / "pyproject.toml").write_text(tomlkit.dumps(document), encoding="utf-8")


def _connection(name: str | None) -> str:
    """Return the name of a SuperLink connection; refuse those that would start one on the side."""
    path = Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")) / "config.toml"
    try:
        links = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
    except FileNotFoundError:
        links = {}
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{path}: not valid TOML: {error}") from None
    name = name or links.get("default")
    link = links.get(name) if name else None
    if not isinstance(link, dict) or str(link.get("address", ":local")).startswith(":local"):
        known = [
            k for k, v in links.items() if isinstance(v, dict) and not str(v.get("address", "")).startswith(":local")
        ]
        raise PlanError(
            f"{path}: {name!r} is not a connection to a SuperLink; known: {', '.join(known) or 'none'}. Write\n"
            '[superlink.NAME]\naddress = "HOST:PORT"\nroot-certificates = "/path/to/ca.crt"\n'
            "or, to run all silos on this machine, use gramfuse simulate"
        )
    return str(name)


def _follow(app: Path, link: str, project: Project, out: Path, how: dict[str, Any]) -> dict[str, Any]:
    from gramfuse_server.run import CHECKPOINT, partial_of

    settings = tomlkit.dumps({"directory": str(project.directory), "run-directory": str(out), **how})
    overrides = app.parent / "run.toml"
    overrides.write_text(settings, encoding="utf-8")
    started = _flwr("run", str(app), link, "--run-config", str(overrides), "--format", "json")
    run_id = str(started["run-id"])
    failure: dict[str, Any] | None = None
    try:
        with (
            RunProgress(project.plan.names, lambda name: None) as progress,
            subprocess.Popen(  # noqa: S603
                [_executable(), "log", run_id, link, "--stream"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **FLOWER_OFF},
            ) as log,
        ):
            try:
                for line in log.stdout or ():
                    event = _event(line)
                    if event is not None and event["state"] == "failed":
                        failure = event
                    elif event is not None:
                        progress.take(event)
            finally:
                log.terminate()
        status = _status(run_id, link)
    except KeyboardInterrupt:
        _flwr("stop", run_id, link, "--format", "json")
        shutil.rmtree(partial_of(out), ignore_errors=True)
        raise
    go_on = ""
    if (partial_of(out) / CHECKPOINT).exists():
        go_on = f"\nWhat was done is kept; go on with: gramfuse run {project.directory} {link} --resume {out}"
    if failure is not None:
        raise error_types().get(failure["error"], FederationError)(failure["message"] + go_on)
    if status["status"] != "finished:completed" or not out.exists():
        raise FederationError(
            f"Flower run {run_id} ended as {status['status']} ({status.get('status-details') or 'no details'}); "
            f"see: flwr log {run_id} {link} --show{go_on}"
        )
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def _status(run_id: str, link: str) -> dict[str, Any]:
    """Wait until a run is finished, and return what Flower says of it."""
    while True:
        (run,) = _flwr("list", link, "--run-id", run_id, "--format", "json")["runs"]
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


def _flwr(*arguments: str) -> dict[str, Any]:
    """Call Flower's command line and return the JSON object that it prints."""
    done = subprocess.run(  # noqa: S603
        [_executable(), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **FLOWER_OFF},
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {"success": False, "error-message": (done.stderr or done.stdout).strip()}
    if done.returncode or not answer.get("success", True):
        raise FederationError(f"flwr {arguments[0]}: {answer.get('error-message') or done.stderr.strip()}")
    return answer


def _executable() -> str:
    """Path of the flwr command that is installed beside this Python."""
    return str(Path(sys.executable).with_name("flwr"))
