"""Names and descriptions of what is in a report, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gramfuse_protocol.contract.coverage import experts
from gramfuse_protocol.contract.stages import REFITTED
from gramfuse_protocol.contract.task import TaskName
from gramfuse_protocol.held_out.metrics import primary
from gramfuse_protocol.messages.phases import REQUESTS, Refusal
from gramfuse_protocol.tasks.registry import TASK_KINDS
from gramfuse_server.merging.methods.registry import METHODS
from gramfuse_server.report.choices import HeadChoice
from gramfuse_server.report.schema import Check, Measured, Report, Step

NAMES = {
    "silo": "{name} alone",
    "body": "{name}'s body, with each silo's own head",
    "alone": "each silo's own model",
    "regmean": "RegMean",
    "fitted": "base with fitted head",
    "refitted": "merge with head fitted again",
    "untuned": "RegMean, not tuned",
}

MERGES = ("simple", "regmean")

MODEL_WORDS = {
    "silo": "fine-tuned at one silo, on its own examples only",
    "body": "fine-tuned at one silo, under the heads of all silos",
    "alone": "each silo's own model, on its own held-out examples",
    "regmean": "the merge of this run: each linear layer solved in closed form from the silos' Gram matrices",
    "fitted": "the base model, not fine-tuned, with a head in closed form from all silos' examples",
    "refitted": "the merge, with its head fitted again in closed form, to the merged body's features",
    "untuned": "the merge with the plan's own α and weights",
}
"""One-line description of each kind of model; the registry of methods has the others."""

MEAN_SCORE = "mean over the tasks of each task's ranking metric"

CHECKS = {
    "counts": "counts from the silos: an impossible count is a lie or a fault",
    "share": "weight of a silo over its share of the examples: with uniform weighting, few examples count like many",
    "power": "mean square of a layer's inputs over that on public text: one silo with large inputs outweighs the rest",
    "eigenvalue": "smallest eigenvalue of the sum of the Gram matrices: impossible below zero, made up if far above",
    "ratio": "size of the merged difference over that of the simple average, on the silos' inputs",
    "average": "norm of the simple average's difference over that of the base, by tensor",
    "outputs": "largest output of a fitted head on public data",
    "change": "norm of the merged difference over that of the base, by tensor; the plan sets the limit",
}
"""One-line description of each check of the merge."""


def describe_choice(choice: HeadChoice) -> str:
    """Say which head was kept, and why."""
    before, after = (choice.scores[name] for name in choice.scores)
    which = "fitted again" if choice.kept == REFITTED else "as merged"
    return f"{which}: {choice.metric} on validation examples {before:.3f} as merged, {after:.3f} fitted again"


VERDICTS = {
    "ok": "usual for honest merges",
    "look": "rare for honest merges: look at it before you use the model",
    "bad": "impossible for honest merges, or forbidden by the plan: do not use the model",
}

PHASE_TITLES = {
    "start": "start Flower",
    **{phase: request.title for phase, request in REQUESTS.items()},
    "merge": "merge",
    "study": "try other merges",
    "exact": "measure all models exactly",
    "masked-metrics": "silos upload masked metrics",
    "survivors-metrics": "silos sign who is in the sum of metrics",
    "unmask-metrics": "unmask the sum of metrics",
    "write": "write the model",
    "refusal": Refusal.title,
}


def name_of(model: Measured) -> str:
    """Return the display name of a model in a report."""
    if model.kind in METHODS and model.name == model.kind:
        return METHODS[model.kind].label
    return NAMES.get(model.kind, "{name}").format(name=model.name)


def words_of(kind: str) -> str | None:
    """Return the one-line description of a kind of model; None if it is unknown."""
    return METHODS[kind].words if kind in METHODS else MODEL_WORDS.get(kind)


def words_of_metric(name: str) -> str | None:
    """Return the one-line description of a metric; None if it is unknown."""
    if name == "mean-score":
        return MEAN_SCORE
    return next((kind.measures[name].words for kind in TASK_KINDS.values() if name in kind.measures), None)


def off_by(model: Measured, metric: str) -> float | None:
    """Return the largest possible error of a noisy metric; None if the metric is exact."""
    interval = model.intervals.get(metric)
    return None if interval is None else max(abs(end - model.metrics[metric]) for end in interval)


def noise(report: Report, ranked: str) -> str | None:
    """Return a sentence on the noise of a report's metrics and its privacy cost; None without noise.

    Args:
        ranked: the metric that ranks models.
    """
    noisy = [(model, model.privacy) for model in report.models if model.privacy is not None]
    if not noisy:
        return None
    last, privacy = noisy[-1]
    total = privacy.total
    cost = (
        f"ε = {privacy.epsilon:g} for one held-out example and each of {total.releases} sums, "
        f"{total.epsilon:.2f} for all sums, at δ = {privacy.delta:g}"
    )
    if last.exact is None:
        return f"Held-out counts were released with noise: {cost}. The exact value lies within ± with 95% confidence."
    return (
        f"These values are exact, which only a simulation can know. Real silos release held-out counts with noise "
        f"({cost}), and {name_of(last)} would show {ranked} {last.metrics[ranked]:.3f} ± "
        f"{off_by(last, ranked):.3f}."
    )


def columns(model: Measured, tasks: Mapping[str, TaskName]) -> dict[str, float]:
    """Return a model's columns in a table: all metrics, or the ranking metric of each of several tasks."""
    values = {name: value for name, value in model.metrics.items() if name != "examples"}
    for name, metrics in model.tasks.items():
        metric = primary(tasks[name])
        values[f"{name}: {metric}"] = metrics[metric]
    return values


def ranked_by(tasks: Mapping[str, TaskName]) -> str:
    """Return the metric that ranks the models of a report; higher is better."""
    return primary(tasks[""]) if "" in tasks else "mean-score"


def explain(step: Step) -> str:
    """Describe how a group was solved, and which of its experts were unused."""
    if step.outcome == "empty":
        return "no silo measured a token here; took the simple average"
    parts = []
    if step.mean_blocks:
        parts.append(f"{step.mean_blocks} of {step.blocks} blocks could not be solved; they took the simple average")
    elif step.jitter:
        parts.append(f"ill-conditioned; solved with a relative ridge of {step.jitter:g} towards the simple average")
    if step.unused:
        parts.append(f"no measured token was routed to {experts(step.unused)}; took the simple average")
    return "; ".join(parts) or "solved exactly"


def explain_check(check: Check) -> str:
    """Describe the result of a check."""
    usual, possible = bounds(check.usual), bounds(check.possible)
    limits = f"usual {usual}" if usual == possible else f"usual {usual}, possible {possible}"
    return f"{check.verdict}: {check.name} of {check.where} is {check.value:.4g} ({limits})"


def bounds(ends: Sequence[float | None]) -> str:
    """Describe the range that a check allows."""
    least, most = ends
    if least is None:
        return "any" if most is None else f"up to {most:.4g}"
    if most is None:
        return f"from {least:.4g}"
    return f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
