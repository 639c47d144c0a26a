"""What a silo refuses, by its own file."""

from __future__ import annotations

from gramfuse_client.silo import Silo
from gramfuse_protocol.errors import RefusalError
from gramfuse_protocol.plan import Plan

_ORDER = ("none", "sum", "silo")


def check_plan(silo: Silo, plan: Plan) -> None:
    """Raise RefusalError, naming the key of the silo file, if a plan goes beyond what the file allows."""
    file = silo.file
    if plan.digest not in file.approved:
        raise RefusalError(
            f"{silo.path}: plan {plan.digest} is not approved here; read the plan, then add the digest to 'approved'",
            reason="this silo has not approved the plan",
        )
    if silo.name not in plan.names:
        raise RefusalError(
            f"{silo.path}: 'name' is {silo.name!r}; the plan's roster names {', '.join(plan.names)}",
            reason="the plan's roster does not name this silo",
        )
    if not plan.locked:
        raise RefusalError(
            f"{silo.path}: the plan is not locked, so base model and layout are not pinned; run: gramfuse plan lock",
            reason="the plan is not locked",
        )
    if not plan.privacy.secure_aggregation and not file.limits.open_uploads:
        raise RefusalError(
            f"{silo.path}: the plan has the statistics leave in the clear (privacy.secure-aggregation = false), and "
            "'limits.open-uploads' is false here",
            reason="this silo allows no open uploads",
        )
    if plan.privacy.secure_aggregation and plan.roster.keys[silo.name] != silo.identity().public:
        raise RefusalError(
            f"{silo.path}: the plan's roster has another public key for {silo.name!r} than {silo.identity_path} holds; "
            f"here it is {silo.identity().public.hex()}",
            reason="the plan's roster has another key for this silo",
        )
    if _ORDER.index(plan.privacy.metrics) > _ORDER.index(file.limits.metrics):
        raise RefusalError(
            f"{silo.path}: the plan asks for privacy.metrics = {plan.privacy.metrics!r}, 'limits.metrics' here is "
            f"{file.limits.metrics!r}",
            reason="this silo does not give that much of its metrics",
        )


def check_examples(silo: Silo, examples: int) -> None:
    """Raise RefusalError if there are fewer training examples than the silo's own minimum."""
    if examples < silo.file.limits.minimum_examples:
        raise RefusalError(
            f"{silo.path}: {examples} training examples, fewer than 'limits.minimum-examples' = "
            f"{silo.file.limits.minimum_examples}",
            reason="this silo has fewer examples than its own minimum",
        )
