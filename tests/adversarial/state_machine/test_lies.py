"""Each lie meets SecurityError that says what is wrong, leaves the state as it was, and tells no secret."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest

from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.masks import apply
from gramfuse_protocol.secure_sum.statements import SUMS
from tests.adversarial.state_machine.lies import LIES, Lie
from tests.adversarial.state_machine.stage import LOW_ORDER, NAMES, Stage, all_states, assert_tells_no_secret, unmasking


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named_changes_nothing_and_brings_no_secret_to_light(lie: Lie, at: Stage, elsewhere: Stage) -> None:
    states = all_states(at)
    before = copy.deepcopy(states)
    with pytest.raises(SecurityError) as caught:
        lie.tell(at, elsewhere)
    text = str(caught.value)
    for told in (lie.told,) if isinstance(lie.told, str) else lie.told:
        assert told in text
    assert caught.value.reason == text
    assert caught.value.__cause__ is None
    assert_tells_no_secret(text, at, elsewhere)
    assert states == before


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("place", ["channel", *SUMS])
def test_a_public_key_of_low_order_is_refused_though_it_is_signed(place: str, point: str, at: Stage) -> None:
    change = {"channel": point} if place == "channel" else {"masks": {**at.adverts["d"].masks, place: point}}
    adverts = [at.advert("d", **change) if n == "d" else advert for n, advert in at.adverts.items()]
    for name in ("a", "e"):
        before = copy.deepcopy(at.invited[name])
        with pytest.raises(SecurityError, match=r"silo 'd' .*forged"):
            secure_sum.share(at.roster, at.invited[name], adverts, random.Random(9).randbytes)
        assert at.invited[name] == before


def test_after_all_lies_the_same_states_finish_an_honest_session(at: Stage, elsewhere: Stage) -> None:
    for parameter in LIES:
        with pytest.raises(SecurityError):
            parameter.values[0].tell(at, elsewhere)
    inputs = {name: np.arange(1, 5, dtype=np.uint64) * np.uint64(10**k) for k, name in enumerate(NAMES)}
    total = np.zeros(4, np.uint64)
    for name in at.survivors:
        masked = inputs[name].copy()
        apply(masked, at.contribute(at.signed[name])[1])
        total += masked
    shares = {n: secure_sum.release(at.roster, at.signed[n], "statistics", at.signatures) for n in at.survivors}
    apply(total, unmasking(at, shares))
    assert total.tolist() == [1111, 2222, 3333, 4444]  # each silo once, and the dead one not
