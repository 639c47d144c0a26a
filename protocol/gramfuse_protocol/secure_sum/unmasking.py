"""The coordinator's last step in a secure sum: reconstruct the masks and remove them."""

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
    """Return the masks that, added to the sum of the survivors' vectors, unmask it.

    Args:
        adverts: adverts of all silos in the session, in roster order.
        signed: the survivors and the context that the survivors signed.
        shares: by the silo that released them, then by the silo whose secret they share.

    Raises:
        SecurityError: if there are too few shares, or a secret does not match its owner's commitment.
    """
    session, survivors, context = session_id(roster.plan, nonce, adverts), signed.survivors, signed.context
    present = {advert.silo: advert for advert in adverts}
    if len(shares) < roster.threshold:
        raise SecurityError(f"{len(shares)} silos released shares; the threshold is {roster.threshold}")
    for silo, released in shares.items():
        if silo not in survivors:
            raise SecurityError(f"silo {silo!r} released shares but is not a survivor")
        if set(released) != set(members):
            raise SecurityError(f"silo {silo!r} did not release exactly one share for each member of the sum")

    def secret(owner: str) -> bytes:
        try:
            return combine({roster.index(silo): released[owner] for silo, released in shares.items()}, roster.threshold)
        except SecurityError:
            raise SecurityError(_mismatch(owner, shares)) from None

    inverses = []
    for owner in members:
        value, advert = secret(owner), present[owner]
        if owner in survivors:
            if commitment(value) != advert.commitments[name]:
                raise SecurityError(_mismatch(owner, shares))
            inverses.append(self_mask(value, session, name, context, owner).inverse)
        else:
            if public_of(value).hex() != advert.masks[name]:
                raise SecurityError(_mismatch(owner, shares))
            for survivor in survivors:
                agreed = agree(value, bytes.fromhex(present[survivor].masks[name]), survivor)
                inverses.append(pair_mask(roster, agreed, session, name, context, survivor, owner).inverse)
    return inverses


def _mismatch(owner: str, shares: Mapping[str, Mapping[str, bytes]]) -> str:
    return (
        f"the shares do not reconstruct the secret that silo {owner!r} committed to; one of {', '.join(shares)} "
        f"released a wrong share, or {owner!r} dealt wrong ones"
    )
