"""The sections of a report's page; sections without content are left out."""

from __future__ import annotations

from markupsafe import Markup

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.who_sees_what import EXAMPLES, seen
from gramfuse_protocol.tasks.registry import kind_of
from gramfuse_protocol.text import one_line
from gramfuse_server.report.loading import load_model, loading_of, loading_of_files
from gramfuse_server.report.page import charts, who_saw_what
from gramfuse_server.report.page.added_tokens import explain_added_tokens
from gramfuse_server.report.page.blocks import (
    Block,
    Cell,
    Code,
    Column,
    Facts,
    PageSection,
    Sides,
    Table,
    TableRow,
    Text,
)
from gramfuse_server.report.page.charts import count
from gramfuse_server.report.page.history import checks, failure, losses, solve, traffic
from gramfuse_server.report.page.results import by_label, by_silo, models, result, search
from gramfuse_server.report.page.view import Reading
from gramfuse_server.report.page.words import describe_choice
from gramfuse_server.report.schema import Report

STATES = {
    "merged": "in the merge",
    "trained": "had trained",
    "joined": "had joined",
    "connected": "was connected",
    "lost": "was lost",
    "absent": "did not connect",
}


def sections(report: Report, plan: Plan | None) -> list[PageSection]:
    """Return the non-empty sections of a report.

    Args:
        report: of a complete run, a failed run, or a merge of files.
        plan: of the run, or None.
    """
    reading = Reading(report, plan)
    candidates = [
        failure(reading) if reading.failure else result(reading),
        losses(reading),
        *([checks(reading)] if reading.unsound else []),
        _merged(reading),
        _sight(reading),
        models(reading),
        by_silo(reading),
        by_label(reading),
        search(reading),
        solve(reading),
        *([] if reading.unsound else [checks(reading)]),
        traffic(reading),
        _load(reading),
        _check(reading),
    ]
    return [section for section in candidates if section is not None]


def heading(report: Report, plan: Plan | None) -> tuple[str, str]:
    """Return the heading and the subheading of the page."""
    reading = Reading(report, plan)
    if reading.failure is not None:
        return f"{reading.title}: the run failed", f"Run {report.run}: how far it got."
    silos = count(len(reading.silos), "silos")
    examples = count(report.examples, "examples") if report.examples else "examples"
    all_silos = len(plan.silo) if plan is not None else len(reading.silos)
    where = silos if all_silos == len(reading.silos) else f"{len(reading.silos)} of {all_silos} silos"
    if report.mode == "files":
        way = "from statistics files"
    else:
        way = f"in {len(reading.rounds)} exchanges" if len(reading.rounds) > 1 else "in one exchange"
    title = f"{reading.title}: one {'body' if reading.own_heads else 'model'} of {silos}"
    return title, f"Run {report.run}: {examples} at {where}, merged {way}, without pooling them."


def _merged(reading: Reading) -> PageSection:
    """What was merged, from whom, under which plan."""
    title = "What was to be merged" if reading.failure else "What was merged"
    added = [Text(sentence) for sentence in explain_added_tokens(reading.report)]
    return PageSection("merged", title, [Facts(_terms(reading)), _roster(reading), *added])


def _terms(reading: Reading) -> list[tuple[str, str | Markup]]:
    report, plan = reading.report, reading.plan
    base, tuned = report.base, None if reading.tuning is None else reading.tuning.chosen
    entries: list[tuple[str, str | Markup]] = []
    if plan is not None:
        entries.append(("Plan", f"{plan.plan.name}, version {plan.plan.version}"))
    if report.plan_digest:
        entries.append(("Plan digest", _digest(report.plan_digest)))
    entries += [("Base model", base.name), ("Base model's SHA-256", _digest(base.sha256))]
    entries += [(f"Task “{name}”" if name else "Task", _task(reading, name)) for name in reading.tasks]
    heads = {
        "fitted": "fitted to all silos' examples in closed form before training"
        + (", then averaged" if plan is None or plan.training.epochs else ""),
        "same": "merged, from one start",
        "different": "merged, each from its own start",
        "own": "not merged",
    }
    head = report.heads if report.mode == "files" else report.head
    again = "; fitted again after the merge" if report.merged == "refitted" else ""
    kept = ": each silo keeps its own" if head == "own" else again
    entries.append(("Heads", heads.get(head, "merged") + kept))
    if report.head_choice is not None:
        entries.append(("Head kept", describe_choice(report.head_choice)))
    alpha = plan.merge.alpha if plan is not None else report.alpha
    if tuned:
        before = f" instead of the plan's {alpha:g}" if plan is not None and alpha != tuned.alpha else ""
        entries.append(("α", f"{tuned.alpha:g}, chosen by the search{before}"))
    elif alpha is not None and (plan is None or plan.closed_form):
        entries.append(("α", f"{alpha:g}, the share of each Gram matrix's off-diagonal that is kept"))
    if plan is None or plan.training.epochs:
        entries.append(("Weighting", _weighting(reading)))
    if plan is not None:
        entries += _of_training(plan)
    entries.append(("Mode", f"{report.mode}: {seen(report.mode)}"))
    if plan is not None and report.mode == "secure":
        dropouts = len(plan.silo) - plan.minimum_survivors
        entries.append(
            (
                "Secure sum",
                f"{count(len(plan.silo), 'silos')}, threshold {plan.threshold}; {dropouts} may drop out, "
                f"{plan.privacy.colluding} may collude with the coordinator",
            )
        )
        entries.append(("Silos' keys", report.identities or ""))
    return entries


def _of_training(plan: Plan) -> list[tuple[str, str | Markup]]:
    training, gram = plan.training, plan.merge.gram
    if not training.epochs:
        return [("Training", "none: the fitted head on the base is the result")]
    entries: list[tuple[str, str | Markup]] = []
    if plan.closed_form:
        shapes = (f"{structure} for {pattern}" for pattern, structure in gram.items())
        entries.append(("Gram matrices", gram["*"] if list(gram) == ["*"] else ", ".join(shapes)))
        entries.append(("Token rows", f"at most {plan.merge.tokens:,} per Gram matrix and silo"))
    else:
        entries.append(("Merge", "the plain average of all weights; no Gram matrices were sent"))
    settings = f"{count(training.epochs, 'epochs')}, learning rate {training.learning_rate:g}, seed {training.seed}"
    frozen = ", ".join(training.freeze) or "nothing"
    if training.lora is not None:
        entries.append(
            ("Adapters", f"rank {training.lora.rank}, scaled by {training.lora.scale:g}; the head is trained whole")
        )
        frozen = "the base's own weights, and the matrix A of each adapter"
    entries += [("Training", settings), ("Frozen", frozen)]
    if plan.merge.rounds > 1:
        entries.append(("Rounds", str(plan.merge.rounds)))
    return entries


def _digest(text: str) -> Markup:
    return Markup('<code class="digest">{}</code>').format(one_line(text))


def _task(reading: Reading, name: str) -> str:
    kind = str(reading.tasks[name])
    task = reading.plan.tasks.get(name) if reading.plan is not None and reading.plan.tasks else None
    generation = reading.report.generation.get(name)
    if generation is not None:
        first = f", beginning with “{generation.first_token}”" if generation.first_token else ""
        return f"{kind}; texts were generated greedily, with at most {generation.max_new_tokens} tokens{first}"
    if task is None or not task.labels:
        return kind
    names, (one, several) = kind_of(task).names(task), kind_of(task).unit
    return f"{kind} with {len(names):,} {one if len(names) == 1 else several}"


def _weighting(reading: Reading) -> str:
    plan, report = reading.plan, reading.report
    weighting = plan.merge.weighting if plan is not None else report.weighting
    words = {"uniform": "all silos equally", "examples": "by number of examples"}[weighting]
    factors = {silo.name: silo.weight for silo in report.silos}
    weights = factors if reading.tuning is None else reading.tuning.chosen.weights
    if len(set(weights.values())) > 1:
        words += "; times " + ", ".join(f"{weight:g} for {silo}" for silo, weight in weights.items())
    return words


def _roster(reading: Reading) -> Table:
    """The table of silos."""
    silos, plan = reading.report.silos, reading.plan
    failed = any(silo.has("state") for silo in silos)
    tasks = {silo.name: silo.task or "" for silo in plan.silo} if plan is not None and plan.task else {}
    counted = any(silo.examples is not None for silo in silos)
    drawn = charts.bars([float(silo.examples) if silo.examples is not None else None for silo in silos])
    titles = [
        Column("Silo"),
        *([Column("How far it got", number=False)] if failed else []),
        *([Column("Task", number=False)] if tasks else []),
        *([Column("Examples")] if counted else []),
        *([Column("SHA-256 of its file", number=False)] if any(silo.has("sha256") for silo in silos) else []),
    ]
    rows = []
    for silo, bar in zip(silos, drawn, strict=True):
        cells = [Cell(STATES[silo.state])] if failed else []
        cells += [Cell(tasks.get(silo.name, ""))] if tasks else []
        examples = silo.examples
        cells += [Cell(charts.NONE if examples is None else f"{examples:,}", bar)] if counted else []
        cells += [Cell(silo.sha256 or "")] if silo.has("sha256") else []
        rows.append(TableRow(silo.name, cells))
    total = reading.report.examples
    sum_of_all = f", {total:,} examples in total" if total else ""
    hidden = "; each silo's number is known only to itself" if total and not counted else ""
    return Table(f"Silos{sum_of_all}{hidden}", titles, rows)


def _sight(reading: Reading) -> PageSection:
    """Who could see what."""
    report = reading.report
    blocks: list[Block] = []
    if report.simulated:
        blocks.append(Text(who_saw_what.SIMULATED))
    early = " The run ended early; this is the most that anyone saw." if reading.failure else ""
    blocks.append(Text(f"{EXAMPLES.capitalize()} left no silo.{early}"))
    blocks.append(Sides(who_saw_what.sides(report, reading.plan)))
    blocks.append(Text(Markup("Assumptions, and what is not covered: <code>docs/threat-model.md</code>.")))
    return PageSection("sight", "Who could see what", blocks)


def _load(reading: Reading) -> PageSection | None:
    """How to load the model."""
    report = reading.report
    if reading.failure is not None:
        return None
    if report.mode == "files" and reading.own_heads:
        blocks: list[Block] = [
            Text("Each silo's model, the merged body with its own head, is in a directory of its name:")
        ]
        blocks += [Code(f"Loading {silo.name}", load_model(silo.auto_class or "", silo.name)) for silo in report.silos]
        return PageSection("load", "Load the model", blocks)
    code = loading_of_files(report) if report.mode == "files" else loading_of(report)
    blocks = [Text("In the directory of this report:"), Code("Loading the model", code)]
    if reading.own_heads:
        where = "here in models/" if report.simulated else "there, in model/ beside its statistics"
        blocks.append(Text(f"This is the body that all silos share. Each silo's model, with its own head, is {where}."))
    return PageSection("load", "Load the model", blocks)


def _check(reading: Reading) -> PageSection:
    """How to verify the files, and the versions that made them."""
    report = reading.report
    blocks: list[Block] = []
    if reading.failure is None:
        blocks += [
            Text("To check that the files of this directory are unchanged:"),
            Code("Checking the files", "sha256sum -c SHA256SUMS"),
        ]
    if report.plan_digest:
        blocks.append(
            Text(
                Markup(
                    "The plan digest above is what silos approve: it is the same under <code>approved</code> in their "
                    "files, and in the output of <code>gramfuse plan show</code>."
                )
            )
        )
    blocks.append(Text(Markup("All numbers on this page are in <code>report.json</code> beside it.")))
    entries: list[tuple[str, str | Markup]] = [("Layout digest", _digest(report.layout_digest))]
    blocks.append(Facts([*entries, *((f"Version of {name}", number) for name, number in report.versions.items())]))
    return PageSection("check", "Check it", blocks)
