"""What --compare can be asked for, and what it says to what it cannot do."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.documents import build
from gramfuse_protocol.errors import PlanError
from gramfuse_server.merging.methods.registry import METHODS
from gramfuse_simulation.terms import check_terms, parse_terms

CLASSES = {"task": "classification", "labels": ["x", "y"]}


def plan(silos: int = 2, *, head: str = "same", entries: tuple[dict[str, Any], ...] = (), **sections: Any) -> Plan:
    entries = entries or ({},) * silos
    document = {
        "plan": {"name": "p"},
        "model": {"base": "b", "head": head, **sections.pop("model", CLASSES)},
        "privacy": {"secure-aggregation": False, "metrics": "silo", **sections.pop("privacy", {})},
        "silo": [{"name": f"s{n}", **entry} for n, entry in enumerate(entries)],
        **sections,
    }
    return build(Plan, document, "plan")


def test_options_are_read_in_any_order_and_have_defaults() -> None:
    text = "fisher, fisher:9:model:soft ,fedavg:3,fedavg,task-arithmetic:0.5,ties:1,ties,simple,ensemble,fisher"
    terms = parse_terms(text)
    assert [(term.kind, dict(term.options)) for term in terms] == [
        ("fisher", {"variant": None, "norm": "per tensor", "examples": 256}),
        ("fisher", {"variant": "soft", "norm": "per model", "examples": 9}),
        ("fedavg", {"rounds": 3}),
        ("fedavg", {"rounds": 5}),
        ("task-arithmetic", {"scale": 0.5}),
        ("ties", {"density": 1.0}),
        ("ties", {"density": 0.2}),
        ("simple", {}),
        ("ensemble", {}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fishr", "ensemble, fedavg, fisher, joint, simple"),
        ("", "comparison ''"),
        ("fisher:0", "'fisher:0': '0'"),
        ("fisher:soft:hard", "'soft' and 'hard'"),
        ("fisher:8:16", "'8' and '16'"),
        ("fedavg:1.5", "'fedavg:1.5': rounds"),
        ("fedavg:0", "rounds"),
        ("ties:1.1", "density"),
        ("ties:0.2:0.3", "density"),
        ("task-arithmetic:nan", "scale must be one number"),
        ("joint:2", "start is silos or cold"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # its message is looked at
        parse_terms(text)
    assert message in str(raised.value)


OWN_TASKS = {
    "model": {},
    "head": "own",
    "task": [{"name": "t", **CLASSES}],
    "entries": ({"task": "t"},) * 2,
}

MASKED = {"entries": ({"labels": ["x"]}, {"labels": ["y"]})}


@pytest.mark.parametrize(
    ("terms", "about", "message"),
    [
        (
            "fisher:soft,simple,joint",
            {"silos": 4, "privacy": {"secure-aggregation": True}},
            "fisher:soft,joint: .*--open",
        ),
        ("best", {"privacy": {"metrics": "none"}}, "best: .*--set privacy.metrics=sum"),
        ("ties,fedavg", {"merge": {"rounds": 2}}, "ties: .*merge.rounds=1"),
        ("ensemble,fisher,joint", OWN_TASKS, "ensemble,joint: .*tasks"),
        ("fedavg", {"head": "own"}, "fedavg: .*heads stay"),
        ("joint,fedavg", MASKED, "fedavg: .*labels"),
        ("joint", MASKED, "joint: .*labels"),
        ("transport", {"silos": 3}, "transport: .*two silos"),
        ("fisher:hard", {"model": {"task": "regression"}}, "'regression' .*fisher:hard"),
    ],
)
def test_what_a_plan_does_not_allow_is_refused_with_what_to_do(terms: str, about: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_terms(parse_terms(terms), plan(**about))


def test_all_else_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = parse_terms(",".join(METHODS))
    check_terms(everything, plan())
    check_terms(parse_terms("simple"), plan(silos=4, privacy={"secure-aggregation": True}))
    check_terms(parse_terms("fedavg:2,joint"), plan(merge={"rounds": 2}))
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(PlanError, match="pip install"):
        check_terms(everything, plan())


@pytest.mark.parametrize(
    "text", ["joint", "joint:cold", "fedavg:2", "refit", "refit:simple", "best", "fisher", "ensemble"]
)
def test_without_training_only_what_needs_none_can_be_compared_with(text: str) -> None:
    untrained = plan(training={"epochs": 0}, head="fitted")
    with pytest.raises(PlanError, match=r"training\.epochs"):
        check_terms(parse_terms(text), untrained)
    check_terms(parse_terms("probe,probe:mean"), untrained)
