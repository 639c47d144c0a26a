"""`gramfuse plan show`: shows what a plan means."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click

from gramfuse_cli.commands.plan import pins
from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import project_directory
from gramfuse_deployment.terminal import Table, say, show_json
from gramfuse_model.project import Project
from gramfuse_protocol.contract.coverage import Coverage, coverage, coverage_lines, families, family
from gramfuse_protocol.contract.layout import ITEM_BYTES, Layout
from gramfuse_protocol.contract.node_key import fingerprint
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import ALL_LINEAR
from gramfuse_protocol.contract.roster import tolerated
from gramfuse_protocol.contract.stages import describe_stage
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.contract.who_sees_what import SHOWN, seen
from gramfuse_protocol.held_out.noise import DELTA, spent
from gramfuse_protocol.text import listed, quoted


@click.command()
@project_directory
@click.option(
    "--estimate",
    is_flag=True,
    help="From the base's config.json alone, for a plan with adapters: nothing is loaded, so any size fits.",
)
@json_option
def show(directory: Path, estimate: bool, as_json: bool) -> None:
    """Show what DIR/plan.toml merges in closed form, what it averages, and what it costs.

    Nothing is sent or written. Times are estimates, from matrix products measured on this machine and an upload rate of
    20 MB/s; they do not include fine-tuning.
    """
    project = Project.read(directory)
    if estimate:
        _show_estimate(project, as_json=as_json)
        return
    locked, layout = project.locked()
    preview = _preview(project, locked, layout)
    if as_json:
        show_json(preview)
        return
    _show_model(locked, preview)
    say("")
    # The digest to approve comes last, so that nothing in a plan's own text follows it or pushes it off the screen.
    state = "locked" if project.plan.locked else "not locked yet; locking it would give this digest"
    say(*_privacy(locked), *_keys(locked), copied=True)
    say(f"plan {locked.plan.name}, version {locked.plan.version}, digest {locked.digest} ({state})", copied=True)


def _show_estimate(project: Project, *, as_json: bool) -> None:
    """Show what a plan with adapters costs, from its base's configuration alone."""
    from gramfuse_model.adapters.estimate import estimate_layout

    plan, layout, parameters = estimate_layout(project.plan, project.directory)
    preview = _preview(project, plan, layout)
    preview["cost"]["base_bytes"] = ITEM_BYTES * parameters
    for unknown in ("plan_digest", "layout_digest"):
        preview[unknown] = None
    if as_json:
        show_json(preview)
        return
    cost, trained = preview["cost"], sum(math.prod(tensor.shape) for tensor in layout.tensors)
    say(
        f"base {quoted(plan.model.base)}: {parameters:,} parameters, {cost['base_bytes'] / 1e9:.1f} GB in float32",
        f"{len(layout.groups)} adapters{' and the head' if len(layout.tensors) > len(layout.groups) else ''}: "
        f"{trained:,} trained parameters",
        *_uploads(cost),
        _gram_cost(plan, cost),
        f"The coordinator holds {cost['coordinator_memory_bytes'] / 1e6:.0f} MB of sums in memory, whatever the number "
        f"of silos, and {cost['coordinator_disk_bytes'] / 1e6:.0f} MB on disk; it loads the base to write the result.",
        "This is an estimate from config.json: plan lock runs the base, and averages its first layers' adapters.",
    )


def _show_model(plan: Plan, preview: dict[str, Any]) -> None:
    """Print what a plan trains and merges, and what it costs."""
    alpha = f", alpha {plan.merge.alpha}" if plan.closed_form else ""
    say(f"base {quoted(plan.model.base)}{alpha}, silos {', '.join(plan.names)}")
    say(*(f"  {name:<9} {value}" for name, value in pins(plan).items()), copied=True)
    weighting = f"weighting {plan.merge.weighting}: {WEIGHTING[plan.merge.weighting]}"
    say(*_tasks(plan), *([weighting] if plan.training.epochs else []), "")
    if plan.closed_form:
        _show_groups(preview, by_family=plan.training.lora is not None)
    say("", *_extent(plan, preview))
    cost = preview["cost"]
    say(
        "",
        *_uploads(cost),
        *([_gram_cost(plan, cost)] if plan.closed_form else []),
        f"The coordinator holds {cost['coordinator_memory_bytes'] / 1e6:.0f} MB of sums in memory, whatever the number "
        f"of silos, and {cost['coordinator_disk_bytes'] / 1e6:.0f} MB on disk.",
    )


def _gram_cost(plan: Plan, cost: dict[str, Any]) -> str:
    return (
        f"Each silo needs {cost['silo_memory_bytes'] / 1e6:.0f} MB of memory besides training; Gram matrices of "
        f"{plan.merge.tokens:,} tokens, the plan's maximum, take about {cost['gram_seconds']:.0f} s on this machine."
    )


def _show_groups(preview: dict[str, Any], *, by_family: bool) -> None:
    """Print the Gram matrices.

    Args:
        by_family: whether modules that differ only in the number of their layer share a row, since each of a model's
            adapters has a Gram matrix of its own.
    """
    if by_family:
        _show_families(preview)
        return
    table = Table("Merged in closed form; one row for each Gram matrix, or for all experts of a layer")
    table.column("modules", fold=True)
    for column in ("d_in", "structure", "entries", "bytes"):
        table.column(column, justify="left" if column == "structure" else "right")
    for group in preview["groups"]:
        numbers = [f"{group['d_in']:,}", group["structure"], f"{group['entries']:,}", f"{group['bytes']:,}"]
        note = f" (labels of {', '.join(group['silos'])})" if group["silos"] else ""
        note += f" ({group['experts']} experts, one Gram matrix each)" if group["experts"] else ""
        table.row(_modules(group["weights"]) + note, *numbers)
    table.show()


def _show_families(preview: dict[str, Any]) -> None:
    """Print the Gram matrices, those of all layers in one row."""
    table = Table("Merged in closed form; one Gram matrix for each adapter")
    table.column("modules", fold=True)
    for column in ("Gram matrices", "width", "bytes of each"):
        table.column(column, justify="right")
    members: dict[str, list[dict[str, Any]]] = {}
    for group in preview["groups"]:
        members.setdefault(f"{family(_modules(group['weights']).removesuffix(OF_ADAPTER))} {group['d_in']}", []).append(
            group
        )
    for name, groups in members.items():
        first = groups[0]
        table.row(name.rpartition(" ")[0], f"{len(groups):,}", f"{first['d_in']:,}", f"{first['bytes']:,}")
    table.show()


def _extent(plan: Plan, preview: dict[str, Any]) -> list[str]:
    """Describe what is merged in closed form, averaged, frozen or kept."""
    lines = []
    if not plan.training.epochs:
        lines.append(f"Nothing is trained. Fitted in closed form: {families(preview['averaged'])}")
    else:
        if plan.closed_form:
            lines += coverage_lines(Coverage(preview["closed"], preview["unmatched"]))
        lines.append(f"Averaged: {families(preview['averaged'])}")
    if preview["summed"]:
        lines.append(f"Summed, as counters: {families(preview['summed'])}")
    if preview["context_free"] and plan.closed_form:
        modules = families([name.removesuffix(".weight") for name in preview["context_free"]])
        lines.append(f"See tokens or patches without context, {CONTEXT_FREE[plan.merge.context_free]}: {modules}")
    if plan.training.lora is None:
        lines.append(f"Frozen, never sent: {families(preview['frozen'])}")
    else:
        lines.append(
            "Frozen, never sent: all weights of the base but those named above, and the matrix A of each adapter"
        )
    lines += [
        f"Kept at the silos, never sent{f' ({task})' if task else ''}: {families(names)}"
        for task, names in preview["kept"].items()
        if names
    ]
    return lines


OF_ADAPTER = ".lora_B.default"
"""With what PEFT's name of an adapter's B ends."""

WEIGHTING = {
    "uniform": "all silos have the same weight, however few examples they have",
    "examples": "each silo's weight is its number of examples",
}
"""Explains `merge.weighting`."""

CONTEXT_FREE = {
    "mean": "so they are averaged",
    "diagonal": "and silos send the diagonals of their Gram matrices, which can reveal words and how often they occur",
    "full": "and silos send their Gram matrices, which reveal words and how often they occur",
}
"""How `merge.context-free` treats weights whose layers see tokens without context."""

SINGLE_EXPERTS = (
    '  merge.experts = "full": a silo refuses, unless its silo file has limits.experts = "full"; if only one silo uses '
    "an expert, the sum for it is that silo's own Gram matrix"
)
"""Shown for a secure plan with Gram matrices of experts."""

HEADS = {
    "fitted": "an exchange fits it in closed form before training; all silos start from it, and it is averaged",
    "same": "all silos start from the same head, and it is merged",
    "different": "each silo starts from its own head, and the heads are merged",
    "own": "each silo keeps its own head; only bodies are merged, and the coordinator writes a body",
}
"""Explains `model.head`."""


def _tasks(plan: Plan) -> list[str]:
    """Describe the silos' tasks, and how heads are merged."""
    lines = []
    for name, task in plan.tasks.items():
        labels = f", {len(task.labels)} labels: {listed(task.labels)}" if task.labels else ""
        silos = f" ({', '.join(_silos_of(plan, name))})" if name else ""
        lines.append(f"task {f'{name}: ' if name else ''}{task.task}{labels}{_targets(task)}{silos}")
    lines += [
        f"  {silo.name} annotates {len(silo.labels)} of the labels: {listed(silo.labels)}"
        for silo in plan.silo
        if silo.labels
    ]
    head = HEADS[plan.model.head or "same"]
    if not plan.training.epochs:
        head = "an exchange fits it in closed form, on the base as it is; that is the result"
    again = ["head refitted: after training, an exchange fits it again, to the merged body"] if plan.merge.refit else []
    average = ["merge average: all weights are averaged"] if plan.merge.method == "average" else []
    return [*lines, f"head {plan.model.head}: {head}", *_adapters(plan), *average, *again]


def _adapters(plan: Plan) -> list[str]:
    """Describe the adapters that silos train."""
    lora = plan.training.lora
    if lora is None:
        return []
    targets = "all linear layers" if lora.targets == (ALL_LINEAR,) else listed(lora.targets)
    written = {
        "adapter": "an adapter for PEFT",
        "merged": "the merged model",
        "both": "an adapter and the merged model",
    }
    return [
        f"adapters rank {lora.rank}, scaled by {lora.scale:g}, at {targets}: B is trained and merged, A is the same at "
        f"all silos; what is written: {written[lora.output]}"
    ]


def _targets(task: Task) -> str:
    """Describe the scale of a regression's targets, or the first token of generated texts."""
    rescaled = (task.centre, task.scale) != (0.0, 1.0)
    centre = f"{'+' if task.centre < 0 else '−'} {abs(task.centre):g}"
    scale = f", targets: (value {centre}) / {task.scale:g}" if rescaled else ""
    return scale + (f", texts begin with {quoted(task.first_token)}" if task.first_token is not None else "")


def _silos_of(plan: Plan, task: str) -> list[str]:
    return [silo.name for silo in plan.silo if not task or silo.task == task]


def _keys(plan: Plan) -> list[str]:
    """List the silos' keys. Silos compare them with each other on a channel that the coordinator cannot change."""
    lines = []
    for silo in plan.silo:
        if silo.public_key is not None:
            lines.append(f"  {silo.name:<16} public key {silo.public_key}")
        if silo.node_key is not None:
            lines.append(f"  {silo.name:<16} node key   {fingerprint(silo.node_key)}")
    return ["keys; compare them with these silos:", *lines] if lines else []


def _privacy(plan: Plan) -> list[str]:
    """Describe who sees what, and what a secure sum tolerates."""
    metrics = f"metrics {SHOWN[plan.privacy.metrics]}{_noise(plan)}"
    if not plan.privacy.secure_aggregation:
        return [f"mode open: {seen('open')}; {metrics}"]
    silos, threshold, minimum = len(plan.silo), plan.threshold, plan.minimum_survivors
    tolerates = tolerated(silos, threshold, minimum)
    missing = [silo.name for silo in plan.silo if silo.public_key is None]
    return [
        f"mode secure: {seen('secure', least=str(minimum))}; {metrics}",
        f"  silos {silos}, threshold {threshold}, minimum survivors {minimum}",
        f"  may drop out                              {tolerates['dropouts']}",
        f"  may collude with a malicious coordinator  {tolerates['colluding']} (the plan asks for "
        f"{plan.privacy.colluding})",
        *([f"  no public key yet: {', '.join(missing)}; they run: gramfuse silo keygen"] if missing else []),
        *([SINGLE_EXPERTS] if plan.merge.experts == "full" else []),
    ]


def _noise(plan: Plan) -> str:
    """Describe the noise in the sum of metrics, and its privacy."""
    if not plan.summed:
        return ""
    if plan.epsilon is None:
        return ", without noise"
    return (
        f", with noise: epsilon {plan.epsilon:g} per held-out example for each of {plan.releases} sums, "
        f"{spent(plan):.2f} in all, at delta {DELTA:g}"
    )


def _uploads(cost: dict[str, Any]) -> list[str]:
    """Describe what each silo sends in each exchange; rounds of training send equally much."""
    grams, deltas = cost["gram_bytes"] / 1e6, cost["delta_bytes"] / 1e6
    parts = f" (Gram matrices {grams:.1f}, differences {deltas:.1f}{_products(cost)})" if grams else ""
    lines = []
    for exchange in cost["exchanges"]:
        where = f"In {exchange['name']}, each silo" if len(cost["exchanges"]) > 1 else "Each silo"
        size, detail = exchange["upload_bytes"], parts if exchange["work"] == "train" else ""
        amount = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
        lines.append(f"{where} sends {amount}{detail}: about {size / 20e6:.0f} s at 20 MB/s.")
    return lines


def _products(cost: dict[str, Any]) -> str:
    return f", products {cost['product_bytes'] / 1e6:.1f}" if cost["product_bytes"] else ""


def _modules(weights: list[str]) -> str:
    """Join the names of modules that share a Gram matrix: `attention.{query,key,value}`."""
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
    sizes = [stage.form(layout).upload_bytes(masked=secure) for stage in plan.stages]
    exchanges = [
        {
            "work": stage.work,
            "round": stage.round,
            "name": describe_stage(stage),
            "upload_bytes": size,
        }
        for stage, size in zip(plan.stages, sizes, strict=True)
    ]
    upload = sum(sizes)
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
            "exchanges": exchanges,
            "upload_bytes": upload,
            "gram_bytes": item * gram_entries,
            "delta_bytes": item * delta_entries,
            "product_bytes": item * products if secure else 0,
            "upload_seconds": upload / 20e6,
            "gram_seconds": flops * plan.merge.tokens / _flops_per_second() if plan.training.epochs else 0.0,
            "silo_memory_bytes": statistics_memory(layout),
            "coordinator_memory_bytes": 8 * (gram_entries + products + delta_entries),
            "coordinator_disk_bytes": len(plan.silo) * max(sizes),
        },
    }


def _flops_per_second() -> float:
    """Measure this machine's rate of float32 matrix products."""
    import torch

    x = torch.ones(1024, 512)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.2:
        x.T @ x
        count += 1
    return count * 2 * 1024 * 512 * 512 / (time.perf_counter() - start)
