"""A silo's dry run: what keeps it from taking part under a plan, and what would leave it if it did.

Nothing is trained, nothing is written, and nothing of the silo's is sent: the coordinator gets a TLS handshake and a
few empty requests. What is looked at is in `agreement`, `materials`, `resources` and `connection`; here is the order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gramfuse_client.dry_run import of_coordinator, of_inputs, of_machine, of_plan
from gramfuse_client.dry_run.findings import Findings
from gramfuse_client.guard.disclosure import Leaving, leaves
from gramfuse_client.silo_file import Silo
from gramfuse_protocol.errors import PlanError

Progress = Callable[[str], None]
"""Called with what is done next, in words."""


@dataclass(frozen=True)
class DryRun:
    """What a check came to.

    Args:
        file: the silo file.
        silo: the silo's name; empty if the file cannot be read.
        plan: name, version, digest and path of the plan; empty if there is none.
        leaving: None if there is no plan or no layout.
    """

    file: str
    silo: str
    plan: Mapping[str, Any]
    findings: Findings
    leaving: Leaving | None


def check(
    path: Path,
    plan: Path | None = None,
    *,
    offline: bool = False,
    skip_bad: int | None = None,
    now: datetime | None = None,
    progress: Progress = lambda line: None,
) -> DryRun:
    """Look at all that a silo needs for a plan.

    Args:
        path: the silo file.
        plan: the locked plan, or the directory it is in; by default one that the silo joined before.
        offline: leave the coordinator alone.
        skip_bad: in place of the silo file's `data.skip-bad`.
        now: by the silo's own clock, in its own time zone; the present by default.
    """
    found, leaving = Findings(), None
    try:
        silo = Silo.read(path)
    except PlanError as error:
        found.problem("silo file", str(error), f"correct {path}")
        return DryRun(str(path), "", {}, found, None)
    found.ok("silo file", f"{path}, of silo {silo.name}")
    moment = now or datetime.now().astimezone()
    available = of_machine.available_memory()  # before a base model takes some of it
    given = of_plan.find_plan(found, silo, plan)
    if given is not None:
        of_plan.check_terms(found, silo, given)
        of_plan.check_hours(found, silo, moment)
        contributed = of_plan.check_repeat(found, silo, given.plan)
        of_plan.check_attempts(found, silo, given.plan)
    of_plan.check_keys(found, silo, None if given is None else given.plan)
    of_machine.check_state(found, silo)
    last = of_machine.check_ledger(found, silo)
    device = of_machine.check_device(found, silo)
    if given is not None and (silo.name in given.plan.names or not given.plan.task):  # else it has no task here
        progress("reading the data")
        data = of_inputs.check_data(found, silo, given.plan, contributed, offline, skip_bad)
        examples = None if data is None else data[0]
        of_plan.check_releases(found, silo, given.plan, examples)
        progress("reading the base model, and deriving the layout from it; this takes some seconds")
        base = of_inputs.check_base(found, silo, given.plan)
        of_inputs.check_encoding(found, silo, given.plan, base, data)
        of_inputs.check_last_batch(found, silo, given.plan, base, examples)
        layout = of_inputs.check_layout(found, silo, given, base)
        if layout is not None:
            of_plan.check_size(found, silo, given.plan, layout)
            of_machine.check_disk(found, silo, given.plan, layout, base)
            leaving = leaves(silo.name, given.plan, layout)
            if base is not None:
                task = given.plan.task_of(silo.name)
                of_machine.check_memory(found, given.plan, task, layout, base, examples, device, available)
    of_coordinator.check_clock(found, moment, last)
    if not offline:
        progress("connecting to the coordinator")
    of_coordinator.check_coordinator(found, silo, offline=offline)
    return DryRun(str(path), silo.name, {} if given is None else given.about, found, leaving)
