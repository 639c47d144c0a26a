"""A silo without a network: does the work of an open run, and writes a file instead of sending messages.

The silo file allows and refuses the same as in a run, and the ledger records the contribution before it leaves. There
is one difference: the file includes a head that the silo would keep to itself in a run, so that the recipient can write
whole models.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gramfuse_client.data.examples import load
from gramfuse_client.exchange.local_model import Workbench
from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.guard.ledger_lines import Entry, Item
from gramfuse_client.guard.policy import check_bytes, check_data, check_hours, check_plan, check_repeat
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.state import MeasuredOn, State
from gramfuse_model.heads import head_parameters
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.stages import describe_stage
from gramfuse_protocol.errors import PlanError, RefusalError, RunDirectoryError
from gramfuse_protocol.files import exclusive, make_private_directory
from gramfuse_protocol.statistics.about import own_block
from gramfuse_protocol.statistics.file import write_statistics
from gramfuse_protocol.text import one_line

SESSION = "file"
"""Stands for the session's nonce if a contribution leaves as a file."""


def contribute(silo: Silo, plan: Plan, layout: Layout, path: Path, state: State) -> str:
    """Fine-tune, measure, and write the contribution that an open run would collect; return the file's SHA-256.

    Statistics measured earlier under this plan, on the same data, are used again.

    Args:
        layout: the plan's layout.
        path: the file to write; must not exist.
        state: the silo's state under this plan.

    Raises:
        PlanError: if the plan needs a network, because it masks statistics or has several rounds.
        RefusalError: naming the key of the silo file that does not allow this.
        GramfuseError: of another type, if the data, the model or the file cannot be used.
    """
    if plan.privacy.secure_aggregation:
        raise PlanError(
            "the plan masks statistics (privacy.secure-aggregation = true), but a file is not masked; agree on a plan "
            "with secure-aggregation = false, or take part over the network"
        )
    if len(plan.stages) > 1 or plan.stages[0].fits_head:
        raise PlanError(
            f"the plan has {len(plan.stages)} exchanges: {', '.join(map(describe_stage, plan.stages))}; a file has "
            'only the statistics of one round; agree on a plan with merge.rounds = 1, model.head = "same" and '
            "merge.refit = false. The head of the merged model can be fitted by files too: gramfuse head"
        )
    check_plan(silo, plan)
    if path.exists():
        raise RunDirectoryError(f"{path} exists already; choose another name, or remove it")
    make_private_directory(silo.state.resolve())
    with exclusive(silo.state / "lock"):
        check_repeat(silo, state, SESSION)
        task = plan.task_of(silo.name)
        examples, held_out = load(silo, task)
        check_data(silo, task, examples, held_out)
        check_bytes(silo, plan, layout)
        contributed = state.contributed()
        if contributed is not None and contributed.data != examples.digest:
            raise RefusalError(
                f"{silo.path}: this silo contributed other data under this plan before; the difference of the two "
                "merges would reveal what changed. Restore the earlier data"
            )
        measured_on = MeasuredOn(examples.digest, start="")
        if not state.trained or state.origin() != measured_on:
            check_hours(silo, datetime.now())
            workbench = Workbench(silo, plan)
            workbench.check_layout(layout)
            state.join(plan.to_toml(), layout)
            state.save(workbench.measure(layout, examples, state, {}), measured_on, {})
        contribution = state.contribution()
        base = load_base(plan, silo.project, silo=silo.name, override=silo.base)
        head = state.head() if plan.model.head == "own" else {}
        state.contribute_openly(SESSION)
        items = (
            *(_item(block.name, contribution.block(block.name)) for block in layout.blocks),
            *(_item(own_block(name), array) for name, array in head.items()),
        )
        note = one_line(str(path), 2000)
        entry = Entry(plan=plan.digest, phase="measure", kind="reply", form="open", note=note, items=items)
        Ledger(silo.ledger, silo.name).append(entry)
        return write_statistics(
            path,
            contribution,
            name=silo.name,
            base=base.origin(plan.model.base),
            task=task,
            layout=layout,
            head=head_parameters(base.model),
            own=head,
            plan=plan.to_toml(),
        )


def _item(name: str, array: NDArray[Any]) -> Item:
    """Return the ledger item for one tensor."""
    sha256 = hashlib.sha256(array.reshape(-1).view("uint8").data).hexdigest()
    return Item(name=name, dtype=str(array.dtype), shape=array.shape, bytes=array.nbytes, sha256=sha256)
