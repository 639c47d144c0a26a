"""Who could see what in a run; docs/threat-model.md has the reasons and the assumptions."""

from __future__ import annotations

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.stages import FITTED, REFITTED
from gramfuse_protocol.contract.who_sees_what import (
    ADDED,
    EXAMPLES,
    MODEL_SAYS,
    OF_HEAD,
    STATISTICS,
    STATISTICS_SAY,
    SUM_SAYS,
    holds,
    results,
)
from gramfuse_protocol.messages.phases import REQUESTS, SecureRequest
from gramfuse_server.report.page.blocks import Side
from gramfuse_server.report.schema import Report

WEIGHTS = "weight differences, numbers of examples"

SIMULATED = (
    "This was a simulation: all silos ran on one machine, and the person who ran it had all their data. Between real "
    "silos, each side sees only the following."
)

UNOPENED = (
    "start",
    "join",
    "train",
    *(phase for phase, request in REQUESTS.items() if issubclass(request, SecureRequest)),
)
"""Phases of the first round before any sum was unmasked."""
UNMEASURED = (*UNOPENED, "upload", "merge", "study")
"""Phases of the first round before any model was sent to silos or any result came back."""


def sides(report: Report, plan: Plan | None) -> list[Side]:
    """Return what each side of a run could see.

    Args:
        plan: of the run, or None for files that were measured without one.
    """
    if report.mode == "files" or plan is None:
        return [_silo_of_files(), _merger(report), _reader()]
    failure = report.failure
    if failure is None:
        return [_silo(plan, simulated=report.simulated), _coordinator(plan, _summed(report)), _reader()]
    phase = None if failure.round > 1 else failure.phase
    return [
        _silo(plan, simulated=report.simulated, measured=phase not in UNMEASURED),
        _coordinator(plan, 0, opened=phase not in UNOPENED, measured=phase not in UNMEASURED),
    ]


def _silo_of_files() -> Side:
    return Side(
        "Each silo",
        "Its own data and model; nothing of the others, unless it was given their files or the merged model.",
        f"Other silos' {EXAMPLES}.",
    )


def _merger(report: Report) -> Side:
    kept = ", and its head" if report.heads == "own" else ""
    if report.added_tokens:
        kept += f"; {ADDED}"
    return Side(
        "The person who merged the files",
        f"Of each silo: {STATISTICS}{kept}; so its fine-tuned model. {STATISTICS_SAY}",
        f"{EXAMPLES.capitalize()}.",
    )


def _reader() -> Side:
    return Side(
        "Anyone with the merged model",
        f"What the model reveals: it can be attacked like any model. {MODEL_SAYS}",
        "From which silo the model learned something.",
    )


def _silo(plan: Plan, *, simulated: bool, measured: bool = True) -> Side:
    keys = "their public keys and which of them are in the sum; " if plan.privacy.secure_aggregation else ""
    if not measured:
        models = "no model"
    elif plan.releases:
        names = {"simple": "the simple average", "regmean": "the merged model", FITTED: "the base with the fitted head"}
        names[REFITTED] = "the merged model with the head fitted again"
        judged = any(stage.judged for stage in plan.stages)
        *before, last = (names[name] for name in plan.measured)
        models = f"{', '.join(before)} and {last}" if before else last
        models += ", which it measured on its held-out examples"
        models += ", the last two on validation examples too, if it has any" if judged else ""
        if plan.model.head == "fitted" and plan.training.epochs:
            models = f"the fitted head, which it trained from; {models}"
    elif plan.model.head == "own" or len(plan.stages) > 1:
        models = "the merged model"
    else:
        models = "no model"
    shown = (
        " In this simulation, each silo's own model was also measured at all silos; real silos never see each other's."
        if simulated and measured and plan.privacy.metrics != "none"
        else ""
    )
    return Side(
        "Each silo",
        f"Its own data, model and statistics; of the others {keys}{models}.{shown}",
        "Other silos' texts, labels, statistics, models, results, or how many examples they have.",
    )


def _coordinator(plan: Plan, survivors: int, *, opened: bool = True, measured: bool = True) -> Side:
    own = "; the silos' heads" if plan.model.head == "own" else ""
    secure, noise = plan.privacy.secure_aggregation, plan.epsilon is not None
    shown = results(plan.privacy.metrics if measured else "none", secure=secure, noise=noise)
    if not secure:
        content = [STATISTICS if plan.closed_form else WEIGHTS] if plan.training.epochs else []
        content += [f"sums {OF_HEAD}"] if plan.fits_head else []
        return Side(
            "The coordinator",
            f"Of each silo by itself: {'; '.join(content)}. {STATISTICS_SAY} {shown}",
            f"{EXAMPLES.capitalize()}{own}.",
        )
    who = "Who took part, when, and how many bytes each sent; "
    if not opened:
        seen = "public keys, and masked vectors, which look random until a sum is unmasked. No sum was unmasked."
        return Side(
            "The coordinator", who + seen, f"Any sum, or any silo's statistics, model, or numbers of examples{own}."
        )
    over = f"{survivors} silos" if survivors else f"at least {plan.minimum_survivors} silos"
    each = ", once for each round" if plan.merge.rounds > 1 else ""
    grams = "Gram matrices, weight differences, products of both" if plan.merge.method == "regmean" else "weights"
    sums = [f"of their {grams}, and counts{each}"] if plan.training.epochs else []
    sums += [OF_HEAD] if plan.fits_head else []
    return Side(
        "The coordinator",
        f"{who}the sum over {over} {', and '.join(sums)}. {shown} {SUM_SAYS}",
        f"Any one silo's statistics, model, or numbers of examples{own}. {holds(plan.privacy.colluding)}",
    )


def _summed(report: Report) -> int:
    """Return the number of silos in the merge; 0 without one."""
    return sum(1 for silo in report.silos if silo.state == "merged")
