"""`gramfuse plan`: the contract of a merge."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import project_directory
from gramfuse_cli.project import Project
from gramfuse_protocol.layout import ITEM_BYTES, Layout
from gramfuse_protocol.plan import Plan


@click.group()
def plan() -> None:
    """Lock a plan, or show what it means.

    A plan (DIR/plan.toml) is the contract of one merge: base model, training, merge, privacy, silos. Its digest is what
    every silo approves and what binds every message.
    """


@plan.command()
@project_directory
@json_option
def lock(directory: Path, as_json: bool) -> None:
    """Pin the base model's weights and the layout in DIR/plan.toml, and print the plan's digest.

    Writes model.sha256 and merge.layout into plan.toml and the layout into layout.json. Do it again after any change;
    each silo then has to approve the new digest ('approved' in its silo file).
    """
    project = Project.read(directory)
    unlocked = Project(project.directory, project.plan.model_copy(update={
        "model": project.plan.model.model_copy(update={"sha256": None}),
        "merge": project.plan.merge.model_copy(update={"layout": None}),
    }))
    locked, layout = unlocked.locked()
    project.write_lock(locked, layout)
    if as_json:
        click.echo(json.dumps({
            "plan": str(project.plan_path),
            "plan_digest": locked.digest,
            "base_sha256": locked.model.sha256,
            "layout_digest": layout.digest,
        }))
        return
    click.echo(f"base    {locked.model.sha256}\nlayout  {layout.digest}\nplan    {locked.digest}")


@plan.command()
@project_directory
@json_option
def show(directory: Path, as_json: bool) -> None:
    """Show what a plan merges in closed form, what it averages, and what it costs.

    Nothing is sent or written. Times are measured on this machine for its matrix products and stated for an upload of
    20 MB/s; fine-tuning itself is not in them.
    """
    project = Project.read(directory)
    locked, layout = project.locked()
    preview = _preview(project, locked, layout)
    if as_json:
        click.echo(json.dumps(preview))
        return
    console = Console()
    state = "locked" if project.plan.locked else "not locked; the digest is what locking would give"
    console.print(f"plan [bold]{locked.plan.name}[/] {locked.digest} ({state})", soft_wrap=True)
    console.print(f"base {locked.model.base}, silos {', '.join(locked.names)}, alpha {locked.merge.alpha}\n")
    table = Table(title="Merged in closed form", title_justify="left")
    for column, justify in (("weights that share one Gram matrix", "left"), ("d_in", "right"), ("structure", "left"),
                            ("entries", "right"), ("bytes", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for group in preview["groups"]:
        table.add_row("\n".join(group["weights"]), f"{group['d_in']:,}", group["structure"],
                      f"{group['entries']:,}", f"{group['bytes']:,}")
    console.print(table)
    console.print(f"\nAveraged: {', '.join(preview['averaged']) or 'nothing'}", highlight=False)
    console.print(f"Frozen, never sent: {', '.join(preview['frozen']) or 'nothing'}\n", highlight=False)
    cost = preview["cost"]
    console.print(
        f"Each silo sends {cost['upload_bytes'] / 1e6:.1f} MB (Gram matrices {cost['gram_bytes'] / 1e6:.1f}, differences "
        f"{cost['delta_bytes'] / 1e6:.1f}): about {cost['upload_seconds']:.0f} s at 20 MB/s.\n"
        f"Each silo needs {cost['silo_memory_bytes'] / 1e6:.0f} MB beside the training, and about "
        f"{cost['gram_seconds']:.1f} s for Gram matrices of {locked.merge.tokens:,} tokens on this machine.\n"
        f"The coordinator holds {cost['coordinator_memory_bytes'] / 1e6:.0f} MB of sums, whatever the number of silos, and "
        f"{cost['coordinator_disk_bytes'] / 1e6:.0f} MB on disk.",
        highlight=False,
    )


def _preview(project: Project, plan: Plan, layout: Layout) -> dict[str, Any]:
    gram_entries = sum(group.blocks.entries for group in layout.groups)
    products = sum(group.d_in * sum(weight.d_out for weight in group.weights) for group in layout.groups)
    delta_entries = sum(block.entries for block in layout.blocks) - gram_entries
    flops = sum(2 * count * width * width for group in layout.groups for _, count, width in group.blocks.parts)
    return {
        "plan_digest": plan.digest,
        "locked": project.plan.locked,
        "base_sha256": plan.model.sha256,
        "layout_digest": layout.digest,
        "groups": [
            {
                "name": group.name,
                "weights": [weight.weight for weight in group.weights],
                "d_in": group.d_in,
                "structure": group.structure,
                "entries": group.blocks.entries,
                "bytes": ITEM_BYTES * group.blocks.entries,
            }
            for group in layout.groups
        ],
        "averaged": [tensor.name for tensor in layout.tensors if tensor.merge == "mean"],
        "frozen": list(layout.frozen),
        "cost": {
            "upload_bytes": layout.contribution_bytes,
            "gram_bytes": ITEM_BYTES * gram_entries,
            "delta_bytes": ITEM_BYTES * delta_entries,
            "upload_seconds": layout.contribution_bytes / 20e6,
            "gram_seconds": flops * plan.merge.tokens / _flops_per_second(),
            # Gram sums in float64, and the contribution that is put together from them.
            "silo_memory_bytes": 8 * gram_entries + layout.contribution_bytes,
            "coordinator_memory_bytes": 8 * (gram_entries + products + delta_entries),
            "coordinator_disk_bytes": len(plan.silo) * layout.contribution_bytes,
        },
    }


def _flops_per_second() -> float:
    """Measure this machine's float32 matrix products."""
    import torch

    x = torch.ones(1024, 512)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.2:
        x.T @ x
        done += 1
    return done * 2 * 1024 * 512 * 512 / (time.perf_counter() - began)
