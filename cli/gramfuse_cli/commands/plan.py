"""`gramfuse plan`: locks or shows the contract of a merge."""

from __future__ import annotations

import click

from gramfuse_cli.group import FileGroup
from gramfuse_protocol.contract.plan import Plan


@click.group(cls=FileGroup, prefix="plan_")
def plan() -> None:
    """Lock a plan, or show what it means.

    A plan (DIR/plan.toml) is the contract of one merge: base model, training, merge, privacy, silos. Every silo
    approves its digest, and every message is bound to it.
    """


def pins(plan: Plan) -> dict[str, str]:
    """Return the pins of a plan's base model, by their names on the terminal."""
    shown = {"revision": "commit", "sha256": "weights"}
    return {shown.get(key, key): value for key, value in plan.pins._asdict().items() if value is not None}
