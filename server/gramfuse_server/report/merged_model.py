"""Writes the merged model as a standard Hugging Face model with tokenizer and card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from numpy.typing import NDArray

from gramfuse_model.loading.auto_classes import Form, merged_form
from gramfuse_model.loading.base_model import Base
from gramfuse_model.loading.source import BUNDLED, hub_id
from gramfuse_model.parameters import add_differences
from gramfuse_model.rescaling import fold
from gramfuse_model.saving import save_adapter, save_model
from gramfuse_protocol.contract.coverage import Covered, coverage, coverage_lines, unused_expert_lines
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.who_sees_what import seen
from gramfuse_server.report.choices import Chosen
from gramfuse_server.report.loading import load_adapter
from gramfuse_server.report.schema import Measured, Step

TAGS = ("gramfuse", "regmean", "merge", "lora", "federated-learning")
"""Tags of a merged model's card."""

HERE = "path/to/this/directory"

TAGS_OF_FILES = tuple(tag for tag in TAGS if tag != "lora")
"""Tags of the card of a model that is merged from statistics files."""


def write_model(
    directory: Path,
    base: Base,
    deltas: Mapping[str, NDArray[Any]],
    plan: Plan,
    silos: Sequence[str],
    measured: Measured | None,
    chosen: Chosen | None = None,
    doubt: str = "",
    layout: Layout | None = None,
    steps: Sequence[Step] = (),
    *,
    fitted: Sequence[str] = (),
    refitted: Sequence[str] = (),
) -> None:
    """Write base + deltas into `model` or, as an adapter, into `adapter`; the base in memory becomes the merged model.

    If silos keep their heads, the written model has no head and no labels. A regression model predicts targets on the
    scale of the data (`gramfuse_model.rescaling`).

    Args:
        directory: where `model` and `adapter` are made, as the plan says.
        silos: the silos that trained what was merged; without training, those whose examples the head was fitted to.
        measured: the model's entry in the report, for the card, if it was measured.
        chosen: the choice of the search, if the merge was chosen on held-out data.
        doubt: why the model must not be used, if a check of the merge is bad.
        layout: of the merge; the card then states how much of the model is merged in closed form.
        steps: how its groups were solved; the card then names the experts without measured tokens.
        fitted, refitted: the silos whose examples the head was fitted to before training, and after the merge; none if
            it was not.
    """
    add_differences(base.model, deltas)
    model = base.model
    if plan.model.head == "own":
        model = model.base_model
        for key in ("id2label", "label2id", "problem_type"):
            model.config.__dict__.pop(key, None)
    else:
        fold(model, next(iter(plan.tasks.values())))
    for output in plan.outputs:
        place = directory / output
        if output == "adapter":
            task = next(iter(plan.tasks.values())).task
            save_adapter(base, plan.model.base, place, task=task, revision=plan.model.revision)
        else:
            save_model(base, place, model)
        about = (measured, chosen, doubt, layout, steps)
        text = card(plan, silos, *about, fitted=fitted, refitted=refitted, adapter=output == "adapter")
        (place / "README.md").write_text(text, encoding="utf-8")


def card(
    plan: Plan,
    silos: Sequence[str],
    measured: Measured | None,
    chosen: Chosen | None = None,
    doubt: str = "",
    layout: Layout | None = None,
    steps: Sequence[Step] = (),
    *,
    fitted: Sequence[str] = (),
    refitted: Sequence[str] = (),
    adapter: bool = False,
) -> str:
    """Return the model card, made from the plan; arguments as in `write_model`, and whether it is for an adapter."""
    form = merged_form(plan)
    done = {"regmean": plan.closed_form, "merge": plan.training.epochs > 0, "lora": plan.training.lora is not None}
    tags = [tag for tag in TAGS if done.get(tag, True)]
    library = "peft" if adapter else "transformers"
    lines = [*front_matter(plan.model.base, form, tags, library), "", f"# {plan.plan.name}", ""]
    if doubt:
        lines += [f"**Do not use this model: {doubt}.**", ""]
    lines += [
        f"{_how(plan, silos, chosen, fitted, refitted)} The silos' data was not pooled; "
        f"{seen('secure' if plan.privacy.secure_aggregation else 'open', past=True)}.",
        "",
        *_kept_heads(plan),
        f"Plan digest: `{plan.digest}`",
        "",
        *(extent(coverage(layout, steps), steps) if layout and plan.closed_form else ()),
        *(usage_of_adapter(form, plan.model.base) if adapter else usage(form)),
    ]
    if measured:
        lines += [*_results(measured.without_noise), *_generation(plan)]
    lines += ["The plan:", "", *fenced("toml", plan.to_toml().strip()), ""]
    return "\n".join(lines)


def _results(model: Measured) -> list[str]:
    """Return the table of metrics, with intervals if they are noisy."""
    privacy = model.privacy
    head = ["| metric | value | 95% interval |", "|---|---|---|"] if privacy else ["| metric | value |", "|---|---|"]
    lines = ["On the silos' held-out examples together:", "", *head]
    for name, value in model.metrics.items():
        between = " to ".join(f"{end:.4g}" for end in model.intervals.get(name, ()))
        lines.append(f"| {name} | {value:.4g} |" + (f" {between} |" if privacy else ""))
    if privacy:
        total = privacy.total
        lines += [
            "",
            f"Held-out counts were released with noise: for one example, each of {total.releases} sums costs "
            f"ε = {privacy.epsilon:g}, and all of them together ε = {total.epsilon:.2f}, at δ = {privacy.delta:g}.",
        ]
    return [*lines, ""]


def _generation(plan: Plan) -> list[str]:
    settings = next((task.generation for task in plan.tasks.values() if task.generation), None)
    if settings is None:
        return []
    first = f", beginning with {code(settings['first-token'])}" if settings["first-token"] else ""
    return [
        f"Texts were generated greedily, with at most {settings['max-new-tokens']} tokens{first}. The settings in "
        "`generation_config.json` are those of the base model and were not used.",
        "",
    ]


def _how(
    plan: Plan, silos: Sequence[str], chosen: Chosen | None, fitted: Sequence[str], refitted: Sequence[str]
) -> str:
    """Return how a model was made, in sentences."""
    base, among = code(plan.model.base), _among(silos)
    if not plan.training.epochs:
        return (
            f"{base}, not fine-tuned, with a head that was fitted in closed form to the examples of {among} with "
            "gramfuse, in one exchange."
        )
    rounds = "one round" if plan.merge.rounds == 1 else f"{plan.merge.rounds} rounds"
    way = "by RegMean (Jin et al., ICLR 2023)" if plan.closed_form else "by averaging all weights"
    first = f"{base}, fine-tuned separately at {among} and merged in {rounds} {way} with gramfuse: "
    text = f"{first}{_settings(plan, chosen)}."
    if fitted:
        text += (
            f" Before training, one head was fitted in closed form to the examples of {_these(fitted, silos)}; all "
            "silos started from it."
        )
    if refitted:
        text += (
            " After the merge, the head was fitted in closed form to the merged body's features of the examples of "
            f"{_these(refitted, silos)}."
        )
    return text


def _among(silos: Sequence[str]) -> str:
    return f"{len(silos)} silos ({', '.join(silos)})"


def _these(silos: Sequence[str], named: Sequence[str]) -> str:
    """Name silos; those that were named last are only referred to."""
    return "these silos" if tuple(silos) == tuple(named) else _among(silos)


def _settings(plan: Plan, chosen: Chosen | None) -> str:
    if chosen is None:
        alpha = f"alpha {plan.merge.alpha}, " if plan.closed_form else ""
        return f"{alpha}{plan.merge.weighting} weighting"
    weights = ", ".join(f"{silo} × {weight:g}" for silo, weight in chosen.weights.items())
    return (
        f"alpha {chosen.alpha}, {plan.merge.weighting} weighting with {weights}, chosen on held-out examples "
        "other than those of the metrics"
    )


def usage(form: Form) -> list[str]:
    """Return instructions for loading a model, as lines of Markdown."""
    name = "processor" if form.processor == "AutoImageProcessor" else "tokenizer"
    text = (
        f"from transformers import {form.auto}, {form.processor}\n\n"
        f'model = {form.auto}.from_pretrained("{HERE}")\n'
        f'{name} = {form.processor}.from_pretrained("{HERE}")'
    )
    return [*fenced("python", text), ""]


def usage_of_adapter(form: Form, base: str) -> list[str]:
    """Return instructions for loading an adapter onto its base, as lines of Markdown.

    Args:
        base: as named in a plan.
    """
    return [*fenced("python", load_adapter(form.auto, base, HERE)), ""]


def extent(covered: Covered, steps: Iterable[Step]) -> list[str]:
    """Return how much of a model is merged in closed form, as lines of Markdown.

    Args:
        covered: a report, or a result of `gramfuse_protocol.contract.coverage`.
        steps: how groups were solved.
    """
    return [" ".join([*coverage_lines(covered, code), *unused_expert_lines(steps, code)]), ""]


def code(text: str) -> str:
    """Return a text as a Markdown code span that it cannot break out of."""
    fence = _fence(text, 1)
    room = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else ""
    return f"{fence}{room}{text}{room}{fence}"


def fenced(language: str, text: str) -> list[str]:
    """Return code as a fenced Markdown block that it cannot break out of."""
    fence = _fence(text, 3)
    return [f"{fence}{language}", text, fence]


def _fence(text: str, least: int) -> str:
    """Return a run of backticks longer than any in a text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def _kept_heads(plan: Plan) -> list[str]:
    if plan.model.head != "own":
        return []
    return ["This is the body that all silos share. Each silo has its own head for it, which it kept to itself.", ""]


def front_matter(
    base: str, form: Form, tags: Sequence[str] = TAGS_OF_FILES, library: str = "transformers"
) -> list[str]:
    """Return the card's YAML front matter, as lines.

    Args:
        base: as named in a plan.
        form: the model's class and pipeline.
        tags: for the hub.
        library: that loads the model.
    """
    # A local directory means nothing to others.
    public = base in BUNDLED or not base.startswith((".", "/", "~"))
    metadata = {
        **({"base_model": hub_id(base)} if public else {}),
        "library_name": library,
        "pipeline_tag": form.pipeline,
        "tags": list(tags),
    }
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=float("inf"))
    return ["---", *text.strip().split("\n"), "---"]
