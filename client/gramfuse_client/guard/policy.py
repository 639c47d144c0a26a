"""A silo's policy: refuses what its silo file does not allow."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from datetime import datetime
from typing import get_args

from gramfuse_client.data.examples import Examples, left_out
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.state import State
from gramfuse_client.tasks.registry import at_silo
from gramfuse_protocol.contract.form import Form
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import ContextFree
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import GramfuseError, PlanError, RefusalError

log = logging.getLogger(__name__)

_ORDER = ("none", "sum", "silo")
_CONTEXT_FREE = get_args(ContextFree)


def check_plan(silo: Silo, plan: Plan) -> None:
    """Raise the first of `refusals`, or RefusalError if the plan's roster has other keys for this silo."""
    for _, error in refusals(silo, plan):
        raise error
    if plan.privacy.secure_aggregation and plan.roster.keys[silo.name] != silo.identity().public:
        raise RefusalError(
            f"{silo.path}: the plan's roster has another public key for {silo.name!r} than {silo.identity_path}; the "
            f"key here is {silo.identity().public.hex()}",
            reason="the plan's roster has another key for this silo",
        )
    node_key = next(entry.node_key for entry in plan.silo if entry.name == silo.name)
    if node_key is not None and silo.file.coordinator is not None and node_key != silo.node_key():
        raise RefusalError(
            f"{silo.path}: the plan's roster has another node key for {silo.name!r} than {silo.node_key_path}; the key "
            f"here is {silo.node_key()}",
            reason="the plan's roster has another node key for this silo",
        )


def refusals(silo: Silo, plan: Plan) -> Iterator[tuple[str, GramfuseError]]:
    """Yield (subject, error) for everything in a plan that the silo file does not allow.

    Each error names the key of the silo file and, after the first semicolon, what to do.
    """
    limits, privacy = silo.file.limits, plan.privacy

    def refusal(subject: str, message: str, reason: str) -> tuple[str, RefusalError]:
        return subject, RefusalError(f"{silo.path}: {message}", reason=reason)

    if not plan.locked:
        yield refusal(
            "lock",
            "the plan is not locked, so base model and layout are not pinned; its author must run: gramfuse plan lock",
            "the plan is not locked",
        )
    elif plan.digest not in silo.file.approved:
        yield refusal(
            "approval",
            f"plan {plan.digest} is not approved here; read the plan and, if you agree, add the digest to 'approved'",
            "this silo has not approved the plan",
        )
    if silo.name not in plan.names:
        yield refusal(
            "roster",
            f"'name' is {silo.name!r}, but the plan's roster names {', '.join(plan.names)}; correct 'name', or have "
            "this silo added to the plan, and the plan locked again",
            "the plan's roster does not name this silo",
        )
    elif privacy.secure_aggregation:
        try:
            _ = plan.roster
        except PlanError as error:
            yield "roster", error
    if not privacy.secure_aggregation and not limits.open_uploads:
        yield refusal(
            "uploads",
            "under the plan, statistics leave unmasked (privacy.secure-aggregation = false), but 'limits.open-uploads' "
            "is false here; ask for a plan with secure aggregation or, only if the coordinator may read this silo's "
            "own statistics and weights, write under [limits]: open-uploads = true",
            "this silo allows no open uploads",
        )
    if _ORDER.index(privacy.metrics) > _ORDER.index(limits.metrics):
        yield refusal(
            "metrics",
            f"the plan asks for privacy.metrics = {privacy.metrics!r}, but 'limits.metrics' here is "
            f"{limits.metrics!r}; ask for a plan that discloses less or, only if this silo may disclose so much, write "
            f'under [limits]: metrics = "{privacy.metrics}"',
            "this silo does not give that much of its metrics",
        )
    elif plan.summed and plan.epsilon is None and not limits.exact_metrics:
        yield refusal(
            "metrics",
            'the plan adds no noise to held-out counts (privacy.metrics-epsilon = "none"), but '
            "'limits.exact-metrics' is false here; ask for a plan with an epsilon or, only if a malicious coordinator "
            "may learn single held-out examples, write under [limits]: exact-metrics = true",
            "this silo gives no held-out counts without noise",
        )
    asked, allowed = plan.merge.context_free, limits.context_free
    if privacy.secure_aggregation and _CONTEXT_FREE.index(asked) > _CONTEXT_FREE.index(allowed):
        yield refusal(
            "vocabulary",
            f"the plan asks for merge.context-free = {asked!r}, but 'limits.context-free' here is {allowed!r}; ask for "
            f"a plan with merge.context-free = {allowed!r} or, only if the coordinator may learn which words occur in "
            f'the silos\' data and how often, write under [limits]: context-free = "{asked}"',
            "this silo does not give Gram matrices of layers that see tokens without context",
        )
    if privacy.secure_aggregation and plan.merge.experts == "full" and limits.experts != "full":
        yield refusal(
            "experts",
            'the plan asks for merge.experts = "full", but \'limits.experts\' here is "mean"; ask for a plan without '
            "merge.experts or, only if the coordinator may learn this silo's own Gram matrices of experts that no "
            'other silo uses, write under [limits]: experts = "full"',
            "this silo does not give Gram matrices of single experts",
        )


def check_examples(silo: Silo, examples: int) -> None:
    """Raise RefusalError if there are fewer training examples than `limits.minimum-examples`."""
    if examples < silo.file.limits.minimum_examples:
        raise RefusalError(
            f"{silo.path}: {examples} training examples, fewer than 'limits.minimum-examples' = "
            f"{silo.file.limits.minimum_examples}; add data, or lower the limit knowingly",
            reason="this silo has fewer examples than its own minimum",
        )


def check_data(silo: Silo, task: Task, train: Examples, held_out: Examples) -> None:
    """Check a silo's training data; log bad rows that are left out, and labels that do not fit the plan well.

    Raises:
        RefusalError: from `check_examples`.
        DataError: if the plan's `centre` and `scale` do not fit the targets at all.
    """
    for row in left_out(train, held_out):
        log.warning("silo %s leaves out a bad row: %s", silo.name, row)
    check_examples(silo, len(train))
    kind = at_silo(task)
    kind.check_labels(silo.path, task, train.labels)
    if misfit := kind.misfit(train, task):
        log.warning("silo %s: %s", silo.name, misfit)


def check_bytes(silo: Silo, plan: Plan, layout: Layout) -> None:
    """Raise RefusalError if one contribution has more bytes than `limits.maximum-bytes`."""
    most = silo.file.limits.maximum_bytes
    size = largest_upload(plan, layout)
    if most is not None and size > most:
        raise RefusalError(
            f"{silo.path}: a contribution under this plan has {size:,} bytes, but 'limits.maximum-bytes' is {most:,}; "
            'ask for a plan that sends less, for instance merge.gram = { "*" = "block:128" }, or write under [limits]: '
            f"maximum-bytes = {size}",
            reason="a contribution under this plan has more bytes than this silo lets leave",
        )


def largest_upload(plan: Plan, layout: Layout) -> int:
    """Return the bytes of the largest contribution under a plan."""
    return max(stage.form(layout).upload_bytes(masked=plan.privacy.secure_aggregation) for stage in plan.stages)


def check_disk(silo: Silo, plan: Plan, form: Form) -> None:
    """Raise RefusalError if the disk has no space for a session's contribution and masked vector."""
    masked = 8 * form.sum_entries if plan.privacy.secure_aggregation else 0
    check_space(silo, form.contribution_bytes + masked)


def check_space(silo: Silo, needed: int) -> None:
    """Raise RefusalError if fewer than `needed` bytes are free on the disk of the silo's state."""
    directory = silo.state.resolve()
    free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    if free < needed:
        raise RefusalError(
            f"{directory}: no space left: {free:,} bytes are free, but {needed:,} are needed; free space, or name a "
            f"'state' on another disk in {silo.path}",
            reason="no space left on this silo's disk",
        )


def check_hours(silo: Silo, now: datetime) -> None:
    """Raise RefusalError outside the silo's training hours.

    Args:
        now: time by the silo's own clock, in its own time zone.
    """
    hours = silo.file.limits.train_hours
    if hours is not None and now.time() not in hours:
        raise RefusalError(
            f"{silo.path}: it is {now:%H:%M}, outside 'limits.train-hours' = {hours}; run the plan at another time",
            reason=f"this silo trains between {hours} by its own clock",
        )


def check_repeat(silo: Silo, state: State, session: str) -> None:
    """Raise RefusalError if the silo contributed to this round in another session, unless its file allows that."""
    contributed = state.contributed()
    sessions = contributed.sessions.get(state.round, ()) if contributed else ()
    if not sessions or session in sessions or silo.file.limits.repeat_contributions:
        return
    raise RefusalError(
        f"{silo.path}: this silo contributed under this plan before; resume the interrupted run (gramfuse run "
        "--resume), agree on a new plan, which must end with the same silos over these rows, or set "
        "'limits.repeat-contributions = true'",
        reason="this silo contributed under this plan before",
    )
