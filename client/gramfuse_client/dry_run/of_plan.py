"""Checks a silo's file and keys against a plan: reports every obstacle, where a run stops at the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gramfuse_client.data.examples import Examples
from gramfuse_client.dry_run.findings import Findings
from gramfuse_client.guard import policy
from gramfuse_client.guard.releases import Cohort, Releases
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.state import Contributed, State
from gramfuse_protocol.contract import stages
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.node_key import fingerprint
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.who_sees_what import SHOWN
from gramfuse_protocol.errors import PlanError, RefusalError
from gramfuse_protocol.held_out.noise import spent

VOCABULARY = {
    "mean": "layers that see tokens without context are averaged; none of their Gram matrices leave",
    "diagonal": "layers that see tokens without context: diagonals of Gram matrices leave, which may reveal the words",
    "full": "layers that see tokens without context: Gram matrices leave, which reveal the words and their counts",
}
"""What leaves for layers that see tokens without context, by `merge.context-free`."""

EXPERTS = {
    "mean": "experts of a mixture are averaged; none of their Gram matrices leave",
    "full": "a Gram matrix leaves for each expert of a mixture; that of an expert used only here is this silo's own",
}
"""What leaves for the experts of a mixture, by `merge.experts`."""


@dataclass(frozen=True)
class LocatedPlan:
    """The plan to check, and its file."""

    path: Path
    plan: Plan

    @property
    def about(self) -> dict[str, Any]:
        """The plan's name, version, digest and path, for the report."""
        header = self.plan.plan
        return {"name": header.name, "version": header.version, "digest": self.plan.digest, "path": str(self.path)}


def find_plan(findings: Findings, silo: Silo, where: Path | None) -> LocatedPlan | None:
    """Return the named plan, or the first of the joined plans.

    Args:
        where: the plan's file or directory; None means a joined plan.
    """
    paths = _joined(silo) if where is None else [where / "plan.toml" if where.is_dir() else where]
    if not paths:
        findings.problem(
            "plan",
            "this silo has joined no plan yet, and none was named",
            "get the locked plan (plan.toml and layout.json) from its author, and name it:\n"
            f"gramfuse silo check {silo.path} --plan PLAN_DIRECTORY",
        )
        return None
    try:
        located = LocatedPlan(paths[0], Plan.read(paths[0]))
    except PlanError as error:
        findings.problem("plan", str(error), "get plan.toml and layout.json from the plan's author again")
        return None
    others = f"; the silo joined {len(paths) - 1} more, use --plan to check one of them" if paths[1:] else ""
    header = located.plan.plan
    text = f"{header.name}, version {header.version}, from {located.path}{others}\ndigest {located.plan.digest}"
    findings.ok("plan", text)
    return located


def _joined(silo: Silo) -> list[Path]:
    """Return the files of all joined plans: approved ones first, then the newest first."""
    paths = [path for path in silo.state.glob("*/plan.toml") if len(path.parent.name) == 64]
    return sorted(paths, key=lambda p: (p.parent.name in silo.file.approved, p.stat().st_mtime), reverse=True)


def check_terms(findings: Findings, silo: Silo, located: LocatedPlan) -> None:
    """Check a plan against each rule of `gramfuse_client.guard.policy`."""
    plan = located.plan
    secure, metrics = plan.privacy.secure_aggregation, plan.privacy.metrics
    others = [name for name in plan.names if name != silo.name]
    passed = {
        "lock": "base model and layout are pinned",
        "approval": f"{silo.path} lists the plan's digest in 'approved'",
        "roster": f"{silo.name}, with {', '.join(others[:8])}{', …' if others[8:] else ''}",
        "uploads": "masked"
        if secure
        else "open, as 'limits.open-uploads' allows: the coordinator can read this silo's uploads",
        "metrics": SHOWN[metrics]
        + ("; the coordinator can read this silo's own" if metrics == "sum" and not secure else "")
        + _noise(plan),
        "vocabulary": VOCABULARY[plan.merge.context_free],
        "experts": EXPERTS[plan.merge.experts_in(secure=secure)],
    }
    if not plan.locked:
        del passed["approval"]  # a plan has no final digest before it is locked
    digests = ", ".join(f'"{digest}"' for digest in (*silo.file.approved, plan.digest))
    approve = f"gramfuse plan show {located.path.parent}\nin {silo.path}, above [data]:\napproved = [{digests}]"
    refused = dict(policy.refusals(silo, plan))
    for subject in passed | refused:
        if subject in refused:
            findings.error(subject, refused[subject], approve if subject == "approval" else "")
        else:
            findings.ok(subject, passed[subject])


def _noise(plan: Plan) -> str:
    """Describe the noise in held-out results, and its privacy budget."""
    if not plan.summed:
        return ""
    if plan.epsilon is None:
        return ", without noise, as 'limits.exact-metrics' allows"
    return f", with noise: epsilon {plan.epsilon:g} for each of {plan.releases} sums, {spent(plan):.2f} in all"


def check_hours(findings: Findings, silo: Silo, moment: datetime) -> None:
    """Check the silo's training hours; being outside them is not a problem."""
    hours = silo.file.limits.train_hours
    try:
        policy.check_hours(silo, moment)
        findings.ok("hours", f"trains {hours}" if hours else "trains at any hour")
    except RefusalError:
        now = f"it is {moment:%H:%M}, but this silo trains only {hours}"
        findings.ok("hours", now, "it would refuse a run that starts now; agree on a time")


def check_repeat(findings: Findings, silo: Silo, plan: Plan) -> Contributed | None:
    """Check whether the silo contributed under the plan before, and return the record of it."""
    state = State(silo.state, plan.digest)
    contributed = None
    try:
        contributed = state.contributed()
        policy.check_repeat(silo, state, "")
        findings.ok("repeat", "'limits.repeat-contributions' allows it" if contributed else "the first under this plan")
    except RefusalError as error:
        findings.error("repeat", error)
    except OSError as error:
        findings.skip("repeat", f"the state directory cannot be read: {error.strerror}")
    except ValueError:
        findings.problem(
            "repeat",
            f"{state.directory / 'contributed.json'}: is damaged, or from another version",
            "check in the ledger whether this silo contributed under the plan; if so, a new plan must end with the "
            "same silos:\n"
            f"gramfuse silo ledger show {silo.path}",
        )
    return contributed


def check_attempts(findings: Findings, silo: Silo, plan: Plan) -> None:
    """Check whether an attempt under the plan failed; a failure is final until it is cleared."""
    clear = f"look into this silo's log, remove the cause, then:\ngramfuse silo clear {silo.path} --plan {plan.digest}"
    try:
        attempts = State(silo.state, plan.digest).attempts.read()
    except (OSError, ValueError):
        findings.problem("failures", "the record of attempts is damaged, or from another version", clear)
        return
    failed = [attempt for attempt in attempts if attempt.outcome == "failed"]
    if failed:
        works = ", ".join(f"{attempt.work} in exchange {attempt.round}" for attempt in failed)
        findings.problem("failures", f"this silo failed, so it takes no further part: {works}", clear)
    else:
        findings.ok("failures", "none under this plan")


def check_releases(findings: Findings, silo: Silo, plan: Plan, examples: Examples | None) -> None:
    """Check whether a sum over the whole roster could be subtracted from an earlier sum with this silo."""
    if not plan.privacy.secure_aggregation or silo.name not in plan.names:
        return
    releases = Releases(silo.state / "releases")
    try:
        if not (earlier := releases.read()):
            findings.ok("earlier sums", "this silo was in none")
            return
        if examples is None:
            findings.skip("earlier sums", f"this silo was in {len(earlier)}; its data were not read")
            return
        rows = releases.rows(examples.input_keys)
        least = silo.file.limits.minimum_label_examples
        conflicts = (
            releases.conflict(
                rows,
                stages.subject(plan, stage, "statistics"),
                Cohort.of(plan, silo.name, plan.names, least=least if stage.fits_head else 0),
            )
            for stage in plan.stages
        )
        conflict = next((conflict for conflict in conflicts if conflict), None)
    except (OSError, ValueError, PlanError) as error:
        findings.problem(
            "earlier sums",
            f"this silo's record of them cannot be used: {error}",
            f"restore {releases.directory}, or forget them knowingly:\ngramfuse silo clear {silo.path} --releases",
        )
        return
    if conflict is None or silo.file.limits.differing_survivors:
        findings.ok("earlier sums", f"{len(earlier)}; a sum over all silos of this plan may follow them")
    else:
        findings.problem(
            "earlier sums", conflict, "agree on the silos with the plan's author, see docs/threat-model.md"
        )


def check_keys(findings: Findings, silo: Silo, plan: Plan | None) -> None:
    """Check the silo's private keys against the plan's roster."""
    entry = next((entry for entry in plan.silo if entry.name == silo.name), None) if plan else None
    kinds: tuple[tuple[str, str, Path, Callable[[], str]], ...] = (
        ("identity", "public_key", silo.identity_path, lambda: silo.identity().public.hex()),
        ("node key", "node_key", silo.node_key_path, silo.node_key),
    )
    for subject, field, path, read in kinds:
        try:
            key = read()
        except PlanError as error:
            findings.error(subject, error)
            continue
        in_roster = getattr(entry, field, key)
        optional = subject == "identity" and plan is not None and not plan.privacy.secure_aggregation
        if in_roster == key or (in_roster is None and optional):
            shown = f"public key {key}" if subject == "identity" else f"fingerprint {fingerprint(key)}"
            findings.ok(subject, f"{path}, readable by its owner only\n{shown}")
            continue
        findings.problem(
            subject,
            f"the plan's roster has another key for {silo.name} than {path}"
            if in_roster
            else f"the plan's roster has no key for {silo.name}, but {path} has one",
            "make sure that this is the right file, then have its public key put into the plan, and the plan locked:\n"
            f'{field.replace("_", "-")} = "{key}"',
        )


def check_size(findings: Findings, silo: Silo, plan: Plan, layout: Layout) -> None:
    """Check the size of one contribution."""
    size, most = policy.largest_upload(plan, layout), silo.file.limits.maximum_bytes
    try:
        policy.check_bytes(silo, plan, layout)
        findings.ok("size", f"a contribution has {size:,} bytes" + (f", of {most:,} allowed" if most else ""))
    except RefusalError as error:
        findings.error("size", error)
