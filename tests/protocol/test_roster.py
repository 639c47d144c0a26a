"""The terms of a secure sum: which plans are safe, which are refused, and what the refusal says."""

from __future__ import annotations

import itertools
import random

import pytest

from gramfuse_protocol.bounds import SILOS
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.roster import Roster, check_terms, smallest_threshold, tolerated
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.secure_sum.keys import Identity

KEYS = [Identity(random.Random(n).randbytes(32)).public.hex() for n in range(12)]


def plan_text(silos: int, privacy: str = "", keys: dict[int, str] | None = None) -> str:
    roster = "".join(
        f'\n[[silo]]\nname = "silo-{n}"\n' + (f'public-key = "{key}"\n' if (key := (keys or {}).get(n)) else "")
        for n in range(silos)
    )
    return (
        '[plan]\nname = "p"\n[model]\nbase = "bundled:minilm"\ntask = "classification"\nlabels = ["no", "yes"]\n'
        f"[privacy]\n{privacy}\n{roster}"
    )


@pytest.mark.parametrize(
    ("silos", "colluding", "threshold", "may_drop"),
    [(3, 1, 3, 0), (4, 1, 3, 1), (5, 1, 4, 1), (10, 3, 7, 3), (3, 0, 2, 1), (4, 0, 3, 1), (12, 1, 7, 5)],
)
def test_the_smallest_threshold_and_how_many_may_drop_out(
    silos: int, colluding: int, threshold: int, may_drop: int
) -> None:
    assert smallest_threshold(silos, colluding) == threshold
    assert silos - threshold == may_drop
    check_terms(silos, colluding, threshold, threshold)
    plan = Plan.parse(plan_text(silos, f"colluding = {colluding}"))
    assert (plan.threshold, plan.minimum_survivors) == (threshold, threshold)


def test_every_set_of_terms_is_accepted_exactly_if_it_is_safe() -> None:
    for n, c, t, m in itertools.product(range(1, 9), range(9), range(1, 10), range(1, 10)):
        # Two stories that both find t shares of one secret need t silos each. Those that follow the protocol are in
        # one of them, the c others in both: that must not work out. And a sum has two honest silos, or hides nothing.
        two_stories = any(first + c >= t and (n - c - first) + c >= t for first in range(n - c + 1)) or c >= t
        safe = n >= 3 and c <= n and not two_stories and t <= n and t <= m <= n and m - c >= 2
        if safe:
            check_terms(n, c, t, m)
        else:
            with pytest.raises(ValueError, match=r"'privacy\.|hides nothing"):
                check_terms(n, c, t, m)


def test_the_smallest_threshold_is_the_smallest_by_trying() -> None:
    for n, c in itertools.product(range(1, 60), range(60)):
        assert smallest_threshold(n, c) == next(t for t in range(200) if 2 * t > n + c)


def test_what_safe_terms_tolerate_is_the_most_that_they_do() -> None:
    def safe(n: int, c: int, t: int, m: int) -> bool:
        try:
            check_terms(n, c, t, m)
        except ValueError:
            return False
        return True

    for n, t, m in itertools.product(range(3, 13), range(1, 13), range(1, 13)):
        if safe(n, 0, t, m):
            assert tolerated(n, t, m) == {
                "dropouts": max(gone for gone in range(n) if n - gone >= t and n - gone >= m),
                "colluding": max(c for c in range(n) if safe(n, c, t, m)),
            }


def test_the_number_of_silos_is_bounded() -> None:
    check_terms(SILOS, 1, 513, 513)
    with pytest.raises(ValueError, match=r"1024 silos.*1025"):
        check_terms(SILOS + 1, 1, 514, 514)


@pytest.mark.parametrize(
    ("silos", "privacy", "told"),
    [
        (1, "", "secure aggregation of 1 silos hides nothing"),
        (2, "", "secure aggregation of 2 silos hides nothing.*at least three"),
        (2, "colluding = 0", "secure aggregation of 2 silos hides nothing"),
        (4, "threshold = 2", r"'privacy\.threshold' = 2 is not safe with 4 silos and 1 colluding.*set it to 3 or more"),
        (5, "threshold = 3", r"'privacy\.threshold' = 3 is not safe.*set it to 4"),
        (10, "colluding = 3\nthreshold = 6", r"'privacy\.threshold' = 6 is not safe"),
        (4, "threshold = 5", r"'privacy\.threshold' = 5 is more than the 4 silos"),
        (4, "threshold = 0", r"'privacy\.threshold'"),
        (4, "threshold = -1", r"'privacy\.threshold'"),
        (5, "minimum-survivors = 3", r"'privacy\.minimum-survivors' = 3 .*4"),
        (5, "minimum-survivors = 0", r"'privacy\.minimum-survivors'"),
        (5, "minimum-survivors = 6", r"'privacy\.minimum-survivors' = 6 is more than the 5 silos"),
        (4, "colluding = 4", r"'privacy\.colluding' = 4 .*4 silos"),
        (
            3,
            "colluding = 2",
            r"'privacy\.colluding' = 2 of 3",
        ),
        (4, "colluding = -1", r"'privacy\.colluding'"),
    ],
)
def test_a_plan_on_unsafe_terms_is_refused_and_the_key_is_named(silos: int, privacy: str, told: str) -> None:
    with pytest.raises(PlanError, match=rf"^plan\.toml: .*{told}"):
        Plan.parse(plan_text(silos, privacy), "plan.toml")


def test_secure_aggregation_is_what_a_plan_means_unless_it_says_otherwise() -> None:
    text = plan_text(2).replace("[privacy]\n", "")
    with pytest.raises(PlanError, match="hides nothing"):
        Plan.parse(text)
    assert Plan.parse(plan_text(4).replace("[privacy]\n", "")).privacy.secure_aggregation
    # Only a plan that says so is open; then every silo must be there unless it says less.
    open_plan = Plan.parse(plan_text(2, "secure-aggregation = false"))
    assert open_plan.minimum_survivors == 2
    with pytest.raises(PlanError, match=r"'privacy\.minimum-survivors' .*2 silos"):
        Plan.parse(plan_text(2, "secure-aggregation = false\nminimum-survivors = 3"))


@pytest.mark.parametrize(
    ("privacy", "threshold", "minimum"),
    [
        ("", 4, 4),
        ("threshold = 5", 5, 5),
        ("minimum-survivors = 6", 4, 6),
        ("threshold = 5\nminimum-survivors = 6", 5, 6),
        ("colluding = 0", 4, 4),
        ("colluding = 2", 5, 5),
    ],
)
def test_what_is_left_out_is_the_least_that_is_safe(privacy: str, threshold: int, minimum: int) -> None:
    plan = Plan.parse(plan_text(6, privacy, dict(enumerate(KEYS))))
    roster = plan.roster
    assert (plan.threshold, plan.minimum_survivors) == (threshold, minimum)
    assert roster == Roster(plan.digest, {f"silo-{n}": bytes.fromhex(KEYS[n]) for n in range(6)}, threshold, minimum)
    assert roster.floor == minimum
    assert roster.names == plan.names
    assert [roster.index(name) for name in roster.names] == [1, 2, 3, 4, 5, 6]


def test_silos_without_a_key_are_named_before_anything_is_sent() -> None:
    plan = Plan.parse(plan_text(4, keys={0: KEYS[0], 2: KEYS[2]}))
    with pytest.raises(PlanError, match=r"silo-1, silo-3; .*gramfuse silo keygen"):
        _ = plan.roster


def test_a_key_that_two_silos_share_is_refused() -> None:
    with pytest.raises(PlanError, match=r"\[\[silo\]\] .*silo-0.*silo-3.*public-key"):
        Plan.parse(plan_text(4, keys={0: KEYS[0], 1: KEYS[1], 3: KEYS[0]}))


def test_keys_and_terms_are_in_the_digest() -> None:
    keys = dict(enumerate(KEYS))
    texts = [
        plan_text(6, "", keys),
        plan_text(6, "", {**keys, 3: KEYS[9]}),
        plan_text(6, "", {**keys, 3: KEYS[4], 4: KEYS[3]}),
        plan_text(6, "threshold = 5", keys),
        plan_text(6, "minimum-survivors = 5", keys),
        plan_text(6, "colluding = 0", keys),
    ]
    assert len({Plan.parse(text).digest for text in texts}) == len(texts)
