"""A silo's dry run: finds what prevents it from taking part under a plan, and lists what it would send.

It trains nothing, writes nothing, and sends none of the silo's data: the coordinator gets a TLS handshake and a few
empty requests. The checks are in `of_plan`, `of_inputs`, `of_machine` and `of_coordinator`; this module runs them in
order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gramfuse_client.dry_run import of_coordinator, of_inputs, of_machine, of_plan
from gramfuse_client.dry_run.findings import Findings
from gramfuse_client.guard.disclosure import Disclosure, disclose
from gramfuse_client.silo_file import Silo
from gramfuse_protocol.errors import PlanError

Progress = Callable[[str], None]
"""Called with a description of the next step."""


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run.

    Args:
        file: the silo file.
        silo: the silo's name; empty if the file cannot be read.
        plan: name, version, digest and path of the plan; empty if there is none.
        disclosure: what a run would send; None without a plan or layout.
    """

    file: str
    silo: str
    plan: Mapping[str, Any]
    findings: Findings
    disclosure: Disclosure | None


def check(
    path: Path,
    plan: Path | None = None,
    *,
    offline: bool = False,
    skip_bad: int | None = None,
    now: datetime | None = None,
    progress: Progress = lambda line: None,
) -> DryRun:
    """Check everything that a silo needs for a plan.

    Args:
        path: the silo file.
        plan: the locked plan, or its directory; by default one that the silo joined before.
        offline: do not contact the coordinator.
        skip_bad: overrides the silo file's `data.skip-bad`.
        now: time by the silo's own clock, in its own time zone; by default the present.
    """
    findings, disclosure = Findings(), None
    try:
        silo = Silo.read(path)
    except PlanError as error:
        findings.problem("silo file", str(error), f"correct {path}")
        return DryRun(str(path), "", {}, findings, None)
    findings.ok("silo file", f"{path}, of silo {silo.name}")
    moment = now or datetime.now().astimezone()
    available = of_machine.available_memory()  # before the base model uses some
    located = of_plan.find_plan(findings, silo, plan)
    if located is not None:
        of_plan.check_terms(findings, silo, located)
        of_plan.check_hours(findings, silo, moment)
        contributed = of_plan.check_repeat(findings, silo, located.plan)
        of_plan.check_attempts(findings, silo, located.plan)
    of_plan.check_keys(findings, silo, None if located is None else located.plan)
    of_machine.check_state(findings, silo)
    last = of_machine.check_ledger(findings, silo)
    device = of_machine.check_device(findings, silo)
    if located is not None and (silo.name in located.plan.names or not located.plan.task):  # else it has no task here
        progress("reading the data")
        data = of_inputs.check_data(findings, silo, located.plan, contributed, offline, skip_bad)
        examples = None if data is None else data[0]
        of_inputs.check_common(findings, silo, located.plan, examples)
        of_plan.check_releases(findings, silo, located.plan, examples)
        progress("reading the base model, and deriving the layout from it; this takes some seconds")
        base = of_inputs.check_base(findings, silo, located.plan)
        of_inputs.check_encoding(findings, silo, located.plan, base, data)
        of_inputs.check_last_batch(findings, silo, located.plan, base, examples)
        layout = of_inputs.check_layout(findings, silo, located, base)
        if layout is not None:
            of_plan.check_size(findings, silo, located.plan, layout)
            of_machine.check_disk(findings, silo, located.plan, layout, base)
            disclosure = disclose(silo.name, located.plan, layout)
            if base is not None:
                task = located.plan.task_of(silo.name)
                settings = silo.file.memory
                of_machine.check_memory(
                    findings, located.plan, task, layout, base, examples, device, available, settings
                )
    of_coordinator.check_clock(findings, moment, last)
    if not offline:
        progress("connecting to the coordinator")
    of_coordinator.check_coordinator(findings, silo, offline=offline)
    return DryRun(str(path), silo.name, {} if located is None else located.about, findings, disclosure)
