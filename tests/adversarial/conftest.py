"""The coordinator that lies, and a base model that detects words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from gramfuse_model.project import Project
from tests.adversarial.liar import SPYING, Detector, Liar


@pytest.fixture
def liar(pico_project: Callable[..., Any], tmp_path: Path) -> Callable[..., Liar]:
    """Return a function that makes a project of silos under a secure plan, and the coordinator that lies to them.

    `change(project)` may change files before the plan is locked; settings are those of the plan.
    """

    def make(
        *settings: str,
        silos: int = 4,
        examples: int = 24,
        base: Path | None = None,
        change: Callable[[Any], None] = lambda project: None,
        name: str = "pico",
        **limits: Any,
    ) -> Liar:
        more = {} if base is None else {"base": base}
        project = pico_project(silos=silos, examples=examples, secure=True, name=name, **more)
        change(project)
        plan, layout = Project.read(project.directory, (*SPYING, *settings)).locked()
        return Liar(project, tmp_path / f"{name}-state", plan, layout, **limits)

    return make


@pytest.fixture
def detector(tmp_path: Path, pico_tokenizer: PreTrainedTokenizerFast) -> Detector:
    return Detector(tmp_path / "wide", pico_tokenizer)
