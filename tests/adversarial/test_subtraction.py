"""A coordinator that subtracts the sums of two plans, to read what one of them holds and the other does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from gramfuse_client.guard.releases import Releases
from gramfuse_client.silo_file import write_identity
from gramfuse_model.project import Project
from gramfuse_protocol.messages import phases as m
from gramfuse_protocol.secure_sum.keys import Identity
from tests.adversarial.liar import METRICS, SPYING, STATISTICS, Liar

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


def locked_again(first: Liar, edit: Callable[[str], str], *settings: str) -> Liar:
    """The same silos under a second version of the plan file, which is locked anew."""
    path = first.project.plan
    path.write_text(edit(path.read_text()))
    plan, layout = Project.read(first.project.directory, (*SPYING, "plan.version=2", *settings)).locked()
    return Liar(first.project, first.place, plan, layout, **first.limits)


@pytest.mark.parametrize("renewed", [("silo-b",), ("silo-a", "silo-b", "silo-c", "silo-d")])
def test_new_keys_make_no_other_silos(liar: MakeLiar, renewed: tuple[str, ...]) -> None:
    """Each new key looks like one silo less and one more, so that the drop-out of silo-d drowns in the difference."""
    first = liar(silos=4)
    assert survive(first, first.names) == set()
    plan, keys = later(first, 2).plan, {}
    for name in renewed:
        identity = Identity(hashlib.sha256(f"new {name}".encode()).digest())
        first.project.identity(name).unlink()
        write_identity(first.project.identity(name), identity)
        keys[name] = identity.public.hex()
    silos = tuple(
        silo.model_copy(update={"public_key": keys[silo.name]}) if silo.name in keys else silo for silo in plan.silo
    )
    second = first.under(plan.model_copy(update={"silo": silos}))
    assert survive(second, second.names[:3], second.names) == {"FailureError"}


def test_a_pair_of_texts_is_known_by_either(liar: MakeLiar) -> None:
    """Plan 1 reads one text of each row, plan 2 two of them, as if they were other rows; silo-d drops out."""

    def second_texts(project: Any) -> None:
        for name in project.names:
            for path in (project.train(name), project.train(name).with_name("held-out.jsonl")):
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                path.write_text("".join(json.dumps({**row, "second": "my hen"}) + "\n" for row in rows))
            project.replace(project.silo(name), "[limits]", 'text-pair = "second"\n\n[limits]')

    first = liar(silos=4, change=second_texts)
    assert survive(first, first.names) == set()
    plan = later(first, 2).plan
    second = first.under(plan.model_copy(update={"model": plan.model.model_copy(update={"pair": True})}))
    assert survive(second, second.names[:3], second.names) == {"FailureError"}


def test_another_name_for_one_silo_is_another_start_of_its_head(liar: MakeLiar) -> None:
    """The others send what they sent before, to the last bit; the difference of the sums is silo-d's training."""
    first = liar("model.head=different", silos=4)
    assert survive(first, first.names) == set()
    second = locked_again(first, lambda text: text.replace('"silo-d"', '"silo-x"'), "model.head=different")
    second.sources = {"silo-x": "silo-d"}
    assert survive(second, second.names) == {"FailureError"}


def test_labels_of_one_silo_are_a_difference(liar: MakeLiar) -> None:
    """Plan 2 says of silo-d alone that it annotates fewer labels."""

    def without_kitchens(project: Any) -> None:
        project.replace(project.plan, "[privacy]\n", "[privacy]\nminimum-survivors = 4\n")
        for path in (project.train("silo-d"), project.train("silo-d").with_name("held-out.jsonl")):
            path.write_text(path.read_text().replace('"label": "kitchen"', '"label": "animals"'))

    first = liar(silos=4, change=without_kitchens)
    assert survive(first, first.names) == set()
    fewer = 'name = "silo-d"\nlabels = ["animals", "weather"]\n'
    second = locked_again(first, lambda text: text.replace('name = "silo-d"\n', fewer))
    assert survive(second, second.names) == {"FailureError"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("max-length = 16", "max-length = 6"),
        ("[merge]", "[merge]\ntokens = 24"),
        ("batch-size = 8", "batch-size = 24"),
        ("[training]", "[training]\nseed = 2"),
    ],
)
def test_a_setting_that_only_one_silos_rows_feel_is_no_second_sum(liar: MakeLiar, before: str, after: str) -> None:
    """With the body frozen, silos whose rows a cap does not reach send the same again; the rest is one silo's."""
    first = liar(silos=4)
    assert survive(first, first.names) == set()
    second = locked_again(first, lambda text: text.replace(before, after, 1))
    assert second.plan.digest != later(first, 2).plan.digest
    assert survive(second, second.names) == {"FailureError"}


def test_other_training_of_the_same_rows_may_be_summed(liar: MakeLiar) -> None:
    """What changes every silo's numbers is nobody's part alone."""
    first = liar(silos=4)
    assert survive(first, first.names) == set()
    second = locked_again(first, lambda text: text.replace("learning-rate = 2e-3", "learning-rate = 1e-3"))
    assert survive(second, second.names) == set()
