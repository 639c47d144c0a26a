"""What things of a report are called, on the terminal and on its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gramfuse_protocol.contract.coverage import experts
from gramfuse_protocol.contract.task import TaskKind
from gramfuse_protocol.held_out.metrics import primary
from gramfuse_protocol.messages.phases import MERGED
from gramfuse_protocol.tasks.registry import KINDS as TASKS
from gramfuse_server.merging.methods.registry import METHODS
from gramfuse_server.report.schema import Check, Measured, Report, Step

NAMES = {
    "silo": "{name} alone",
    "body": "{name}'s body, with each silo's own head",
    "alone": "each silo's own model",
    "regmean": "RegMean",
    "untuned": "RegMean, not tuned",
}

MERGES = ("simple", MERGED)

KINDS = {
    "silo": "fine-tuned at one silo, on its own examples only",
    "body": "fine-tuned at one silo, under the heads of all silos",
    "alone": "each silo's own model, on its own held-out examples",
    "regmean": "the merge of this run: each linear layer solved in closed form from the silos' Gram matrices",
    "untuned": "the merge with the plan's own α and weights",
}
"""What a model of a kind is, in one line; the registry of methods has all others."""

MEAN_SCORE = "mean over the tasks of the metric that ranks models of each"

CHECKS = {
    "counts": "how much silos counted: what cannot be is a lie, or a fault",
    "share": "weight of a silo over what its examples would give it: with uniform weighting, a few count as many",
    "power": "mean square of a layer's inputs over that on public text: one loud silo outweighs the others",
    "eigenvalue": "smallest eigenvalue of the sum of the Gram matrices: below zero, some are none; far above, made up",
    "ratio": "size of the merged difference over that of the simple average, on the silos' inputs",
    "average": "norm of the simple average's difference over that of the base, by tensor",
    "change": "norm of the merged difference over that of the base, by tensor; the plan has the limit",
}
"""What a check of the merge looks at, in one line."""

VERDICTS = {
    "ok": "as honest merges are",
    "look": "honest merges are rarely so: look at it before you use the model",
    "bad": "no honest merge is so, or the plan forbids it: do not use the model",
}

PHASES = {
    "start": "start Flower",
    "join": "silos join",
    "train": "silos fine-tune and measure",
    "upload": "silos upload",
    "keys": "silos exchange keys",
    "shares": "silos share the secrets of their masks",
    "masked": "silos upload, masked",
    "survivors": "silos sign who is in the sum",
    "unmask": "silos release what opens the sum",
    "merge": "merge",
    "study": "try other merges",
    "evaluate": "measure on held-out data",
    "exact": "measure all models exactly",
    "masked-metrics": "silos upload metrics, masked",
    "survivors-metrics": "silos sign who is in the sum of metrics",
    "unmask-metrics": "silos release what opens the sum of metrics",
    "write": "write the model",
    "finish": "silos wipe what they kept of the session",
    "refusal": "silos refuse",
}


def name_of(model: Measured) -> str:
    """Return what a model of a report is called."""
    if model.kind in METHODS and model.name == model.kind:
        return METHODS[model.kind].label
    return NAMES.get(model.kind, "{name}").format(name=model.name)


def words_of(kind: str) -> str | None:
    """Return what a model of a kind is, in one line; None of a kind that nobody here knows."""
    return METHODS[kind].words if kind in METHODS else KINDS.get(kind)


def words_of_metric(name: str) -> str | None:
    """Return what a metric says, in one line; None of one that nobody here knows."""
    if name == "mean-score":
        return MEAN_SCORE
    return next((kind.measures[name].words for kind in TASKS.values() if name in kind.measures), None)


def off_by(model: Measured, metric: str) -> float | None:
    """Return how far the exact value of a metric may be from what a report says; None if that is exact."""
    interval = model.intervals.get(metric)
    return None if interval is None else max(abs(end - model.metrics[metric]) for end in interval)


def noise(report: Report, ranked: str) -> str | None:
    """Say what noise the metrics of a report have, if any, and what they cost in privacy.

    Args:
        ranked: the metric that models are ranked by.
    """
    noisy = [(model, model.privacy) for model in report.models if model.privacy is not None]
    if not noisy:
        return None
    last, privacy = noisy[-1]
    total = privacy.total
    cost = (
        f"ε = {privacy.epsilon:g} of one held-out example for each of {total.releases} sums, "
        f"{total.epsilon:.2f} for all, at δ = {privacy.delta:g}"
    )
    if last.exact is None:
        return f"Held-out counts left with noise: {cost}. The exact value lies within ± in 95 of 100 cases."
    return (
        f"These values are exact, which only a simulation can know. Between silos, held-out counts leave with noise "
        f"({cost}), and {name_of(last)} would show {ranked} {last.metrics[ranked]:.3f} ± "
        f"{off_by(last, ranked):.3f}."
    )


def columns(model: Measured, tasks: Mapping[str, TaskKind]) -> dict[str, float]:
    """Return what a table says of a model: all metrics, or, of several tasks, of each the one that ranks them."""
    found = {name: value for name, value in model.metrics.items() if name != "examples"}
    for name, metrics in model.tasks.items():
        metric = primary(tasks[name])
        found[f"{name}: {metric}"] = metrics[metric]
    return found


def ranked_by(tasks: Mapping[str, TaskKind]) -> str:
    """Return which metric ranks the models of a report: the higher, the better."""
    return primary(tasks[""]) if "" in tasks else "mean-score"


def explain(step: Step) -> str:
    """Say how a group was solved, and which of its experts were not used."""
    if step.outcome == "empty":
        return "no silo saw a token there; took the simple average"
    said = []
    if step.mean_blocks:
        said.append(f"{step.mean_blocks} of {step.blocks} blocks could not be solved; they took the simple average")
    elif step.jitter:
        said.append(f"ill-conditioned; solved with a relative ridge of {step.jitter:g} towards the simple average")
    if step.unused:
        said.append(f"no measured token was routed to {experts(step.unused)}; took the simple average")
    return "; ".join(said) or "solved as it stands"


def explain_check(check: Check) -> str:
    """Say what a check found."""
    usual, possible = bounds(check.usual), bounds(check.possible)
    limits = f"usual {usual}" if usual == possible else f"usual {usual}, possible {possible}"
    return f"{check.verdict}: {check.name} of {check.where} is {check.value:.4g} ({limits})"


def bounds(of: Sequence[float | None]) -> str:
    """Say which range a check allows."""
    least, most = of
    if least is None:
        return "any" if most is None else f"up to {most:.4g}"
    if most is None:
        return f"from {least:.4g}"
    return f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
