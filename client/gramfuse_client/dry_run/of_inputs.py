"""Checks the inputs of a silo's work under a plan: its data, the base model, and the layout derived from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gramfuse_client.data.alike import alike
from gramfuse_client.data.examples import Examples, left_out, load, load_validation
from gramfuse_client.data.formats import HUB, Dataset
from gramfuse_client.dry_run.findings import Findings
from gramfuse_client.dry_run.of_plan import LocatedPlan
from gramfuse_client.guard import policy
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.state import Contributed
from gramfuse_client.tasks.registry import at_silo
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError, ModelError, PlanError, RefusalError
from gramfuse_protocol.secure_sum.scales import MOST_WEIGHED

if TYPE_CHECKING:
    from gramfuse_model.loading.base_model import Base


def check_data(
    findings: Findings,
    silo: Silo,
    plan: Plan,
    contributed: Contributed | None,
    offline: bool,
    skip_bad: int | None = None,
) -> tuple[Examples, Examples] | None:
    """Read the data as a run would, and return the training and the held-out examples.

    Args:
        contributed: the record of earlier contributions under the plan.
        offline: do not read data from the Hugging Face hub.
        skip_bad: overrides the silo file's `data.skip-bad`.
    """
    allowed = silo.file.data.skip_bad
    if skip_bad is not None:
        data = silo.file.data.model_copy(update={"skip_bad": skip_bad})
        silo = Silo(silo.path, silo.file.model_copy(update={"data": data}))
    source, task = silo.file.data.train, plan.task_of(silo.name)
    if offline and source.startswith(HUB) and Dataset.parse(source, silo.directory).folder(silo.directory) is None:
        findings.skip("data", f"{source} is on the Hugging Face hub, but the check is offline")
        return None
    try:
        train, held_out = load(silo, task)
        policy.check_examples(silo, len(train))
        at_silo(task).check_labels(silo.path, task, train.labels)
    except DataError as error:
        findings.error("data", error, f"correct the data, or [data] in {silo.path}")
        return None
    except RefusalError as error:
        findings.error("data", error)
        return train, held_out
    bad = left_out(train, held_out)
    if most := max(map(len, (train.left_out, held_out.left_out))):
        what = f"{len(bad)} bad rows are left out:\n" + "\n".join(bad)
        if most > allowed:
            remedy = f"correct them, or write under [data] of {silo.path}:\nskip-bad = {most}"
            findings.problem("bad rows", what, remedy)
        else:
            findings.ok("bad rows", what, f"data.skip-bad of {silo.path} allows {allowed:,}")
    weighed = plan.privacy.secure_aggregation and plan.merge.weighting == "examples"
    if contributed is not None and contributed.data != train.digest:
        findings.problem(
            "data",
            "this silo contributed other data under this plan before; the difference of the sums would reveal what "
            "changed",
            "restore the earlier data; a new plan must end with the same silos over these rows",
        )
    elif weighed and len(train) > MOST_WEIGHED:
        findings.problem(
            "data",
            f"{len(train):,} training examples are more than the {MOST_WEIGHED:,} that a secure sum can weigh",
            "agree on a plan with merge.weighting = 'uniform'",
        )
    else:
        labels = at_silo(task).describe_labels(train, task)
        counts = f"{len(train):,} training examples ({labels}), {len(held_out):,} held out"
        notice = at_silo(task).notice(train, task)
        findings.ok("data", f"{counts}\n{_disclosed_counts(plan, task)}", notice)
    return train, held_out


def check_encoding(
    findings: Findings, silo: Silo, plan: Plan, base: Base | None, data: tuple[Examples, Examples] | None
) -> None:
    """Check how the base model's tokenizer encodes the data; a run that fails there gives no reason."""
    task = plan.task_of(silo.name)
    if base is None or data is None:
        return
    from gramfuse_client.data.batches import Encoded

    train, held_out = (Encoded(examples, base.tokenizer, task) for examples in data)
    try:
        train.check_learnable()
    except DataError as error:
        findings.error("tokens", error)
        return
    words = [seen for encoded in (train, held_out) for row in encoded.rows or () for seen, _ in row.get("words", ())]
    if missed := words.count(False):
        findings.ok(
            "tokens",
            f"{missed:,} of {len(words):,} words have no token: they come after the {task.max_length} tokens of "
            "max-length, or the tokenizer drops their characters. Metrics treat them as outside any entity",
            "raise max-length in the plan, if there are many",
        )


def check_last_batch(findings: Findings, silo: Silo, plan: Plan, base: Base | None, train: Examples | None) -> None:
    """Check whether a batch of one example would stop training."""
    if base is None or train is None:
        return
    from gramfuse_client.data.batches import Encoded
    from gramfuse_client.training.finetune import check_batches

    try:
        encoded = Encoded(train, base.tokenizer, plan.task_of(silo.name))
        check_batches(base.model, encoded, silo.file.memory.batch or plan.training.batch_size, silo.name)
    except DataError as error:
        findings.error("batches", error)


def _disclosed_counts(plan: Plan, task: Task) -> str:
    """Describe which counts of examples leave, and how."""
    if plan.privacy.secure_aggregation and plan.privacy.metrics != "silo":
        return "only you see these numbers; they leave masked, so others see only their sums over the silos"
    training = "masked" if plan.privacy.secure_aggregation else "in the clear"
    if plan.privacy.metrics == "none":
        return f"the number of training examples leaves {training}; the other numbers do not leave"
    each = " of each label" if task.labels else ""
    return f"the number of training examples leaves {training}; the number of held-out examples{each}, in the clear"


def check_common(findings: Findings, silo: Silo, plan: Plan, train: Examples | None) -> None:
    """Check how many examples are in the sums that a head is fitted from."""
    if train is None or not plan.fits_head:
        return
    task, least = plan.task_of(silo.name), silo.file.limits.minimum_label_examples
    kept = len(at_silo(task).common(train, task, least, alike(train, task)))
    about = f"{kept:,} of {len(train):,} training examples are in the sums that the head is fitted from"
    rare = f"; the others have labels of which this silo has fewer than {least} ('limits.minimum-label-examples')"
    if not kept:
        findings.problem("head", about, "add data, or lower 'limits.minimum-label-examples' knowingly")
    else:
        findings.ok("head", about + (rare if kept < len(train) else ""))
    if any(stage.judged for stage in plan.stages) and silo.file.data.validation is not None:
        try:
            findings.ok("validation", f"{len(load_validation(silo, task)):,} examples help to choose the head")
        except DataError as error:
            findings.error("validation", error)


def check_base(findings: Findings, silo: Silo, plan: Plan) -> Base | None:
    """Load the base model from this machine; nothing is downloaded."""
    import torch

    from gramfuse_model.loading.base_model import load_base
    from gramfuse_model.loading.source import source_of
    from gramfuse_model.probing.suitable import check_suitable

    if silo.file.threads:
        torch.set_num_threads(silo.file.threads)  # as in a run
    try:
        source = source_of(plan, silo.project, silo.base, local=True).directory
        base = load_base(plan, silo.project, silo=silo.name, override=source)
        check_suitable(base, plan.task_of(silo.name))
    except ModelError as error:
        remedy = f"get the files from the plan's author, and name their directory above [data] in {silo.path}:"
        findings.error("base model", error, f'{remedy}\nbase = "DIRECTORY"')
        return None
    about = f"{source}, SHA-256 {base.pins.sha256}"
    findings.ok("base model", about if plan.model.sha256 else f"{about}; the plan does not pin one yet")
    return base


def check_layout(findings: Findings, silo: Silo, located: LocatedPlan, base: Base | None) -> Layout | None:
    """Derive the layout; without a base model, read the plan's layout.json instead."""
    from gramfuse_model.derive_layout import plan_layout
    from gramfuse_model.loading.base_model import load_base
    from gramfuse_model.probing.lengths import check_lengths

    plan, path = located.plan, located.path.with_name("layout.json")
    try:
        received = Layout.read(path) if path.exists() else None
        if base is None:
            trusted = received if received is not None and received.digest == plan.merge.layout else None
            more = f"; the following uses {path}" if trusted else ""
            findings.skip("layout", f"it is derived from the base model{more}")
            return trusted
        check_lengths(base, [plan.task_of(silo.name)], trains=True)
        if plan.task:  # all silos derive the layout from the same task's model
            base = load_base(plan, silo.project, override=silo.base)
        layout = plan_layout(plan, base, received)
    except (ModelError, PlanError) as error:
        findings.error("layout", error, f"and use the author's own layout.json as {path}, since rounding may differ")
        return None
    findings.ok("layout", f"derived here, digest {layout.digest}" + (", as in the plan" if plan.merge.layout else ""))
    return layout
