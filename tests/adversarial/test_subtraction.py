"""A coordinator that subtracts the sums of two plans, to read what one of them holds and the other does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
from tests.adversarial.conftest import METRICS, STATISTICS, Liar

from gramfuse_client.releases import Releases
from gramfuse_protocol import messages as m

MakeLiar = Callable[..., Liar]


def later(lied: Liar, version: int, *settings: str) -> Liar:
    """The same silos under another version of the plan."""
    plan = lied.plan.override((f"plan.version={version}", *settings))
    pins = {"sha256": lied.plan.model.sha256, "layout": lied.plan.merge.layout}
    model = lied.plan.model.model_copy()
    return lied.under(plan.model_copy(update={"model": model, "merge": lied.plan.merge}) if pins else plan)


def survive(lied: Liar, names: Sequence[str], members: Sequence[str] | None = None) -> set[str]:
    """Go as far as the list of survivors, and return the errors of those who do not sign."""
    about, members = lied.about(), members or lied.names
    lied.honest(("join", "train", *STATISTICS[:3]), about, members)
    replies = {name: lied.ask(name, m.SurvivorsRequest(**about, sum_of="statistics", survivors=tuple(names)))
               for name in names}  # fmt: skip
    lied.replies["survivors"] = replies
    refused = [reply for reply in replies.values() if isinstance(reply, m.Refusal)]
    assert not refused or len(names) - len(refused) < lied.plan.threshold, "who was in no sum may sign, and opens none"
    return {reply.error for reply in refused}


def test_a_drop_out_in_one_version_and_none_in_the_next(liar: MakeLiar) -> None:
    """Sum 2 less sum 1 is silo-d's own part: its S, T, M and counts, to the last digit."""
    first = liar(silos=4)
    assert survive(first, first.names[:3], first.names) == set()
    second = later(first, 2)
    assert survive(second, second.names) == {"FailureError"}
    for name in second.names:  # and it stays so
        assert second.ask(name, m.UnmaskRequest(**second.about(), sum_of="statistics", signatures={})).error in (
            "FailureError", "SecurityError"
        )  # fmt: skip


def test_the_same_silos_may_sum_again(liar: MakeLiar) -> None:
    first = liar(silos=4)
    assert survive(first, first.names[:3], first.names) == set()
    second = later(first, 2)
    assert survive(second, second.names[:3], second.names) == set()


def test_silos_are_known_by_their_keys_and_not_by_their_names(liar: MakeLiar) -> None:
    """Version 2 gives all silos other names, so that the lists of survivors seem to have nothing in common."""
    first = liar(silos=4)
    assert survive(first, first.names[:3], first.names) == set()
    plan = later(first, 2).plan
    renamed = {name: f"other-{name}" for name in plan.names}
    silos = tuple(silo.model_copy(update={"name": renamed[silo.name]}) for silo in plan.silo)
    second = first.under(plan.model_copy(update={"silo": silos}))
    second.sources = {other: name for name, other in renamed.items()}
    assert survive(second, second.names) == {"FailureError"}


@pytest.mark.parametrize("kept", ["all", "one", "none"])
def test_rows_are_known_one_by_one_whatever_their_case_or_label(liar: MakeLiar, kept: str) -> None:
    """The owners have new data, of which some rows are old ones: in capitals, and with another label."""
    first = liar(silos=4)
    assert survive(first, first.names[:3], first.names) == set()
    for name in first.names:
        path = first.project.train(name)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        old = {"all": rows, "one": rows[:1], "none": []}[kept]
        changed = [{"text": f" {row['text'].upper()}  ", "label": "kitchen"} for row in old]
        new = [{"text": f"{row['text']} near my old hen", "label": row["label"]} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in (*changed, *new)))
    second = later(first, 2)
    assert survive(second, second.names) == (set() if kept == "none" else {"FailureError"})


def test_a_difference_of_many_silos_is_no_single_silos_part(liar: MakeLiar) -> None:
    """With one colluding silo, sums that differ by three show no single one; by two they may."""
    first = liar(silos=7)
    assert survive(first, first.names[:4], first.names) == {"SecurityError"}, "five must survive of seven"
    five = later(first, 2)
    assert survive(five, five.names[:5], five.names) == set()
    apart = later(first, 3)  # five others: it differs by four
    assert survive(apart, apart.names[2:], apart.names) == set()
    for version, names in ((4, first.names[:6]), (5, first.names)):
        other = later(first, version)
        assert survive(other, names, other.names) == {"FailureError"}


def test_the_metrics_of_two_plans_are_bound_in_the_same_way(liar: MakeLiar) -> None:
    """The statistics are of the same silos in both; one is missing in the first sum of metrics."""
    first = liar(silos=4)
    outcomes = []
    for lied, names in ((first, first.names[:3]), (later(first, 2), first.names)):
        about = lied.about()
        lied.contribute(about)
        for name in lied.names:
            for candidate in lied.plan.privacy.candidates:
                lied.measure(name, about, lied.zero(), candidate)
        lied.honest(METRICS[:1], about)
        asked = m.SurvivorsRequest(**about, sum_of="metrics", survivors=tuple(names))
        outcomes.append([getattr(lied.ask(name, asked), "error", "signed") for name in names])
    assert outcomes[0] == ["signed"] * 3
    assert outcomes[1] == ["FailureError"] * 3 + ["signed"], "silo-d was in no sum before, and alone it opens none"


def test_an_owner_may_take_the_risk_and_may_forget(liar: MakeLiar) -> None:
    first = liar(silos=4)
    assert survive(first, first.names[:3], first.names) == set()
    willing = later(first, 2)
    willing.limits = {"differing_survivors": True}
    assert survive(willing, willing.names) == set()
    third = later(first, 3)
    for name in third.names:
        assert Releases(third.silo(name).state / "releases").clear() == 2 - (name == "silo-d")
    assert survive(third, third.names) == set()


def test_a_lost_salt_is_no_way_round(liar: MakeLiar) -> None:
    """Without its salt, a silo could not tell its rows again; it says so by a failure, and does not draw another."""
    first = liar(silos=4)
    assert survive(first, first.names[:3], first.names) == set()
    second = later(first, 2)
    for name in second.names:
        (second.silo(name).state / "releases" / "salt").unlink(missing_ok=True)
    about = second.about()
    second.honest(("join",), about)
    assert second.train("silo-a", about).error == "FailureError"
