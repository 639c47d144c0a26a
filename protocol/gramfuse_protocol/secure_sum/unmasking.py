"""The coordinator's last step in a secure sum: what takes the masks off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum.keys import (
    agree,
    public_of,
)
from gramfuse_protocol.secure_sum.masks import Mask
from gramfuse_protocol.secure_sum.member import Signed, pair_mask, self_mask
from gramfuse_protocol.secure_sum.shares import combine
from gramfuse_protocol.secure_sum.statements import (
    Advert,
    Sum,
    commitment,
    session_id,
)


def unmasking(
    roster: Roster,
    nonce: str,
    adverts: Sequence[Advert],
    name: Sum,
    members: Sequence[str],
    signed: Signed,
    shares: Mapping[str, Mapping[str, bytes]],
) -> list[Mask]:
    """Return what takes the masks off the sum of the survivors' vectors. This is the coordinator's last step.

    Args:
        adverts: of all silos that are in, in roster order.
        signed: what the survivors signed.
        shares: by the silo that released them, then by the silo that they belong to.

    Raises:
        SecurityError: if there are too few shares, or a secret is not what its owner committed to.
    """
    session, survivors, context = session_id(roster.plan, nonce, adverts), signed.survivors, signed.context
    present = {advert.silo: advert for advert in adverts}
    if len(shares) < roster.threshold:
        raise SecurityError(f"{len(shares)} silos released shares; the threshold is {roster.threshold}")
    for silo, released in shares.items():
        if silo not in survivors:
            raise SecurityError(f"shares came from {silo!r}, which is no survivor")
        if set(released) != set(members):
            raise SecurityError(f"silo {silo!r} did not release exactly one share for each member of the sum")

    def secret(owner: str) -> bytes:
        try:
            return combine({roster.index(silo): released[owner] for silo, released in shares.items()}, roster.threshold)
        except SecurityError:
            raise SecurityError(_not_committed(owner, shares)) from None

    found = []
    for owner in members:
        value, advert = secret(owner), present[owner]
        if owner in survivors:
            if commitment(value) != advert.commitments[name]:
                raise SecurityError(_not_committed(owner, shares))
            found.append(self_mask(value, session, name, context, owner).inverse)
        else:
            if public_of(value).hex() != advert.masks[name]:
                raise SecurityError(_not_committed(owner, shares))
            for survivor in survivors:
                agreed = agree(value, bytes.fromhex(present[survivor].masks[name]), survivor)
                found.append(pair_mask(roster, agreed, session, name, context, survivor, owner).inverse)
    return found


def _not_committed(owner: str, shares: Mapping[str, Mapping[str, bytes]]) -> str:
    return (
        f"the shares do not give back what silo {owner!r} committed to; one of {', '.join(shares)} released a wrong "
        f"share, or {owner!r} dealt wrong ones"
    )
