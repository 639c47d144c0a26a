"""Whether a silo's file and keys agree with a plan: all that stands in the way, where a run names the first only."""

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
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.node_key import fingerprint
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.who_sees_what import SHOWN
from gramfuse_protocol.errors import PlanError, RefusalError
from gramfuse_protocol.held_out.noise import spent

VOCABULARY = {
    "mean": "layers that see tokens without context are averaged; no Gram matrix of theirs leaves",
    "diagonal": "of layers that see tokens without context, diagonals of Gram matrices leave, which may tell the words",
    "full": "of layers that see tokens without context, Gram matrices leave, which tell the words and their counts",
}
"""What leaves of layers that see tokens without context, by `merge.context-free`."""

EXPERTS = {
    "mean": "experts of a mixture are averaged; no Gram matrix of theirs leaves",
    "full": "of each expert of a mixture, a Gram matrix leaves; one that only this silo uses is its own",
}
"""What leaves of the experts of a mixture, by `merge.experts`."""


@dataclass(frozen=True)
class Given:
    """The plan that a check is about."""

    path: Path
    plan: Plan

    @property
    def about(self) -> dict[str, Any]:
        """The plan in a few words."""
        header = self.plan.plan
        return {"name": header.name, "version": header.version, "digest": self.plan.digest, "path": str(self.path)}


def find_plan(found: Findings, silo: Silo, where: Path | None) -> Given | None:
    """Return the plan that is named, or the first of those that were joined."""
    joined = _joined(silo) if where is None else [where / "plan.toml" if where.is_dir() else where]
    if not joined:
        found.problem(
            "plan",
            "this silo joined no plan so far, and none was named",
            "get the locked plan (plan.toml and layout.json) from its author, and name it:\n"
            f"gramfuse silo check {silo.path} --plan PLAN_DIRECTORY",
        )
        return None
    try:
        given = Given(joined[0], Plan.read(joined[0]))
    except PlanError as error:
        found.problem("plan", str(error), "get plan.toml and layout.json from the plan's author again")
        return None
    others = f"; {len(joined) - 1} more were joined before, name one with --plan to check it" if joined[1:] else ""
    header = given.plan.plan
    found.ok("plan", f"{header.name}, version {header.version}, from {given.path}{others}\ndigest {given.plan.digest}")
    return given


def _joined(silo: Silo) -> list[Path]:
    """Return the plans that were joined, the one to check first: approved before others, then the newest."""
    paths = [path for path in silo.state.glob("*/plan.toml") if len(path.parent.name) == 64]
    return sorted(paths, key=lambda p: (p.parent.name in silo.file.approved, p.stat().st_mtime), reverse=True)


def check_terms(found: Findings, silo: Silo, given: Given) -> None:
    """Look at each rule of `gramfuse_client.guard.policy` for a plan."""
    plan = given.plan
    secure, metrics = plan.privacy.secure_aggregation, plan.privacy.metrics
    others = [name for name in plan.names if name != silo.name]
    fine = {
        "lock": "base model and layout are pinned",
        "approval": f"{silo.path} lists the plan's digest in 'approved'",
        "roster": f"{silo.name}, with {', '.join(others[:8])}{', …' if others[8:] else ''}",
        "uploads": "masked"
        if secure
        else "open, as 'limits.open-uploads' allows: the coordinator can read what this silo uploads",
        "metrics": SHOWN[metrics]
        + ("; the coordinator can read this silo's own" if metrics == "sum" and not secure else "")
        + _noise(plan),
        "vocabulary": VOCABULARY[plan.merge.context_free],
        "experts": EXPERTS[plan.merge.experts_in(secure=secure)],
    }
    if not plan.locked:
        del fine["approval"]  # a plan has its digest when it is locked
    digests = ", ".join(f'"{digest}"' for digest in (*silo.file.approved, plan.digest))
    approve = f"gramfuse plan show {given.path.parent}\nin {silo.path}, above [data]:\napproved = [{digests}]"
    refused = dict(policy.refusals(silo, plan))
    for subject in fine | refused:
        if subject in refused:
            found.error(subject, refused[subject], approve if subject == "approval" else "")
        else:
            found.ok(subject, fine[subject])


def _noise(plan: Plan) -> str:
    """Say what noise does for held-out results, and what they cost."""
    if not plan.summed:
        return ""
    if plan.epsilon is None:
        return ", without noise, as 'limits.exact-metrics' allows"
    return f", with noise: epsilon {plan.epsilon:g} for each of {plan.releases} sums, {spent(plan):.2f} in all"


def check_hours(found: Findings, silo: Silo, moment: datetime) -> None:
    """Look at the hours in which the silo trains; outside of them it is ready all the same."""
    hours = silo.file.limits.train_hours
    try:
        policy.check_hours(silo, moment)
        found.ok("hours", f"trains {hours}" if hours else "trains at any hour")
    except RefusalError:
        now = f"it is {moment:%H:%M}, and this silo trains {hours} only"
        found.ok("hours", now, "a run that starts now is refused; agree on a time")


def check_repeat(found: Findings, silo: Silo, plan: Plan) -> Contributed | None:
    """Look at whether the silo contributed under the plan before, and return what."""
    state = State(silo.state, plan.digest)
    contributed = None
    try:
        contributed = state.contributed()
        policy.check_repeat(silo, state, "")
        found.ok("repeat", "'limits.repeat-contributions' allows it" if contributed else "the first under this plan")
    except RefusalError as error:
        found.error("repeat", error)
    except OSError as error:
        found.skip("repeat", f"the state directory cannot be read: {error.strerror}")
    except ValueError:
        found.problem(
            "repeat",
            f"{state.directory / 'contributed.json'}: is damaged, or another version's",
            "look in the ledger whether this silo contributed under the plan; if so, a new plan must end with the same "
            "silos:\n"
            f"gramfuse silo ledger show {silo.path}",
        )
    return contributed


def check_attempts(found: Findings, silo: Silo, plan: Plan) -> None:
    """Look at whether an attempt under the plan failed, which is final until it is cleared."""
    clear = f"look into this silo's log, remove the cause, then:\ngramfuse silo clear {silo.path} --plan {plan.digest}"
    try:
        attempts = State(silo.state, plan.digest).attempts.read()
    except (OSError, ValueError):
        found.problem("failures", "the record of what was attempted is damaged, or another version's", clear)
        return
    failed = [attempt for attempt in attempts if attempt.outcome == "failed"]
    if failed:
        works = ", ".join(f"{attempt.work} in round {attempt.round}" for attempt in failed)
        found.problem("failures", f"failed, and takes no further part: {works}", clear)
    else:
        found.ok("failures", "none under this plan")


def check_releases(found: Findings, silo: Silo, plan: Plan, examples: Examples | None) -> None:
    """Look at whether a sum over the whole roster could be subtracted from one that this silo was in."""
    if not plan.privacy.secure_aggregation or silo.name not in plan.names:
        return
    releases = Releases(silo.state / "releases")
    try:
        if not (earlier := releases.read()):
            found.ok("earlier sums", "this silo was in none")
            return
        if examples is None:
            found.skip("earlier sums", f"this silo was in {len(earlier)}; its data were not read")
            return
        cohort = Cohort.of(plan, silo.name, plan.names)
        shared = releases.conflict(releases.rows(examples.given), "statistics", cohort)
    except (OSError, ValueError, PlanError) as error:
        found.problem(
            "earlier sums",
            f"what this silo remembers of them cannot be used: {error}",
            f"restore {releases.directory}, or forget them knowingly:\ngramfuse silo clear {silo.path} --releases",
        )
        return
    if shared is None or silo.file.limits.differing_survivors:
        found.ok("earlier sums", f"{len(earlier)}; a sum over all silos of this plan may follow them")
    else:
        found.problem("earlier sums", shared, "agree on the silos with the plan's author, see docs/threat-model.md")


def check_keys(found: Findings, silo: Silo, plan: Plan | None) -> None:
    """Look at the silo's private keys, and at what the plan's roster has of them."""
    entry = next((entry for entry in plan.silo if entry.name == silo.name), None) if plan else None
    kinds: tuple[tuple[str, str, Path, Callable[[], str]], ...] = (
        ("identity", "public_key", silo.identity_path, lambda: silo.identity().public.hex()),
        ("node key", "node_key", silo.node_key_path, silo.node_key),
    )
    for subject, field, path, read in kinds:
        try:
            held = read()
        except PlanError as error:
            found.error(subject, error)
            continue
        named = getattr(entry, field, held)
        needless = subject == "identity" and plan is not None and not plan.privacy.secure_aggregation
        if named == held or (named is None and needless):
            shown = f"public key {held}" if subject == "identity" else f"fingerprint {fingerprint(held)}"
            found.ok(subject, f"{path}, readable by its owner only\n{shown}")
            continue
        found.problem(
            subject,
            f"the plan's roster has {'another key' if named else 'no key'} for {silo.name} than {path} holds",
            "make sure that the file is the right one, and have its public half put into the plan, then locked:\n"
            f'{field.replace("_", "-")} = "{held}"',
        )


def check_size(found: Findings, silo: Silo, plan: Plan, layout: Layout) -> None:
    """Look at how much one contribution would have."""
    size, most = layout.upload_bytes(masked=plan.privacy.secure_aggregation), silo.file.limits.maximum_bytes
    try:
        policy.check_bytes(silo, plan, layout)
        found.ok("size", f"a contribution has {size:,} bytes" + (f", of {most:,} that may leave" if most else ""))
    except RefusalError as error:
        found.error("size", error)
