"""Runs a simulation in a process of its own, and returns its report."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gramfuse_deployment.processes import contained
from gramfuse_deployment.tail import Growing
from gramfuse_deployment.terminal import say, uncoloured
from gramfuse_model.project import Project
from gramfuse_protocol.errors import FederationError, GramfuseError, ModelError, RefusalError, error_types
from gramfuse_protocol.files import write_private
from gramfuse_protocol.secure_sum.keys import KEY_BYTES, Identity
from gramfuse_server.report.schema import Report
from gramfuse_simulation.engine import LOG
from gramfuse_simulation.terms import Term, check_terms
from gramfuse_simulation.tuning import Wanted

if TYPE_CHECKING:
    from gramfuse_client.silo_file import Silo
    from gramfuse_protocol.contract.plan import Plan

LOG_LINES = 30

SILO_ERROR = re.compile(r"silo \S+, phase \w+: \w+Error: .*")
"""The line of a silo's log with the reason for a refusal or failure (`gramfuse_client.exchange.participant`)."""

SHORT = ("/tmp", "/var/tmp")  # noqa: S108  # a private directory is created in one of them
"""Alternatives for Ray's sockets if the path of the default temporary directory is too long."""

SOCKET_PATH = 103 if sys.platform == "darwin" else 107
"""Most bytes in a socket's path."""

RAY_PATH = len("/gf-xxxxxxxx/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
"""Bytes that Ray adds to the path of the temporary directory."""

FLOWER_LOG = "flower.log"
"""File name of Flower's log, also beside the report of a failed run."""


class RunView(AbstractContextManager["RunView"], Protocol):
    """Shows the progress of a run; provided by the caller."""

    def take(self, event: Mapping[str, Any]) -> None:
        """Show one event of the exchange."""

    def refresh(self) -> None:
        """Update the silos' progress."""


View = Callable[[tuple[str, ...], Callable[[str], Mapping[str, Any] | None]], RunView]
"""Creates a view from the silos' names and a function that returns a silo's last progress (phase, done, total)."""


def run_simulation(
    project: Project,
    out: Path,
    view: View,
    *,
    tune: Wanted | None = None,
    compare: tuple[Term, ...] = (),
    opened: bool = False,
) -> Report:
    """Simulate one exchange and return its report.

    Args:
        out: the run directory to create.
        view: shows the progress.
        tune: the search over merges on validation data, if any.
        compare: other models to measure.
        opened: whether silos allow open uploads, regardless of their files.

    Raises:
        GramfuseError: if the simulation fails; only the report of the failed run remains, if it got that far.
    """
    from gramfuse_client.silo_file import read_silos
    from gramfuse_server.run_directory import check_free, discard

    check_terms(compare, project.plan)
    check_free(out)
    sockets = socket_directory()
    say("reading the silos' data and the base model", err=True)
    silos = read_silos(project.directory, project.plan.names)
    for silo in silos.values():
        _check_silo(project, silo, tuned=tune is not None)
    plan, layout = project.locked()
    identities = {name: Identity(secrets.token_bytes(KEY_BYTES)) for name in silos}
    if plan.privacy.secure_aggregation:
        plan = plan.with_keys({name: identity.public.hex() for name, identity in identities.items()})
    with (
        tempfile.TemporaryDirectory(prefix="gf-", ignore_cleanup_errors=True) as directory,
        tempfile.TemporaryDirectory(prefix="gf-", dir=sockets, ignore_cleanup_errors=True) as private,
    ):
        scratch = Path(directory)
        _write_states(scratch / "silos", plan, silos.values(), identities, opened=opened)
        spec = {
            "plan": plan.to_toml(),
            "layout": layout.to_json(),
            "directory": str(project.directory),
            "out": str(out),
            "silos": [str(silo.path) for silo in silos.values()],
            "state": str(scratch / "silos"),
            "ray": str(Path(private) / "ray"),  # Ray makes it world-writable
            "events": str(scratch / "events.jsonl"),
            "outcome": str(scratch / "outcome.json"),
            "gpus_per_silo": _gpus_per_silo(len(silos)),
            "tune": None if tune is None else asdict(tune),
            "compare": ",".join(term.text for term in compare if not term.method.always),
            "opened": opened,
        }
        (scratch / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        try:
            code = _run_engine(scratch, plan, view)
            return _outcome(scratch, code, plan.names, out)
        finally:
            discard(out)


def _check_silo(project: Project, silo: Silo, *, tuned: bool) -> None:
    """Make a silo's later checks now, with the details that only the silo would see.

    Args:
        tuned: whether validation examples are needed.

    Raises:
        GramfuseError: if the silo would refuse.
    """
    from gramfuse_client.data.examples import left_out, load, load_validation
    from gramfuse_client.guard.policy import check_examples
    from gramfuse_client.tasks.registry import at_silo
    from gramfuse_model.loading.source import source_of

    task = project.plan.task_of(silo.name)
    examples, held_out = load(silo, task)
    if bad := left_out(examples, held_out):
        say(f"{silo.name}: {len(bad)} bad rows are skipped:", *bad, err=True)
    check_examples(silo, len(examples))
    kind = at_silo(task)
    kind.check_labels(silo.path, task, examples.labels)
    if misfit := kind.misfit(examples, task):
        say(f"{silo.name}: {misfit}", style="yellow", err=True)
    if tuned:
        load_validation(silo, task)
    if silo.base is not None:
        try:
            source_of(project.plan, project.directory, silo.base)
        except ModelError as error:
            raise ModelError(f"{silo.path}: {error}") from None


def _write_states(
    state: Path, plan: Plan, silos: Iterable[Silo], identities: Mapping[str, Identity], *, opened: bool
) -> None:
    """Write each silo's identity into its state directory, and check that its silo file allows the plan.

    Raises:
        RefusalError: if a silo file does not allow it.
    """
    from gramfuse_client.guard.policy import check_plan
    from gramfuse_client.silo_file import write_identity
    from gramfuse_simulation.engine import simulated_silo

    for name, identity in identities.items():
        write_identity(state / name / "identity.pem", identity)
    for silo in silos:
        check_plan(simulated_silo(str(silo.path), str(state), plan.digest, opened=opened), plan)


def _run_engine(scratch: Path, plan: Plan, view: View) -> int:
    """Run the simulation's process, show its events, and return its exit status.

    Args:
        scratch: its working directory, with `spec.json`.
    """
    from gramfuse_client.state.state import read_progress

    # A killed silo does not clean up; its files go with the scratch directory.
    environment: dict[str, str | None] = {"FLWR_HOME": str(scratch / "flwr"), "TMPDIR": str(scratch / "tmp")}
    environment["RAY_ADDRESS"] = None  # never join an existing cluster: a simulation stays on this machine
    (scratch / "tmp").mkdir()
    command = [sys.executable, "-m", "gramfuse_simulation.engine", str(scratch / "spec.json")]
    events = Growing(scratch / "events.jsonl")  # before the first write
    with (
        view(plan.names, lambda silo: read_progress(scratch / "silos" / silo, plan.digest)) as shown,
        contained(command, scratch / FLOWER_LOG, environment) as process,
    ):
        shown.take({"phase": "start", "state": "start"})
        while process.poll() is None:
            for line in events.lines():
                shown.take(json.loads(line))
            shown.refresh()
            time.sleep(0.1)
        for line in events.lines():
            shown.take(json.loads(line))
    return int(process.returncode)


def socket_directory() -> str:
    """Return the parent for a directory of Ray's sockets: the default temporary directory, or a shorter one.

    Raises:
        FederationError: if no path is short enough and writable.
    """
    longest = SOCKET_PATH - RAY_PATH
    for place in (tempfile.gettempdir(), *SHORT):
        if len(os.fsencode(place)) <= longest and os.access(place, os.W_OK | os.X_OK):
            return place
    raise FederationError(
        f"{tempfile.gettempdir()}: this path is too long for Ray's sockets, which are limited to {SOCKET_PATH} bytes, "
        f"and {' and '.join(SHORT)} are not writable; set TMPDIR to a directory whose path has at most {longest} bytes"
    )


def _outcome(scratch: Path, code: int, silos: Sequence[str], out: Path) -> Report:
    """Return the report, or raise the simulation's error.

    Args:
        scratch: its working directory.
        code: its exit status.
        silos: their names.
        out: the run directory to create.
    """
    try:
        outcome = json.loads((scratch / "outcome.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        outcome = {"error": "FederationError", "message": f"the simulation's process exited with status {code}"}
    if "report" in outcome:
        return Report.read(outcome["report"])
    kind: type[GramfuseError] = error_types().get(outcome["error"], FederationError)
    report = Path(outcome["left"]) if outcome.get("left") else None
    message = outcome["message"]
    if kind in (FederationError, RefusalError):  # other errors need no logs
        logs = {silo: _read(scratch / "silos" / silo / LOG) for silo in silos}
        reasons = {silo: list(dict.fromkeys(SILO_ERROR.findall(text))) for silo, text in logs.items()}
        if any(reasons.values()):
            details = (f"  {line}" for lines in reasons.values() for line in lines)
            say("From the silos' own logs:", *details, "", err=True)
        kept = {f"silo-{silo}.log": logs[silo] for silo in silos if reasons[silo]}
        message += _keep_logs(out, kept | {FLOWER_LOG: uncoloured(_read(scratch / FLOWER_LOG))}, new=report is None)
    error = kind(message)
    error.report = report
    raise error


def _keep_logs(out: Path, logs: Mapping[str, str], *, new: bool) -> str:
    """Copy logs into the directory of the failed run, and return lines that name them.

    If they cannot be copied, prints the last lines of Flower's log.

    Args:
        new: whether the directory does not exist yet, because the failed run left no report.
    """
    from gramfuse_server.run_directory import failed_of, forget

    failed, lines = failed_of(out), ""
    try:
        if new:
            forget(failed)
            failed.mkdir(mode=0o700, parents=True)
        for name, text in logs.items():
            write_private(failed / name, text.encode())
            silo = name.removeprefix("silo-").removesuffix(".log")
            title = "Flower's log" if name == FLOWER_LOG else f"The log of silo {silo!r}"
            lines += f"\n{title} is {failed / name}"
    except OSError:
        tail = logs[FLOWER_LOG].split("\n")[-LOG_LINES:]
        say("The last lines of Flower's log:", *(f"  {line}" for line in tail), "", err=True)
    return lines


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def _gpus_per_silo(silos: int) -> float:
    import torch

    return min(1.0, torch.cuda.device_count() / silos)
