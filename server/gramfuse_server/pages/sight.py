"""Who could see what in a run, in words; docs/threat-model.md has the reasons and the assumptions."""

from __future__ import annotations

from gramfuse_protocol.plan import Plan
from gramfuse_server.pages.blocks import Side
from gramfuse_server.report_schema import Report

LEFT_NOWHERE = "Texts, labels and single predictions left no silo."
SIMULATED = (
    "This was a simulation: all silos ran on one machine, and whoever ran it had all of their data. Between real silos "
    "each side sees what stands here."
)
STATISTICS = "Gram matrices of its layers' inputs, weight differences, numbers of examples and of token rows"
OPEN = (
    "A contribution in the clear is not harmless: the Gram matrix of few examples gives away which tokens stood where, "
    "and weight differences say much about the data they were learned from."
)

UNOPENED = ("start", "join", "train", "keys", "shares", "masked", "survivors", "unmask")
"""Phases of the first round in which no sum was opened yet."""
UNMEASURED = (*UNOPENED, "upload", "merge", "study")
"""Those in which no model was sent to silos yet, and no result came back."""


def sides(report: Report, plan: Plan | None) -> list[Side]:
    """Return all sides of a run.

    Args:
        plan: that of the run, or None for files that were measured without one.
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
        "Its own data and model; of the others nothing, unless it was handed their files or the merged model.",
        "Other silos' texts, labels and single predictions.",
    )


def _merger(report: Report) -> Side:
    kept = ", and its head" if report.heads == "own" else ""
    return Side(
        "Whoever had the files",
        f"Of each silo: {STATISTICS}{kept}; so its fine-tuned model. {OPEN}",
        "Texts, labels and single predictions.",
    )


def _reader() -> Side:
    return Side(
        "Whoever gets the merged model",
        "What the model says: it can be attacked like any model, and there is no differential privacy here.",
        "Which silo a piece of what it learned came from.",
    )


def _silo(plan: Plan, *, simulated: bool, measured: bool = True) -> Side:
    keys = "their public keys and which of them are in the sum; " if plan.privacy.secure_aggregation else ""
    if not measured:
        models = "no model"
    elif plan.privacy.metrics != "none":
        both = "the simple average and the merged model" if "simple" in plan.privacy.candidates else "the merged model"
        models = f"{both}, which it measured on its held-out examples"
    elif plan.model.head == "own" or plan.merge.rounds > 1:
        models = "the merged model"
    else:
        models = "no model"
    shown = (
        " In this simulation each silo's own model was measured at all silos too; a real silo is not shown another's."
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
    if not plan.privacy.secure_aggregation:
        results = {
            "none": "No results left a silo.",
            "sum": "Each silo's held-out results as counts, of which the plan shows the sum only.",
            "silo": "Each silo's held-out results as counts.",
        }[plan.privacy.metrics if measured else "none"]
        return Side(
            "The coordinator",
            f"Of each silo by itself: {STATISTICS}. {OPEN} {results}",
            f"Texts, labels, single predictions{own}.",
        )
    results = {
        "none": "No results left a silo.",
        "sum": f"Of held-out results the sum, in the same way{', and with noise' if plan.epsilon is not None else ''}.",
        "silo": "Each silo's held-out results as counts, in the clear.",
    }[plan.privacy.metrics if measured else "none"]
    who = "Who took part, when, and how many bytes each sent; "
    if not opened:
        seen = "public keys, and masked vectors, which are random words while no sum is opened. No sum was opened."
        return Side(
            "The coordinator", who + seen, f"Any sum, or any silo's statistics, model, or numbers of examples{own}."
        )
    over = f"{survivors} silos" if survivors else f"at least {plan.minimum_survivors} silos"
    each = ", once for each round" if plan.merge.rounds > 1 else ""
    colluding = plan.privacy.colluding
    holds = (
        f"This holds while at most {colluding} {'silo is' if colluding == 1 else 'silos are'} on its side."
        if colluding
        else "This holds while no silo is on its side."
    )
    return Side(
        "The coordinator",
        f"{who}the sum over {over}{each} of their Gram matrices, weight differences, products of both, and counts. "
        f"{results} A sum over few silos is not anonymous.",
        f"Any one silo's statistics, model, or numbers of examples{own}. {holds}",
    )


def _summed(report: Report) -> int:
    """Return how many silos are in the merge; 0 if there is none."""
    return sum(1 for silo in report.silos if silo.state == "merged")
