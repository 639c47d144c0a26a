"""What a state shows as text, what is gone from it, and states that are damaged."""

from __future__ import annotations

import pytest

from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.member import Member
from tests.adversarial.state_machine.stage import NAMES, Stage, all_states, assert_tells_no_secret


def test_no_text_form_of_a_state_shows_a_secret(at: Stage) -> None:
    for member in all_states(at):
        for thing in (member, member.secrets, [member], {"member": member}):
            for text in (repr(thing), str(thing), f"{thing}"):
                assert_tells_no_secret(text, at)
        assert member.advert.channel in repr(member)  # public keys may be read
    for name in NAMES:
        private = at.identities[name].to_pem().splitlines()[1]
        assert private not in repr(at.identities[name]) + str(at.identities[name])
        assert at.identities[name].public.hex() in repr(at.identities[name])
    for _, masks in (at.contribute(at.joined[n]) for n in NAMES):
        assert all(mask.key.hex() not in repr(masks) and repr(mask.key) not in repr(masks) for mask in masks)


def test_what_is_forgotten_is_gone_from_the_state(at: Stage) -> None:
    forgotten = secure_sum.forget(at.signed["a"], "statistics")
    text = forgotten.model_dump_json()
    state = at.signed["a"]
    for secrets in (state.secrets.mask, state.secrets.seed):
        assert secrets["statistics"] not in text
        assert secrets["metrics"] in text
    for shares in (state.own_shares, *state.held.values()):
        assert not any(share in text for share in shares["statistics"].values())
        assert all(share in text for share in shares["metrics"].values())
    assert secure_sum.forget(forgotten, "statistics") == forgotten
    assert Member.model_validate_json(text) == forgotten
    with pytest.raises(SecurityError, match=r"statistics .*again .*wiped"):
        at.contribute(forgotten)


def test_once_shares_are_open_the_key_that_opens_them_is_gone(at: Stage) -> None:
    # Otherwise a recording of what the coordinator passed on, and the state of later, would bring wiped shares back.
    for name in NAMES:
        channel = at.invited[name].secrets.channel
        assert channel in at.shared[name].model_dump_json()
        assert channel not in at.joined[name].model_dump_json()


def test_a_damaged_state_is_refused_without_being_quoted(at: Stage) -> None:
    secrets = at.uploaded["a"].secrets
    text = at.uploaded["a"].model_dump_json()
    for secret in (*secrets.mask.values(), *secrets.seed.values()):
        for damaged in (secret[:-1], secret.upper(), secret + '"'):
            with pytest.raises(ValueError, match="validation error") as caught:
                Member.model_validate_json(text.replace(secret, damaged))
            assert secret[:12] not in str(caught.value).lower()
