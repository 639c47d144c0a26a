"""What a silo has of its machine for a run: a place for its state, its ledger, a device, room on the disk, memory."""

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
from gramfuse_client.silo_file import Silo
from gramfuse_client.tasks.registry import at_silo
from gramfuse_protocol.contract.layout import ITEM_BYTES, Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import LedgerError, PlanError

if TYPE_CHECKING:
    from gramfuse_model.loading.base_model import Base

ROOM_BYTES = 64 * 2**20
"""Room on the disk for the session, the ledger and the layout."""
RUNTIME_BYTES = 2**30
"""Memory of Python, torch and Flower, and of one piece on its way out."""
TEXT_BYTES = 16
"""Memory for each character of an example, which is tokenised into Python's lists."""
LESS_MEMORY = (
    "stop what else runs here; or ask for a plan with a smaller training.batch-size or model.max-length, or "
    'with smaller Gram matrices: merge.gram = { "*" = "block:128" }'
)


def check_state(found: Findings, silo: Silo) -> None:
    """Look at the state directory, or at where it will be made."""
    directory, user = silo.state.resolve(), os.geteuid()
    if not directory.exists():
        parent = _nearest(directory)
        if os.access(parent, os.W_OK | os.X_OK):
            found.ok("state", f"{directory} will be made with the first run; {parent} can be written")
        else:
            what = f"{directory} is not there, and this user cannot write {parent}"
            found.problem("state", what, f"as a user who can: install -d -m 700 -o {user} {directory}")
        return
    about = directory.stat()
    if not directory.is_dir():
        found.problem("state", f"{directory} is no directory", f"move it away, or name another 'state' in {silo.path}")
    elif about.st_mode & 0o077:
        found.problem(
            "state",
            f"{directory}: others on this machine have rights on it (mode {about.st_mode & 0o777:o}); it holds "
            "fine-tuned weights",
            f"chmod 700 {directory}",
        )
    elif not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        remedy = f"run the silo as its owner (user {about.st_uid}), or: chown -R {user} {directory}"
        found.problem("state", f"{directory}: this user cannot write there", remedy)
    else:
        found.ok("state", f"{directory}, for its owner only")


def _nearest(path: Path) -> Path:
    """Return a path, or the nearest directory above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def check_ledger(found: Findings, silo: Silo) -> str:
    """Go through the ledger, and return when its last line was written; empty if there is none."""
    path, head = silo.ledger.resolve(), Head()
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0
        if mode & 0o077:
            found.problem("ledger", f"{path}: others have rights on it (mode {mode:o})", f"chmod 600 {path}")
            return ""
        for line in Ledger(path, silo.name).lines():
            head = head.after(line)
    except LedgerError as error:
        if _cut_short(path, head.number):
            what = f"{head.number:,} lines hold together; the last was not finished, and its message never left"
            found.ok("ledger", what)
        else:
            found.problem("ledger", str(error), "keep the ledger and its .head, and see: gramfuse explain 18")
    except OSError as error:
        found.problem("ledger", f"{path}: cannot be read: {error}", "run the check as the user who runs the silo")
    else:
        lines = f"{head.number:,} lines hold together, last of {head.last}\nhead {head.digest}"
        found.ok("ledger", lines if head.number else f"{path} begins with the first message")
    return head.last


def _cut_short(path: Path, read: int) -> bool:
    """Whether all lines were read but for one that the silo stopped in; it is cut off before the next is written."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return not content.endswith(b"\n") and content.count(b"\n") == read


def check_device(found: Findings, silo: Silo) -> str:
    """Return the kind of device that the silo would compute on."""
    import torch

    from gramfuse_client.training.finetune import choose_device

    asked = silo.file.device
    try:
        device = choose_device(asked).type
    except PlanError as error:
        found.error("device", error, f'write in {silo.path}, above [data]:\ndevice = "auto"')
        return "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = silo.file.threads or torch.get_num_threads()
    about = f"{device}{' (auto)' if asked == 'auto' else ''}, {used} threads on {cores} processors"
    found.ok("device", about, f"more threads than processors only slow down: threads = {cores}" if used > cores else "")
    return device


def check_disk(found: Findings, silo: Silo, plan: Plan, layout: Layout, base: Base | None) -> None:
    """Look at whether what a run keeps has room where the state is."""
    statistics = layout.contribution_bytes
    masked = 8 * layout.sum_entries if plan.privacy.secure_aggregation else 0
    finished = _bytes_of(base) if plan.model.head == "own" and base is not None else 0
    start = ITEM_BYTES * sum(piece.block.entries for piece in layout.deltas)
    later = (plan.merge.rounds - 1) * (statistics + start)
    needed = 2 * statistics + later + masked + 2 * finished + ROOM_BYTES
    where = _nearest(silo.state.resolve())
    free = shutil.disk_usage(where).free
    about = (
        f"{_mb(free)} are free at {where}, and a run may need {_mb(needed)}: statistics, with fine-tuned weights in "
        f"them, {_mb(statistics)} and again while they are replaced; "
        f"{f'{_mb(later)} for those of later rounds and what they start from; ' if later else ''}"
        f"{f'masked vector {_mb(masked)}; ' if masked else ''}"
        f"{f'the finished model {_mb(finished)} and again while it is replaced; ' if finished else ''}"
        f"{_mb(ROOM_BYTES)} for the rest"
    )
    if free < needed:
        found.problem("disk", about, f"make room, or name a 'state' on another disk in {silo.path}")
    else:
        found.ok("disk", about)


def check_memory(
    found: Findings,
    plan: Plan,
    task: Task,
    layout: Layout,
    base: Base,
    examples: Examples | None,
    device: str,
    available: int,
) -> None:
    """Look at whether fine-tuning and measuring have memory, on the device and here.

    Args:
        task: the silo's own.
        available: bytes of this machine's that are free.
    """
    needed = memory(plan, task, layout, base, examples)
    about, enough = _weighed(needed, device, available)
    if enough:
        found.ok("memory", about)
    else:
        found.problem("memory", about, LESS_MEMORY)


def lacking_memory(plan: Plan, task: Task, layout: Layout, base: Base, device: str) -> str | None:
    """Return what memory is lacking to fine-tune or measure, whatever the data are; None if there is enough."""
    about, enough = _weighed(memory(plan, task, layout, base, None), device, available_memory())
    return None if enough else f"{about}; {LESS_MEMORY}"


def _weighed(needed: tuple[int, int], device: str, available: int) -> tuple[str, bool]:
    """Say what memory fine-tuning and measuring take and what there is, and whether that is enough."""
    training, measuring = needed
    free, room = available, f"{_mb(available)} are free"
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        room = f"{_mb(free)} of the GPU's and {_mb(available)} of this machine's are free"
    about = f"fine-tuning takes about {_mb(training)}, measuring about {_mb(measuring)}; {room}"
    return about, training <= free and measuring <= available


def memory(plan: Plan, task: Task, layout: Layout, base: Base, examples: Examples | None) -> tuple[int, int]:
    """Return the bytes that a silo holds at most, about, while it fine-tunes and while it measures.

    Fine-tuning: all parameters; of the trained ones a copy as they were, gradients and AdamW's two moments; what the
    layers keep for the backward pass. Measuring: all parameters; of the trained ones two copies; the statistics.
    """
    parameters = _bytes_of(base)
    trained = ITEM_BYTES * sum(delta.block.entries for delta in layout.deltas)
    rows = plan.training.batch_size * at_silo(task).rows_of(base, task)
    each = getattr(base.model.config, "num_experts_per_tok", 1)
    uses = sum((group.d_in + group.d_out) * (each if group.experts else 1) for group in layout.groups)
    kept = 2 * ITEM_BYTES * rows * uses
    texts = 0 if examples is None else sum(map(_characters, (*examples.inputs, *(examples.pairs or ()))))
    always = RUNTIME_BYTES + parameters + TEXT_BYTES * texts
    return always + 4 * trained + kept, always + 2 * trained + statistics_memory(layout)


def _bytes_of(base: Base) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in base.model.state_dict().values())


def _characters(given: Input) -> int:
    """Return how long a text is; images are read one batch at a time."""
    return 0 if isinstance(given, Path | bytes) else sum(map(len, given))


def statistics_memory(layout: Layout) -> int:
    """Return the bytes of Gram matrices, square and in float64, and of the statistics, twice as they are written."""
    squares = sum(count * width * width for group in layout.groups for _, count, width in group.blocks.parts)
    return 8 * squares + 2 * layout.contribution_bytes


def available_memory() -> int:
    """Return how much memory there is, also where a container may have only some of it."""
    free = int(psutil.virtual_memory().available)
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return free


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
