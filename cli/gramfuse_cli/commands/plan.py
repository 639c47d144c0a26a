"""`gramfuse plan`: the contract of a merge."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import project_directory
from gramfuse_deployment.terminal import Table, say, show_json
from gramfuse_model.project import Project
from gramfuse_protocol.contract.coverage import Coverage, coverage, coverage_lines, families
from gramfuse_protocol.contract.layout import ITEM_BYTES, Layout
from gramfuse_protocol.contract.node_key import fingerprint
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.roster import tolerated
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.contract.who_sees_what import SHOWN, seen
from gramfuse_protocol.held_out.noise import DELTA, spent
from gramfuse_protocol.text import listed, quoted


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
    """Pin the base model and the layout in DIR/plan.toml, and print the plan's digest.

    A plan that is not safe is refused, and so is one with secure aggregation in which a silo has no public key.
    Writes model.sha256 (of the weights), model.config, model.processor (tokenizer or image processor), for a hub model
    model.revision (the newest commit, unless the plan names one), and merge.layout into plan.toml, and the layout into
    layout.json. Do it again after any change; each silo then has to approve the new digest ('approved' in its silo
    file).
    """
    project = Project.read(directory)
    if project.plan.privacy.secure_aggregation:
        _ = project.plan.roster  # without the silos' keys there is nothing to agree on
    locked, layout = Project(project.directory, project.plan.unlocked()).locked()
    project.write_lock(locked, layout)
    if as_json:
        show_json(
            {
                "plan": str(project.plan_path),
                "plan_digest": locked.digest,
                "base_sha256": locked.model.sha256,
                "config_sha256": locked.model.config,
                "processor_sha256": locked.model.processor,
                "base_revision": locked.model.revision,
                "layout_digest": layout.digest,
            }
        )
        return
    digests = {**_pins(locked), "layout": layout.digest, "plan": locked.digest}
    say(*(f"{name:<9} {value}" for name, value in digests.items()), copied=True)


def _pins(plan: Plan) -> dict[str, str]:
    """Return what a plan holds its base model to, by what it is called on the terminal."""
    named = {"revision": "commit", "sha256": "weights"}
    return {named.get(key, key): value for key, value in plan.pins._asdict().items() if value is not None}


@plan.command()
@project_directory
@json_option
def show(directory: Path, as_json: bool) -> None:
    """Show what DIR/plan.toml merges in closed form, what it averages, and what it costs.

    Nothing is sent or written. Times are measured on this machine for its matrix products and stated for an upload of
    20 MB/s; fine-tuning itself is not in them.
    """
    project = Project.read(directory)
    locked, layout = project.locked()
    preview = _preview(project, locked, layout)
    if as_json:
        show_json(preview)
        return
    _show_model(locked, preview)
    say("")
    # What is approved comes last: nothing that a plan's author writes follows it, or pushes it off the screen.
    state = "locked" if project.plan.locked else "not locked yet; locking would give this digest"
    say(*_privacy(locked), *_keys(locked), copied=True)
    say(f"plan {locked.plan.name}, version {locked.plan.version}, digest {locked.digest} ({state})", copied=True)


def _show_model(plan: Plan, preview: dict[str, Any]) -> None:
    """Print what is trained and merged, and what it costs."""
    say(f"base {quoted(plan.model.base)}, alpha {plan.merge.alpha}, silos {', '.join(plan.names)}")
    say(*(f"  {name:<9} {value}" for name, value in _pins(plan).items()), copied=True)
    say(*_tasks(plan), f"weighting {plan.merge.weighting}: {WEIGHTING[plan.merge.weighting]}", "")
    table = Table("Merged in closed form; one line for each Gram matrix, or those of all experts of a layer")
    table.column("modules", fold=True)
    for column in ("d_in", "structure", "entries", "bytes"):
        table.column(column, justify="left" if column == "structure" else "right")
    for group in preview["groups"]:
        numbers = [f"{group['d_in']:,}", group["structure"], f"{group['entries']:,}", f"{group['bytes']:,}"]
        of = f" (labels of {', '.join(group['silos'])})" if group["silos"] else ""
        of += f" ({group['experts']} experts, one Gram matrix each)" if group["experts"] else ""
        table.row(_modules(group["weights"]) + of, *numbers)
    table.show()
    say(
        "",
        *coverage_lines(Coverage(preview["closed"], preview["unmatched"])),
        f"Averaged: {families(preview['averaged'])}",
    )
    if preview["summed"]:
        say(f"Added up, as counters: {families(preview['summed'])}")
    if preview["context_free"]:
        modules = families([name.removesuffix(".weight") for name in preview["context_free"]])
        say(f"See tokens or patches without context, {CONTEXT_FREE[plan.merge.context_free]}: {modules}")
    say(f"Frozen, never sent: {families(preview['frozen'])}")
    for task, names in preview["kept"].items():
        if names:
            say(f"Kept at the silo, never sent{f' ({task})' if task else ''}: {families(names)}")
    cost = preview["cost"]
    say(
        "",
        f"Each silo sends {cost['upload_bytes'] / 1e6:.1f} MB (Gram matrices {cost['gram_bytes'] / 1e6:.1f}, "
        f"differences {cost['delta_bytes'] / 1e6:.1f}{_products(cost)}): "
        f"about {cost['upload_seconds']:.0f} s at 20 MB/s.",
        f"Each silo needs {cost['silo_memory_bytes'] / 1e6:.0f} MB of memory beside the training; Gram matrices of "
        f"{plan.merge.tokens:,} tokens, the most that the plan allows, take about {cost['gram_seconds']:.0f} s on "
        f"this machine.",
        f"The coordinator holds {cost['coordinator_memory_bytes'] / 1e6:.0f} MB of sums, whatever the number of silos, "
        f"and {cost['coordinator_disk_bytes'] / 1e6:.0f} MB on disk.",
    )


WEIGHTING = {
    "uniform": "all silos weigh the same, those of few examples too",
    "examples": "silos weigh as much as they have examples",
}
"""What the weights of silos are."""

CONTEXT_FREE = {
    "mean": "and so are averaged",
    "diagonal": "and the diagonals of their Gram matrices leave, which may tell words and how often they occur",
    "full": "and their Gram matrices leave, which tell words and how often they occur",
}
"""What becomes of weights whose layers see tokens without context."""

SINGLE_EXPERTS = (
    '  merge.experts = "full": each silo refuses, unless its silo file has limits.experts = "full"; of an expert that '
    "only one silo uses, the sum is that silo's own"
)
"""What a secure plan asks of silos that has Gram matrices of experts."""

HEADS = {
    "same": "all silos start from one head, and it is merged",
    "different": "each silo starts from a head of its own, and they are merged",
    "own": "each silo keeps a head of its own; bodies are merged, and what is written by the coordinator is a body",
}


def _tasks(plan: Plan) -> list[str]:
    """Say what silos fine-tune for, and what becomes of their heads."""
    lines = []
    for name, task in plan.tasks.items():
        labels = f", {len(task.labels)} labels: {listed(task.labels)}" if task.labels else ""
        silos = f" ({', '.join(_silos_of(plan, name))})" if name else ""
        lines.append(f"task {f'{name}: ' if name else ''}{task.task}{labels}{_asked(task)}{silos}")
    lines += [
        f"  {silo.name} annotates {len(silo.labels)} of the labels: {listed(silo.labels)}"
        for silo in plan.silo
        if silo.labels
    ]
    return [*lines, f"head {plan.model.head}: {HEADS[plan.model.head]}"]


def _asked(task: Task) -> str:
    """Say on which scale a model learns targets, and how it is asked for texts."""
    told = f", targets less {task.centre:g}, over {task.scale:g}" if (task.centre, task.scale) != (0.0, 1.0) else ""
    return told + (f", texts begin with {quoted(task.first_token)}" if task.first_token is not None else "")


def _silos_of(plan: Plan, task: str) -> list[str]:
    return [silo.name for silo in plan.silo if not task or silo.task == task]


def _keys(plan: Plan) -> list[str]:
    """Say who is who. Silos compare these with each other, in a way that the coordinator cannot tamper with."""
    lines = []
    for silo in plan.silo:
        if silo.public_key is not None:
            lines.append(f"  {silo.name:<16} public key {silo.public_key}")
        if silo.node_key is not None:
            lines.append(f"  {silo.name:<16} node key   {fingerprint(silo.node_key)}")
    return ["keys, to be compared with those silos:", *lines] if lines else []


def _privacy(plan: Plan) -> list[str]:
    """Say who sees what, and what a secure sum tolerates."""
    metrics = f"metrics {SHOWN[plan.privacy.metrics]}{_noise(plan)}"
    if not plan.privacy.secure_aggregation:
        return [f"mode open: {seen('open')}; {metrics}"]
    silos, threshold, minimum = len(plan.silo), plan.threshold, plan.minimum_survivors
    withstands = tolerated(silos, threshold, minimum)
    missing = [silo.name for silo in plan.silo if silo.public_key is None]
    return [
        f"mode secure: {seen('secure', least=str(minimum))}; {metrics}",
        f"  silos {silos}, threshold {threshold}, minimum of survivors {minimum}",
        f"  may drop out                              {withstands['dropouts']}",
        f"  may collude with a coordinator that lies  {withstands['colluding']} (the plan asks for "
        f"{plan.privacy.colluding})",
        *([f"  no public key yet: {', '.join(missing)}; they run: gramfuse silo keygen"] if missing else []),
        *([SINGLE_EXPERTS] if plan.merge.experts == "full" else []),
    ]


def _noise(plan: Plan) -> str:
    """Say how private held-out examples are in the sum of metrics."""
    if not plan.summed:
        return ""
    if plan.epsilon is None:
        return ", without noise"
    return (
        f", with noise: epsilon {plan.epsilon:g} of a held-out example for each of {plan.releases} sums, "
        f"{spent(plan):.2f} in all, at delta {DELTA:g}"
    )


def _products(cost: dict[str, Any]) -> str:
    return f", products {cost['product_bytes'] / 1e6:.1f}" if cost["product_bytes"] else ""


def _modules(weights: list[str]) -> str:
    """Write the modules that share a Gram matrix as one name, `attention.{query,key,value}`."""
    modules = [weight.removesuffix(".weight") for weight in weights]
    if len(modules) == 1:
        return modules[0]
    parents = {module.rpartition(".")[0] for module in modules}
    if len(parents) > 1:
        return ", ".join(modules)
    (parent,) = parents
    return f"{parent}.{{{','.join(module.rpartition('.')[2] for module in modules)}}}"


def _preview(project: Project, plan: Plan, layout: Layout) -> dict[str, Any]:
    from gramfuse_client.dry_run.of_machine import statistics_memory
    from gramfuse_model.loading.base_model import kept_parameters

    gram_entries = sum(group.blocks.entries for group in layout.groups)
    products = sum(group.features * group.d_out for group in layout.groups)
    delta_entries = sum(block.entries for block in layout.blocks) - gram_entries
    secure = plan.privacy.secure_aggregation
    item = 8 if secure else ITEM_BYTES
    upload = layout.upload_bytes(masked=secure)
    flops = sum(2 * count * width * width for group in layout.groups for _, count, width in group.blocks.parts)
    return {
        "plan_digest": plan.digest,
        "locked": project.plan.locked,
        "base_sha256": plan.model.sha256,
        "config_sha256": plan.model.config,
        "processor_sha256": plan.model.processor,
        "base_revision": plan.model.revision,
        "layout_digest": layout.digest,
        "tasks": {
            name: {"task": task.task, "labels": list(task.labels), "silos": _silos_of(plan, name)}
            for name, task in plan.tasks.items()
        },
        "head": plan.model.head,
        "privacy": {
            "secure_aggregation": secure,
            "silos": len(plan.silo),
            "threshold": plan.threshold if secure else None,
            "minimum_survivors": plan.minimum_survivors,
            "tolerates": tolerated(len(plan.silo), plan.threshold, plan.minimum_survivors) if secure else None,
            "metrics": plan.privacy.metrics,
            "metrics_epsilon": plan.epsilon,
            "metrics_epsilon_in_all": spent(plan),
        },
        "groups": [
            {
                "name": group.name,
                "weights": [weight.weight for weight in group.weights],
                "silos": [] if group.part is None else list(layout.parts[group.part].silos),
                "d_in": group.d_in,
                "experts": group.experts,
                "structure": group.structure,
                "entries": group.blocks.entries,
                "bytes": item * group.blocks.entries,
            }
            for group in layout.groups
        ],
        "averaged": [tensor.name for tensor in layout.tensors if tensor.merge == "mean"],
        "summed": [tensor.name for tensor in layout.tensors if tensor.merge == "sum"],
        "context_free": [tensor.name for tensor in layout.tensors if tensor.context_free],
        **coverage(layout)._asdict(),
        "frozen": list(layout.frozen),
        "kept": {task: list(names) for task, names in kept_parameters(plan, project.directory).items()},
        "cost": {
            "upload_bytes": upload,
            "gram_bytes": item * gram_entries,
            "delta_bytes": item * delta_entries,
            "product_bytes": item * products if secure else 0,
            "upload_seconds": upload / 20e6,
            "gram_seconds": flops * plan.merge.tokens / _flops_per_second(),
            "silo_memory_bytes": statistics_memory(layout),
            "coordinator_memory_bytes": 8 * (gram_entries + products + delta_entries),
            "coordinator_disk_bytes": len(plan.silo) * upload,
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
