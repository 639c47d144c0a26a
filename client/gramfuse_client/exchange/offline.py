"""A silo without a network: all that it does in an open run, with a file in place of the messages.

The silo file allows or refuses as it does in a run, and the ledger has what leaves before it leaves. One thing is
otherwise: a head that the silo keeps to itself in a run is in the file, so that whoever merges can write whole models.
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
from gramfuse_protocol.errors import PlanError, RefusalError, RunDirectoryError
from gramfuse_protocol.files import exclusive, make_private_directory
from gramfuse_protocol.statistics.about import own_block
from gramfuse_protocol.statistics.file import write_statistics
from gramfuse_protocol.text import one_line

SESSION = "file"
"""What stands for a session's number where a contribution leaves as a file."""


def contribute(silo: Silo, plan: Plan, layout: Layout, path: Path, state: State) -> str:
    """Fine-tune, measure, and write the contribution that an open run would have collected; return its digest.

    What was measured under this plan on the same data is not measured again.

    Args:
        layout: the plan's.
        path: of the file; must not exist.
        state: of this silo under this plan.

    Raises:
        GramfuseError: of the kind that fits; a RefusalError names the key of the silo file.
    """
    if plan.privacy.secure_aggregation:
        raise PlanError(
            "the plan has the statistics masked (privacy.secure-aggregation = true), and a file is read as it is; "
            "agree on a plan with secure-aggregation = false, or take part over the network"
        )
    if plan.merge.rounds > 1:
        raise PlanError(
            f"the plan has {plan.merge.rounds} exchanges (merge.rounds), and files carry one; agree on a plan with one"
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
                f"{silo.path}: other data were contributed under this plan before; the difference of the two merges "
                "would show what changed. Put the data back as they were"
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
        own = state.head() if plan.model.head == "own" else {}
        state.contribute_openly(SESSION)
        items = (
            *(_item(block.name, contribution.block(block.name)) for block in layout.blocks),
            *(_item(own_block(name), array) for name, array in own.items()),
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
            own=own,
            plan=plan.to_toml(),
        )


def _item(name: str, array: NDArray[Any]) -> Item:
    """Return the ledger's record of one tensor."""
    sha256 = hashlib.sha256(array.reshape(-1).view("uint8").data).hexdigest()
    return Item(name=name, dtype=str(array.dtype), shape=array.shape, bytes=array.nbytes, sha256=sha256)
