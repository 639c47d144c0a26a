"""`--set`: what a setting changes, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Pins
from gramfuse_protocol.errors import PlanError
from tests.protocol.plan.plans import SMALL

PINS = Pins("1" * 64, "3" * 64, "4" * 64)


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("merge.alpha=1.0", ("merge", "alpha"), 1.0),
        ("merge.alpha=1", ("merge", "alpha"), 1.0),
        ("merge.weighting=examples", ("merge", "weighting"), "examples"),
        ('merge.weighting = "examples"', ("merge", "weighting"), "examples"),
        ("model.base=bundled:minilm", ("model", "base"), "bundled:minilm"),
        ("model.base=some/path=odd", ("model", "base"), "some/path=odd"),
        ('training.freeze=["*embeddings*", "a=b"]', ("training", "freeze"), ["*embeddings*", "a=b"]),
        ("training.learning-rate=1e-3", ("training", "learning-rate"), 1e-3),
        ("training.seed=0x10", ("training", "seed"), 16),
        ("model.pair=true", ("model", "pair"), True),
        ('merge.gram={"*" = "block:4"}', ("merge", "gram"), {"*": "block:4"}),
        ("merge.gram.*=diagonal", ("merge", "gram", "*"), "diagonal"),
    ],
)
def test_a_setting_changes_its_key_and_nothing_else(setting: str, path: tuple[str, ...], value: Any) -> None:
    plan = Plan.parse(SMALL)
    expected = plan.document()
    table = expected
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    assert plan.override([setting]).document() == expected


def test_settings_are_applied_in_order_and_together() -> None:
    plan = Plan.parse(SMALL).override(
        ["merge.alpha=0.1", 'model.labels=["x"]', 'model.labels=["x", "y"]', "merge.alpha=0"]
    )
    assert plan.merge.alpha == 0
    assert plan.model.labels == ("x", "y")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("merge.alpha", "expected section.key=value"),
        ("alpha=1", "expected section.key=value"),
        (
            "merge.nope=1",
            "unknown key 'merge.nope'; known here: method, refit, alpha, weighting, gram, exclude, context-free, "
            "experts, tokens, rounds, maximum-change, layout",
        ),
        ("nope.alpha=1", "unknown key 'nope'"),
        ("training.learning_rate=1.0", "unknown key 'training.learning_rate'; did you mean 'learning-rate'?"),
        ("merge.alpha.deep=1", "'merge.alpha' is not a section"),
        ("silo.0.name=x", "'silo.0' is not a section"),
        ("merge.alpha=high", "'merge.alpha'"),
        ("merge.alpha=", "'merge.alpha'"),
        ("merge.alpha=2", "'merge.alpha'"),
        ("training.freeze=[", "'training.freeze'"),
        ("privacy.secure-aggregation=true", "secure aggregation of 2 silos hides nothing"),
        ("privacy.minimum-survivors=3", "'privacy.minimum-survivors'"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_and_quoted(setting: str, message: str) -> None:
    plan = Plan.parse(SMALL)
    with pytest.raises(PlanError) as caught:
        plan.override([setting])
    assert str(caught.value).startswith(f"--set {setting}: ")
    assert message in str(caught.value)


def test_settings_remove_the_lock_and_no_settings_keep_it() -> None:
    locked = Plan.parse(SMALL).with_head("same").pinned(PINS, "2" * 64)
    assert locked.locked
    assert (locked.pins, locked.merge.layout) == (PINS, "2" * 64)
    assert locked.override([]) == locked
    changed = locked.override(["training.epochs=7"])
    assert not changed.locked
    assert (changed.pins, changed.merge.layout) == (Pins(None, None, None), None)
    assert changed == Plan.parse(SMALL).with_head("same").override(["training.epochs=7"])


def test_a_commit_stays_with_its_base_model() -> None:
    locked = Plan.parse(SMALL).with_head("same").pinned(PINS._replace(revision="a" * 40), "2" * 64)
    assert locked.unlocked().pins == locked.override(["merge.tokens=7"]).pins == Pins(None, None, None, "a" * 40)
    assert locked.override(['model.base="other"']).model.revision is None
    assert locked.override([f'model.revision="{"b" * 40}"', 'model.base="other"']).model.revision == "b" * 40


@pytest.mark.parametrize("missing", [*PINS._fields[:3], "layout"])
def test_a_lock_with_a_part_missing_is_no_lock(missing: str) -> None:
    pins = PINS._replace(**({} if missing == "layout" else {missing: None}))
    assert not Plan.parse(SMALL).with_head("same").pinned(pins, None if missing == "layout" else "2" * 64).locked
