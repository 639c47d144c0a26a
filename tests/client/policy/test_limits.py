"""Plans beyond the silo file are refused by its key."""

from __future__ import annotations

import itertools
from datetime import datetime, time
from pathlib import Path

import pytest

from gramfuse_client.guard.policy import check_examples, check_hours, check_plan, refusals
from gramfuse_client.silo_file import Coordinator, Limits, Silo
from gramfuse_protocol.contract.node_key import generate
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import RefusalError
from tests.client.policy.silos import PATH, PLAN, UNLOCKED, WITH_SILO_METRICS, quotes_nothing, willing


def test_a_plan_within_the_silos_limits_is_accepted() -> None:
    check_plan(willing(), PLAN)
    check_plan(willing(metrics="silo"), WITH_SILO_METRICS)
    check_plan(willing(metrics="silo"), PLAN)
    check_examples(willing(minimum_examples=10), 10)


@pytest.mark.parametrize(
    ("silo", "plan", "key"),
    [
        (willing(approved=()), PLAN, "'approved'"),
        (willing(approved=("3" * 64,)), PLAN, "'approved'"),
        (willing(name="silo-b"), PLAN, "'name'"),
        (willing(), UNLOCKED, "plan lock"),
        (willing(open_uploads=False), PLAN, "'limits.open-uploads'"),
        (willing(metrics="none"), PLAN, "'limits.metrics'"),
        (willing(metrics="sum"), WITH_SILO_METRICS, "'limits.metrics'"),
    ],
    ids=[
        "nothing approved",
        "another plan approved",
        "not in the roster",
        "unlocked",
        "open",
        "no metrics",
        "sum only",
    ],
)
def test_a_plan_beyond_the_silo_file_is_refused_by_its_key(silo: Silo, plan: Plan, key: str) -> None:
    with pytest.raises(RefusalError) as caught:
        check_plan(silo, plan)
    assert str(caught.value).startswith(f"{PATH}: ")
    assert key in str(caught.value)
    quotes_nothing(caught.value.reason, [str(PATH), *silo.file.approved, silo.name])


@pytest.mark.parametrize(("asked", "allowed"), [*itertools.product(("mean", "diagonal", "full"), repeat=2)])
def test_a_secure_plan_gets_of_layers_without_context_what_the_silo_file_allows(asked: str, allowed: str) -> None:
    plan = PLAN.override([f'merge.context-free="{asked}"'])
    secure = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"secure_aggregation": True})})
    silo = willing(context_free=allowed)
    order = ("mean", "diagonal", "full")
    found = dict(refusals(silo, secure))
    assert ("vocabulary" in found) == (order.index(asked) > order.index(allowed))
    assert "vocabulary" not in dict(refusals(silo, plan)), "in open mode the coordinator sees all of it anyway"
    for error in (found[key] for key in found if key == "vocabulary"):
        assert isinstance(error, RefusalError)
        assert "'limits.context-free'" in str(error)
        assert f'context-free = "{asked}"' in str(error)
        quotes_nothing(error.reason, [str(PATH), silo.name])


def test_too_few_examples_are_refused_by_the_key_and_not_counted_for_the_coordinator() -> None:
    with pytest.raises(RefusalError) as caught:
        check_examples(willing(minimum_examples=58), 57)
    assert str(caught.value).startswith(f"{PATH}: 57 training examples")
    assert "'limits.minimum-examples' = 58" in str(caught.value)
    quotes_nothing(caught.value.reason, [str(PATH), "57", "58"])


@pytest.mark.parametrize(
    ("hours", "within", "outside"),
    [
        ("08:00-17:30", ["08:00", "12:00", "17:29:59.999999"], ["17:30", "23:00", "00:00", "07:59:59.999999"]),
        (
            "20:00-06:00",
            ["20:00", "23:59:59.999999", "00:00", "05:59:59.999999"],
            ["06:00", "12:00", "19:59:59.999999"],
        ),
        ("22:00-00:00", ["22:00", "23:59:59.999999"], ["00:00", "21:59:59.999999"]),
    ],
)
def test_a_silo_trains_from_the_start_of_its_hours_until_before_their_end(
    hours: str, within: list[str], outside: list[str]
) -> None:
    silo = willing(train_hours=hours)
    for moment in within:
        check_hours(silo, datetime.combine(datetime(2030, 1, 31), time.fromisoformat(moment)))
    for moment in outside:
        with pytest.raises(RefusalError) as caught:
            check_hours(silo, datetime.combine(datetime(2030, 1, 31), time.fromisoformat(moment)))
        assert str(caught.value).startswith(f"{PATH}: it is {moment[:5]}, ")
        assert f"'limits.train-hours' = {hours}" in str(caught.value)
        assert hours in caught.value.reason
        quotes_nothing(caught.value.reason, [str(PATH), silo.name])


def test_a_node_key_that_is_not_the_rosters_is_refused(tmp_path: Path) -> None:
    def silo(name: str, plan: Plan) -> Silo:
        coordinator = Coordinator(address="merge.example.org:9092")
        return Silo(tmp_path / name, willing(approved=(plan.digest,), coordinator=coordinator).file)

    keys = {name: generate() for name in ("silo-a", "other")}
    for name, (private, _) in keys.items():
        (tmp_path / f"{name}.key").touch(mode=0o600)
        (tmp_path / f"{name}.key").write_text(private)
    entry = PLAN.silo[0].model_copy(update={"node_key": keys["silo-a"][1]})
    plan = PLAN.model_copy(update={"silo": (entry,)})
    check_plan(silo("silo-a.toml", plan), plan)
    with pytest.raises(RefusalError) as caught:
        check_plan(silo("other.toml", plan), plan)
    assert f"another node key for 'silo-a' than {tmp_path / 'other.key'}" in str(caught.value)
    assert str(caught.value).endswith(f"here is {keys['other'][1]}")
    quotes_nothing(caught.value.reason, [str(tmp_path), "silo-a", *(line.split()[1] for _, line in keys.values())])
    # Who connects in another way has no such key, and a plan may leave it out.
    check_plan(willing(approved=(plan.digest,)), plan)
    check_plan(silo("third.toml", PLAN), PLAN)


def test_limits_are_strict_unless_the_silo_file_loosens_them() -> None:
    strict = Silo(PATH, willing().file.model_copy(update={"limits": Limits()}))
    with pytest.raises(RefusalError, match=r"limits\.open-uploads"):
        check_plan(strict, PLAN)
    with pytest.raises(RefusalError, match=r"limits\.minimum-examples"):
        check_examples(strict, 99)
