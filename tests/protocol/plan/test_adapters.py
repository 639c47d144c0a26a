"""Adapters in a plan: which keys and values it takes, and which kinds of adapters it refuses with the reason."""

from __future__ import annotations

import pytest

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import PlanError
from tests.protocol.plan.plans import SMALL

SECTION = "\n[training.lora]\n"


def test_one_target_may_be_a_text_and_an_empty_section_takes_the_defaults() -> None:
    assert Plan.parse(SMALL + SECTION + 'targets = "query"').training.lora.targets == ("query",)
    assert Plan.parse(SMALL + SECTION + 'targets = ["query"]').digest == (
        Plan.parse(SMALL + SECTION + 'targets = "query"').digest
    )
    assert Plan.parse(SMALL + SECTION).outputs == ("adapter",)
    assert Plan.parse(SMALL).outputs == ("model",)


@pytest.mark.parametrize(("alpha", "rslora", "scale"), [(32, "false", 8.0), (32, "true", 16.0)])
def test_the_scale_of_adapters(alpha: int, rslora: str, scale: float) -> None:
    lora = Plan.parse(f"{SMALL}{SECTION}rank = 4\nalpha = {alpha}\nrslora = {rslora}").training.lora
    assert lora.scale == scale


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("dora = true", "DoRA"),
        ("lora-bias = true", "bias"),
        ("dropout = 0.1", "masks"),
        ('init = "pissa"', "weights"),
        ('init = "OLoRA"', "weights"),
        ('init = "eva"', "data"),
        ('init = "zeros"', "init"),
        ("rank = 0", "rank"),
        ("alpha = 0", "alpha"),
        ("targets = []", "targets"),
        ('output = "full"', "output"),
        ("rnak = 8", "rank"),
    ],
)
def test_what_is_no_adapter_of_this_kind_is_refused_with_the_reason(line: str, named: str) -> None:
    with pytest.raises(PlanError, match=named):
        Plan.parse(SMALL + SECTION + line)


@pytest.mark.parametrize(
    ("setting", "named"),
    [("training.epochs=0", "epochs"), ('model.head="own"', "output")],
)
def test_adapters_that_nothing_trains_or_that_would_hold_a_silos_own_head_are_refused(setting: str, named: str) -> None:
    plan = Plan.parse(SMALL + SECTION)
    with pytest.raises(PlanError, match=named):
        plan.override([setting])
    plan.override(['model.head="own"', 'training.lora.output="merged"'])
