"""Checks a silo's machine for a run: state directory, ledger, device, disk space, memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from gramfuse_client.data.columns import Input
from gramfuse_client.data.examples import Examples
from gramfuse_client.dry_run.findings import Findings
from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.guard.ledger_lines import Head
from gramfuse_client.silo_file import Memory, Silo
from gramfuse_client.tasks.registry import at_silo
from gramfuse_protocol.contract.layout import ITEM_BYTES, Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import LedgerError, PlanError

if TYPE_CHECKING:
    from gramfuse_model.loading.base_model import Base

ROOM_BYTES = 64 * 2**20
"""Disk space for the session, the ledger and the layout."""
RUNTIME_BYTES = 2**30
"""Memory of Python, torch and Flower, and of one piece being sent."""
TEXT_BYTES = 16
"""Memory per character of an example, which is tokenised into Python lists."""
LESS_MEMORY = (
    "stop other programs on this machine; or use [memory] of the silo file: a smaller 'batch', or 'checkpointing'; or "
    "ask for a plan with a smaller training.batch-size or model.max-length, or with smaller Gram matrices: "
    'merge.gram = { "*" = "block:128" }'
)


def check_state(findings: Findings, silo: Silo) -> None:
    """Check the state directory, or the place where it will be made."""
    directory, user = silo.state.resolve(), os.geteuid()
    if not directory.exists():
        parent = _nearest(directory)
        if os.access(parent, os.W_OK | os.X_OK):
            findings.ok("state", f"the first run will make {directory}; {parent} is writable")
        else:
            what = f"{directory} does not exist, and this user cannot write {parent}"
            findings.problem("state", what, f"as a user who can: install -d -m 700 -o {user} {directory}")
        return
    status = directory.stat()
    if not directory.is_dir():
        remedy = f"move it away, or name another 'state' in {silo.path}"
        findings.problem("state", f"{directory} is not a directory", remedy)
    elif status.st_mode & 0o077:
        findings.problem(
            "state",
            f"{directory}: others on this machine can access it (mode {status.st_mode & 0o777:o}); it holds fine-tuned "
            "weights",
            f"chmod 700 {directory}",
        )
    elif not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        remedy = f"run the silo as its owner (user {status.st_uid}), or: chown -R {user} {directory}"
        findings.problem("state", f"{directory}: this user cannot write there", remedy)
    else:
        findings.ok("state", f"{directory}, accessible to its owner only")


def _nearest(path: Path) -> Path:
    """Return a path, or its nearest parent that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def check_ledger(findings: Findings, silo: Silo) -> str:
    """Verify the ledger, and return the time of its last line; empty if there is none."""
    path, head = silo.ledger.resolve(), Head()
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0
        if mode & 0o077:
            findings.problem("ledger", f"{path}: others can access it (mode {mode:o})", f"chmod 600 {path}")
            return ""
        for line in Ledger(path, silo.name).lines():
            head = head.after(line)
    except LedgerError as error:
        if _cut_short(path, head.number):
            what = f"{head.number:,} lines verified; the last line is incomplete, and its message never left"
            findings.ok("ledger", what)
        else:
            findings.problem("ledger", str(error), "keep the ledger and its .head, and see: gramfuse explain 18")
    except OSError as error:
        findings.problem("ledger", f"{path}: cannot be read: {error}", "run the check as the user who runs the silo")
    else:
        lines = f"{head.number:,} lines verified, last of {head.last}\nhead {head.digest}"
        findings.ok("ledger", lines if head.number else f"the first message will begin {path}")
    return head.last


def _cut_short(path: Path, read: int) -> bool:
    """Return whether the only damage is an incomplete last line, which the silo removes before the next one.

    Args:
        read: number of lines that were verified.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return not content.endswith(b"\n") and content.count(b"\n") == read


def check_device(findings: Findings, silo: Silo) -> str:
    """Check the device, and return its type."""
    import torch

    from gramfuse_client.training.finetune import choose_device

    asked = silo.file.device
    try:
        device = choose_device(asked).type
    except PlanError as error:
        findings.error("device", error, f'write in {silo.path}, above [data]:\ndevice = "auto"')
        return "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = silo.file.threads or torch.get_num_threads()
    about = (
        f"{device}{' (auto)' if asked == 'auto' else ''}, {_counted(used, 'thread')} on {_counted(cores, 'processor')}"
    )
    notice = f"more threads than processors only slow it down: threads = {cores}" if used > cores else ""
    findings.ok("device", about, notice)
    return device


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def check_disk(findings: Findings, silo: Silo, plan: Plan, layout: Layout, base: Base | None) -> None:
    """Check whether the state's disk has space for a run."""
    forms = [stage.form(layout) for stage in plan.stages]
    statistics = max(form.contribution_bytes for form in forms)
    masked = 8 * max(form.sum_entries for form in forms) if plan.privacy.secure_aggregation else 0
    finished = _bytes_of(base) if plan.model.head == "own" and base is not None else 0
    start = ITEM_BYTES * sum(piece.block.entries for piece in layout.deltas)
    later = (len(forms) - 1) * (statistics + start)
    needed = 2 * statistics + later + masked + 2 * finished + ROOM_BYTES
    where = _nearest(silo.state.resolve())
    free = shutil.disk_usage(where).free
    about = (
        f"{_mb(free)} free at {where}; a run can need {_mb(needed)}: statistics with fine-tuned weights "
        f"{_mb(statistics)}, twice while they are replaced; "
        f"{f'statistics and start models of later exchanges {_mb(later)}; ' if later else ''}"
        f"{f'masked vector {_mb(masked)}; ' if masked else ''}"
        f"{f'finished model {_mb(finished)}, twice while it is replaced; ' if finished else ''}"
        f"other files {_mb(ROOM_BYTES)}"
    )
    if free < needed:
        findings.problem("disk", about, f"free space, or name a 'state' on another disk in {silo.path}")
    else:
        findings.ok("disk", about)


def check_memory(
    findings: Findings,
    plan: Plan,
    task: Task,
    layout: Layout,
    base: Base,
    examples: Examples | None,
    device: str,
    available: int,
    settings: Memory = Memory(),  # noqa: B008 - frozen
) -> None:
    """Check whether there is memory to fine-tune and measure, on the device and on this machine.

    Args:
        task: the silo's task.
        device: the device's type.
        available: free memory of this machine in bytes.
        settings: of the silo file.
    """
    needed = memory(plan, task, layout, base, examples, settings)
    about, enough = _compare_memory(needed, device, available)
    if enough:
        findings.ok("memory", about)
    else:
        findings.problem("memory", about, LESS_MEMORY)


def lacking_memory(plan: Plan, task: Task, layout: Layout, base: Base, device: str, settings: Memory) -> str | None:
    """Describe the lack of memory to fine-tune or measure, not counting the data; None if there is enough."""
    about, enough = _compare_memory(memory(plan, task, layout, base, None, settings), device, available_memory())
    return None if enough else f"{about}; {LESS_MEMORY}"


def _compare_memory(needed: tuple[int, int], device: str, available: int) -> tuple[str, bool]:
    """Describe the memory needed and available, and return whether it is enough."""
    training, measuring = needed
    free, room = available, f"{_mb(available)} free"
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        room = f"{_mb(free)} free on the GPU, {_mb(available)} free on this machine"
    about = f"fine-tuning takes about {_mb(training)}, measuring about {_mb(measuring)}; {room}"
    return about, training <= free and measuring <= available


def memory(
    plan: Plan, task: Task, layout: Layout, base: Base, examples: Examples | None, settings: Memory
) -> tuple[int, int]:
    """Estimate a silo's peak memory in bytes, while it fine-tunes and while it measures.

    Fine-tuning: all parameters; for trained ones, the original copy, gradients and AdamW's two moments; activations for
    the backward pass, of two layers at a time if they are computed twice. Measuring: all parameters; for trained ones,
    two copies; the statistics.
    """
    parameters = _bytes_of(base)
    trained = ITEM_BYTES * sum(delta.block.entries for delta in layout.deltas)
    from gramfuse_model.adapters.attach import adapters_of

    rows = (settings.batch or plan.training.batch_size) * at_silo(task).rows_of(base, task)
    each = getattr(base.model.config, "num_experts_per_tok", 1)
    uses = sum((group.d_in + group.d_out) * (each if group.experts else 1) for group in layout.groups)
    if base.adapters is not None:  # activations of the frozen layers are kept too
        uses += sum(layer.in_features + layer.out_features for _, layer in adapters_of(base.model))
    kept = 2 * ITEM_BYTES * rows * uses
    if settings.checkpointing:
        kept = 2 * kept // max(2, getattr(base.model.config, "num_hidden_layers", 2))
    texts = 0 if examples is None else sum(map(_characters, (*examples.inputs, *(examples.pairs or ()))))
    always = RUNTIME_BYTES + parameters + TEXT_BYTES * texts
    return always + 4 * trained + kept, always + 2 * trained + statistics_memory(layout)


def _bytes_of(base: Base) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in base.model.state_dict().values())


def _characters(given: Input) -> int:
    """Return the length of a text; 0 for an image, since images are read one batch at a time."""
    return 0 if isinstance(given, Path | bytes) else sum(map(len, given))


def statistics_memory(layout: Layout) -> int:
    """Return the bytes of the square Gram matrices in float64, and of two copies of the statistics."""
    squares = sum(count * width * width for group in layout.groups for _, count, width in group.blocks.parts)
    return 8 * squares + 2 * layout.contribution_bytes


def available_memory() -> int:
    """Return the free memory in bytes, at most the container's limit."""
    free = int(psutil.virtual_memory().available)
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return free


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
