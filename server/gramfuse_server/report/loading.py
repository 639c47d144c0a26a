"""How to load what a run wrote, as lines of Python."""

from __future__ import annotations

import json
from pathlib import PurePath

from gramfuse_model.loading.source import hub_id
from gramfuse_server.report.schema import Report


def loading_of(report: Report, directory: str = "") -> str:
    """Return code that loads a run's model; where it wrote an adapter too, its adapter.

    Args:
        directory: the run directory, as a path to show.
    """
    place = PurePath(directory)
    if "adapter" in report.outputs:
        return load_adapter(report.auto_class, report.base.name, str(place / "adapter"))
    return load_model(report.auto_class, str(place / "model"))


def loading_of_files(report: Report) -> str:
    """Return code that loads what a merge of files wrote, from the directory of its report."""
    auto = report.silos[0].auto_class or ""
    if report.outputs == ("adapter",):
        return load_adapter(auto, report.base.name, ".")
    return load_model(auto, ".")


def load_model(auto: str, place: str) -> str:
    """Return code that loads a model with one of transformers' automatic classes."""
    return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({_literal(place)})"


def load_adapter(auto: str, base: str, place: str) -> str:
    """Return code that loads an adapter onto its base, which may have another head and other settings.

    Args:
        base: as named in a plan.
    """
    return (
        f"from peft import PeftModel\nfrom transformers import AutoConfig, {auto}\n\n"
        f"config = AutoConfig.from_pretrained({_literal(place)})\n"
        f"base = {auto}.from_pretrained({_literal(hub_id(base))}, config=config)\n"
        f"model = PeftModel.from_pretrained(base, {_literal(place)})"
    )


def _literal(text: str) -> str:
    """Return a text, which others may have written, as a string literal of Python that it cannot break out of."""
    return json.dumps(text)
