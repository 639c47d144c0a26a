"""`gramfuse run`: runs a plan between real silos."""

from __future__ import annotations

import shlex
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import tomlkit

from gramfuse_cli import options
from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import listening, project_directory
from gramfuse_cli.show.progress import RunProgress
from gramfuse_cli.show.results import show_report
from gramfuse_deployment.coordinator import serving
from gramfuse_deployment.flower_run import check_roster, watch, write_app
from gramfuse_deployment.superlink import Link
from gramfuse_deployment.terminal import say
from gramfuse_model.project import Project
from gramfuse_protocol.errors import FederationError, RunDirectoryError, error_types
from gramfuse_server.report.page.view import read_report
from gramfuse_server.report.schema import Report
from gramfuse_server.run.patience import DEFAULT, Patience
from gramfuse_server.run_directory import REPORT

STOP_SECONDS = 30.0
"""How long to wait for a stopped ServerApp to end."""


@click.command()
@project_directory
@click.argument("connection", metavar="[CONNECTION]", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Run directory to make.  [default: runs/<plan>-<time>]")
@click.option(
    "--resume",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Resume an interrupted run; RUN is the run directory that it was going to make.",
)
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=DEFAULT.wait,
    show_default=True,
    help="Seconds to wait for all silos; then the run continues without the missing ones, if the plan allows it.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=DEFAULT.grace,
    show_default=True,
    help="Seconds to wait for a silo that disconnects during the run, before continuing without it.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=DEFAULT.answer,
    help="Seconds to wait for a connected silo's answer, except while it trains or measures.  [default: forever]",
)
@click.option(
    "--serve",
    is_flag=True,
    help="Start the coordinator in CONNECTION for this run, as 'gramfuse server start' does, and stop it afterwards.",
)
@listening
@json_option
def run(
    directory: Path,
    connection: str | None,
    out: Path | None,
    resume: Path | None,
    wait: float,
    grace: float,
    patience: float,
    serve: bool,
    host: str | None,
    port: int,
    as_json: bool,
) -> None:
    """Run the locked plan in DIR between real silos.

    CONNECTION is the directory of 'gramfuse server start'. Run this command on the same machine: the ServerApp writes
    the run directory there. CONNECTION can also be the name of a SuperLink in Flower's configuration
    ($FLWR_HOME/config.toml, by default ~/.flwr/config.toml), with its address and certificates; without it, Flower's
    default connection is used.

    Each silo runs 'gramfuse silo start SILO_TOML' and lists the plan's digest in 'approved'. This command first
    registers the node keys of the plan's roster at the SuperLink, so that these silos can connect; over TLS, a silo
    without a node key cannot.

    A silo that disconnects and does not return in time is left out, as long as the plan's minimum-survivors remain. You
    can resume a run that was interrupted after the silos had trained (Ctrl-C, a full disk, too many silos lost) with
    --resume: no silo trains again.
    """
    from gramfuse_model.loading.source import source_of
    from gramfuse_server.run_directory import check_free, read_checkpoint

    if out is not None and resume is not None:
        raise click.UsageError("--resume continues in the interrupted run's directory; leave out --out")
    project = Project.read(directory)
    layout = project.locked_layout()
    source_of(project.plan, project.directory)
    path = options.run_path(out or resume, project.plan)
    if resume is None:
        check_free(path)
    else:
        path = path.with_name(path.name.removesuffix(".partial"))
        read_checkpoint(path)
    if serve and connection is None:
        raise click.UsageError("--serve needs CONNECTION, the directory with ca.crt, server.crt and server.key")
    with serving(Path(str(connection)), host, port) if serve else nullcontext() as server:
        link = Link.find(connection)
        check_roster(project, link)
        with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch, server.polling() if server else nullcontext():
            app = Path(scratch) / "app"
            write_app(app, project.plan, layout)
            link.admit(project.plan)
            limits = Patience(wait, patience, grace, authenticated=not link.insecure)
            report = _follow(app, link, project, path, {"resume": resume is not None, **limits.to_config()})
    show_report(report, path, as_json)


def _follow(app: Path, link: Link, project: Project, out: Path, config: dict[str, Any]) -> Report:
    """Start a Flower run, show its progress, and return its report.

    Args:
        out: the run directory to make.
        config: run configuration, besides the two directories.

    Raises:
        GramfuseError: the error that ended the run.
    """
    settings = tomlkit.dumps({"directory": str(project.directory), "run-directory": str(out), **config})
    overrides = app.parent / "run.toml"
    overrides.write_text(settings, encoding="utf-8")
    started = link.flwr("run", str(app), link.name, "--run-config", str(overrides))
    run_id = str(started["run-id"])
    failures: list[dict[str, Any]] = []
    try:
        with RunProgress(project.plan.names, lambda name: None) as progress:

            def take(event: dict[str, Any]) -> None:
                if event["state"] == "failed":
                    failures.append(event)
                else:
                    progress.take(event)

            status = watch(run_id, link, take)
    except KeyboardInterrupt:
        link.flwr("stop", run_id, link.name)
        say(_keep_or_discard(project, link, out, STOP_SECONDS) or "nothing of the run is kept", err=True)
        raise
    hint = f"\n{_keep_or_discard(project, link, out)}".rstrip()
    if failures:
        failed = failures[-1]
        error = error_types().get(failed["error"], FederationError)(failed["message"] + hint)
        error.report = Path(failed["report"]) if failed["report"] else None
        raise error
    if status["status"] != "finished:completed" or not out.exists():
        raise FederationError(
            f"Flower run {run_id} ended as {status['status']} ({status.get('status-details') or 'no details'}); "
            f"see: FLWR_HOME={link.home} flwr log {run_id} {link.name} --show{hint}"
        )
    return read_report(out / REPORT)


def _keep_or_discard(project: Project, link: Link, out: Path, seconds: float = 0.0) -> str:
    """Return how to resume an interrupted run; if the silos had not trained yet, discard it and return "".

    Args:
        seconds: how long its ServerApp may take to end.
    """
    from gramfuse_server.run_directory import RESUMABLE, discard, read_checkpoint

    try:
        if RESUMABLE in read_checkpoint(out):
            command = ["gramfuse", "run", str(project.directory), link.argument, "--resume", str(out)]
            return f"the finished phases are kept; resume with: {shlex.join(command)}"
    except RunDirectoryError:
        pass
    discard(out, seconds)
    return ""
