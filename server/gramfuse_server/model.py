"""Writes the merged model as an ordinary Hugging Face model with tokenizer and card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from gramfuse_model.base import BUNDLED, Base
from gramfuse_protocol.plan import Plan
from gramfuse_server.accumulator import Deltas


def write_model(
    directory: Path,
    base: Base,
    deltas: Deltas,
    plan: Plan,
    silos: Sequence[str],
    metrics: Mapping[str, float] | None,
) -> None:
    """Write base + deltas; the base model in memory becomes the merged one.

    The sum is made in float64 and rounded once to the base's dtype.

    Args:
        directory: made if it is not there.
        silos: whose contributions are in it.
        metrics: joint held-out metrics for the card, if any were measured.
    """
    parameters = dict(base.model.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            parameter = parameters[name]
            parameter.copy_(torch.from_numpy(parameter.numpy().astype(np.float64) + delta))
    base.model.save_pretrained(directory, safe_serialization=True)
    base.tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card(plan, silos, metrics), encoding="utf-8")


def card(plan: Plan, silos: Sequence[str], metrics: Mapping[str, float] | None) -> str:
    """Return the model card, made from the plan."""
    lines = ["---", *_front_matter(plan), "---", "", f"# {plan.plan.name}", ""]
    lines += [
        f"`{plan.model.base}`, fine-tuned separately at {len(silos)} silos ({', '.join(silos)}) and merged "
        f"in one exchange by RegMean (Jin et al., ICLR 2023) with gramfuse: alpha {plan.merge.alpha}, "
        f"{plan.merge.weighting} weighting. The silos' data was not pooled; "
        + (
            "the coordinator saw sums over the silos only (secure aggregation)."
            if plan.privacy.secure_aggregation
            else "the coordinator saw each silo's statistics."
        ),
        "",
        f"Plan digest: `{plan.digest}`",
        "",
        "```python",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        'model = AutoModelForSequenceClassification.from_pretrained("path/to/this/directory")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
        "```",
        "",
    ]
    if metrics:
        lines += ["On the silos' held-out examples together:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
        lines += [""]
    lines += ["The plan:", "", "```toml", plan.to_toml().strip(), "```", ""]
    return "\n".join(lines)


def _front_matter(plan: Plan) -> list[str]:
    base = plan.model.base
    hub_id = BUNDLED[base].hub_id if base in BUNDLED else base
    # A directory of whoever merged says nothing to others.
    public = base in BUNDLED or not base.startswith((".", "/", "~"))
    return [
        *([f"base_model: {hub_id}"] if public else []),
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "tags:",
        "- gramfuse",
        "- regmean",
        "- merge",
        "- federated-learning",
    ]
