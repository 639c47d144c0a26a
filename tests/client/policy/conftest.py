"""A silo that took part in nothing yet, under the most careless umask there is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract.plan import Plan
from tests.client.policy.silos import Site


@pytest.fixture
def site(pico_project: Callable[..., Any]) -> Callable[..., Site]:
    """Return a function that makes a Site; its arguments are settings of the plan."""

    def make(*settings: str) -> Site:
        project = pico_project(silos=1)
        plan = Plan.read(project.plan).override(["training.epochs=1", *settings])
        base = load_base(plan, project.directory)
        layout = plan_layout(plan, base)
        plan = plan.pinned(base.pins, layout.digest)
        site = Site(project.silo("silo-a"), plan, layout)
        site.edit("approved = []", f'approved = ["{plan.digest}"]')
        return site

    return make


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    # The most careless umask there is: what is private must be so by the code's own doing.
    before = os.umask(0)
    yield
    os.umask(before)
