"""Writes the merged model as an ordinary Hugging Face model with tokenizer and card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gramfuse_model.base import BUNDLED, Base
from gramfuse_model.tasks import Form, merged_form
from gramfuse_protocol.plan import Plan
from gramfuse_server.accumulator import Deltas


def write_model(
    directory: Path,
    base: Base,
    deltas: Deltas,
    plan: Plan,
    silos: Sequence[str],
    metrics: Mapping[str, float] | None,
    chosen: Mapping[str, Any] | None = None,
    doubt: str = "",
) -> None:
    """Write base + deltas; the base model in memory becomes the merged one.

    Where silos keep their heads, what is written has none, nor labels.

    Args:
        directory: made if it is not there.
        silos: whose contributions are in it.
        metrics: joint held-out metrics for the card, if any were measured.
        chosen: `alpha` and `weights` by silo, if they were chosen on held-out data and are not the plan's.
        doubt: why it must not be used, if a check of the merge is bad.
    """
    add_differences(base.model, deltas)
    model = base.model
    if plan.model.head == "own":
        model = model.base_model
        for key in ("id2label", "label2id", "problem_type"):
            model.config.__dict__.pop(key, None)
    model.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card(plan, silos, metrics, chosen, doubt), encoding="utf-8")


def add_differences(model: nn.Module, deltas: Deltas) -> None:
    """Add differences to a model's parameters, by name; summed in float64 and rounded once to the model's dtype."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            parameter = parameters[name]
            parameter.copy_(torch.from_numpy(parameter.numpy().astype(np.float64) + delta))


def card(
    plan: Plan,
    silos: Sequence[str],
    metrics: Mapping[str, float] | None,
    chosen: Mapping[str, Any] | None = None,
    doubt: str = "",
) -> str:
    """Return the model card, made from the plan; arguments as `write_model` has them."""
    form = merged_form(plan)
    exchanges = "one exchange" if plan.merge.rounds == 1 else f"{plan.merge.rounds} exchanges"
    lines = ["---", *front_matter(plan.model.base, form), "---", "", f"# {plan.plan.name}", ""]
    if doubt:
        lines += [f"**Do not use this model: {doubt}.**", ""]
    lines += [
        f"`{plan.model.base}`, fine-tuned separately at {len(silos)} silos ({', '.join(silos)}) and merged "
        f"in {exchanges} by RegMean (Jin et al., ICLR 2023) with gramfuse: {_settings(plan, chosen)}. "
        "The silos' data was not pooled; "
        + (
            "the coordinator saw sums over the silos only (secure aggregation)."
            if plan.privacy.secure_aggregation
            else "the coordinator saw each silo's statistics."
        ),
        "",
        *_kept_heads(plan),
        f"Plan digest: `{plan.digest}`",
        "",
        *usage(form),
    ]
    if metrics:
        lines += ["On the silos' held-out examples together:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
        lines += [""]
    lines += ["The plan:", "", "```toml", plan.to_toml().strip(), "```", ""]
    return "\n".join(lines)


def _settings(plan: Plan, chosen: Mapping[str, Any] | None) -> str:
    if chosen is None:
        return f"alpha {plan.merge.alpha}, {plan.merge.weighting} weighting"
    weights = ", ".join(f"{silo} × {weight:g}" for silo, weight in chosen["weights"].items())
    return (
        f"alpha {chosen['alpha']}, {plan.merge.weighting} weighting with {weights}, chosen on held-out examples that "
        "are not those of the metrics"
    )


def usage(form: Form) -> list[str]:
    """Return how to load a model, as lines of Markdown."""
    name = "processor" if form.processor == "AutoImageProcessor" else "tokenizer"
    return [
        "```python",
        f"from transformers import {form.auto}, {form.processor}",
        "",
        f'model = {form.auto}.from_pretrained("path/to/this/directory")',
        f'{name} = {form.processor}.from_pretrained("path/to/this/directory")',
        "```",
        "",
    ]


def _kept_heads(plan: Plan) -> list[str]:
    if plan.model.head != "own":
        return []
    return ["This is the body that all silos share. Each has a head of its own for it, which it kept to itself.", ""]


def front_matter(base: str, form: Form) -> list[str]:
    """Return the card's metadata, as lines of YAML.

    Args:
        base: as a plan names it.
        form: what the model is.
    """
    hub_id = BUNDLED[base].hub_id if base in BUNDLED else base
    # A directory of whoever merged says nothing to others.
    public = base in BUNDLED or not base.startswith((".", "/", "~"))
    return [
        *([f"base_model: {hub_id}"] if public else []),
        "library_name: transformers",
        f"pipeline_tag: {form.pipeline}",
        "tags:",
        "- gramfuse",
        "- regmean",
        "- merge",
        "- federated-learning",
    ]
