"""Inputs to a silo that it must refuse, step by step of a session."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.secure_sum.shares import PRIME, SHARE_BYTES
from gramfuse_protocol.secure_sum.statements import SUMS, Advert, advert_statement, survivors_statement
from tests.vectors.made.sources import Json


class Refused:
    """Collects what must be refused.

    An entry's `session` is the session that it departs from, `silo` the one that is asked, `after` the last step of
    that session which the silo has done before, `again` whether it has done `step` itself as well, the good way. In a
    list of adverts, a name stands for that silo's advert of the session, and where sealed or released shares should be,
    for that silo's own.
    """

    def __init__(self, good: Sequence[Json]) -> None:
        self.sessions = {vector["name"]: vector for vector in good}
        self.found: list[Json] = []

    def step(
        self,
        name: str,
        step: str,
        silo: str,
        after: str,
        given: Json,
        *,
        session: str = "four silos",
        again: bool = False,
    ) -> None:
        """Add an input to a silo's step."""
        self.found.append(
            {
                "name": name,
                "step": step,
                "session": session,
                "silo": silo,
                "after": after,
                "again": again,
                "input": given,
                "error": "SecurityError",
            }
        )

    def part(self, name: str, step: str, error: str, **given: Any) -> None:
        """Add an input to something that needs no session."""
        self.found.append({"name": name, "step": step, "input": given, "error": error})


def refused_cohorts(bad: Refused) -> None:
    good = bad.sessions["four silos"]
    identity = good["roster"]["south"]["identity_private"]
    for name, cohort in {
        "cohort in another order": ["north", "south", "west", "east"],
        "cohort with a silo twice": ["south", "south", "north", "west"],
        "cohort with a stranger": ["south", "north", "west", "mars"],
        "cohort below the threshold": ["south", "north"],
        "cohort without the silo that is asked": ["north", "west", "east"],
        "empty cohort": [],
    }.items():
        given = {"cohort": cohort, "identity_private": identity}
        bad.step(name, "advertise", "south", "", given)
    other = {"cohort": good["cohort"], "identity_private": good["roster"]["north"]["identity_private"]}
    bad.step("identity that is not the roster's", "advertise", "south", "", other)


def refused_adverts(bad: Refused) -> None:
    good = bad.sessions["four silos"]
    adverts = [step["advert"] for step in good["advertise"].values()]

    def case(name: str, changed: list[Json]) -> None:
        bad.step(name, "share", "south", "advertise", {"adverts": _named(adverts, changed)})

    def signed(place: int, *, plan: str = good["plan"], nonce: str = good["nonce"], **changes: Any) -> list[Json]:
        """Change an advert and sign it with its owner's identity."""
        changed = copy.deepcopy(adverts)
        changed[place] |= changes
        advert = Advert.model_validate_json(json.dumps(changed[place]))
        key = Identity(bytes.fromhex(good["roster"][advert.silo]["identity_private"]))
        changed[place]["signature"] = key.sign(advert_statement(plan, nonce, advert.fields)).hex()
        return changed

    def forged(**changes: Any) -> list[Json]:
        changed = copy.deepcopy(adverts)
        changed[1] |= changes
        return changed

    stranger = bad.sessions["five silos"]
    masks_, zero = adverts[1]["masks"], "00" * 32
    flipped = f"{int(adverts[1]['signature'][0], 16) ^ 1:x}{adverts[1]['signature'][1:]}"
    case("keys with a changed signature", forged(signature=flipped))
    case("keys changed after signing", forged(channel=stranger["advertise"]["bern"]["advert"]["channel"]))
    case("commitment changed after signing", forged(commitments=adverts[2]["commitments"]))
    swapped = {"statistics": masks_["metrics"], "metrics": masks_["statistics"]}
    case("mask keys of the two sums swapped after signing", forged(masks=swapped))
    case("keys signed by another silo", forged(signature=adverts[2]["signature"]))
    case("keys signed for another nonce", signed(1, nonce=stranger["nonce"]))
    case("keys signed for another plan", signed(1, plan=stranger["plan"]))
    case("all-zero channel key", signed(1, channel=zero))
    case("all-zero mask key of the statistics", signed(1, masks=masks_ | {"statistics": zero}))
    case("all-zero mask key of the metrics", signed(1, masks=masks_ | {"metrics": zero}))
    case("mask key of order two", signed(1, masks=masks_ | {"statistics": "01" + "00" * 31}))
    case("one silo's channel key as another's", signed(1, channel=adverts[2]["channel"]))
    case("one key for both sums", signed(1, masks=dict.fromkeys(SUMS, masks_["metrics"])))
    case("channel key as mask key", signed(1, channel=masks_["metrics"]))
    case("own keys replaced, well signed", signed(0, channel=stranger["advertise"]["oslo"]["advert"]["channel"]))
    case("own keys left out", adverts[1:])
    case("keys in another order", [adverts[1], adverts[0], *adverts[2:]])
    case("keys of a silo twice", [adverts[0], *adverts])
    case("keys of a stranger", [*adverts[:3], stranger["advertise"]["oslo"]["advert"]])
    case("keys below the threshold", adverts[:2])
    bad.step(
        "a second list of keys", "share", "south", "advertise", {"adverts": _named(adverts, adverts[:3])}, again=True
    )
    seven = bad.sessions["seven silos"]
    invited = [step["advert"] for step in seven["advertise"].values()]
    outside = _named(invited, [*invited[:2], invited[0] | {"silo": "g"}, *invited[2:]])
    bad.step("keys from outside of the cohort", "share", "d", "advertise", {"adverts": outside}, session="seven silos")


def _named(adverts: list[Json], changed: list[Json]) -> list[Any]:
    """Put a silo's name where its advert is the session's own."""
    return [advert["silo"] if advert in adverts else advert for advert in changed]


def refused_shares(bad: Refused) -> None:
    good = bad.sessions["four silos"]
    sealed = {peer: step["sealed"]["south"]["sealed"] for peer, step in good["share"].items() if peer != "south"}

    def case(name: str, changed: Json, *, after: str = "share", again: bool = False) -> None:
        named = {peer: peer if sealed.get(peer) == data else data for peer, data in changed.items()}
        bad.step(name, "receive", "south", after, {"sealed": named}, again=again)

    def resealed(plain: bytes) -> Json:
        sealing = good["share"]["north"]["sealed"]["south"]
        key, about = bytes.fromhex(sealing["key"]), bytes.fromhex(sealing["info_and_associated_data"])
        return sealed | {"north": ChaCha20Poly1305(key).encrypt(bytes(12), plain, about).hex()}

    flipped = f"{int(sealed['north'][0], 16) ^ 1:x}{sealed['north'][1:]}"
    tag = f"{sealed['north'][:-1]}{int(sealed['north'][-1], 16) ^ 1:x}"
    parts = [good["share"]["north"]["shares"][f"{s} {k}"]["shares"]["south"] for s in SUMS for k in ("mask", "seed")]
    plain = bytes.fromhex("".join(parts))
    too_large = PRIME.to_bytes(SHARE_BYTES, "little")
    case("sealed shares with a flipped bit", sealed | {"north": flipped})
    case("sealed shares with a flipped bit in the tag", sealed | {"north": tag})
    case("sealed shares for another receiver", sealed | {"north": good["share"]["north"]["sealed"]["west"]["sealed"]})
    case("sealed shares of another sender", sealed | {"north": sealed["west"]})
    case(
        "sealed shares of the silo itself, reflected",
        sealed | {"north": good["share"]["south"]["sealed"]["north"]["sealed"]},
    )
    case("sealed shares of the silo for itself", sealed | {"south": sealed["north"]})
    case("sealed shares of a stranger", sealed | {"mars": sealed["north"]})
    case("sealed shares of too few", {"north": sealed["north"]})
    case("sealed shares cut short", sealed | {"north": sealed["north"][:30]})
    case("a share that is the prime", resealed(too_large + plain[SHARE_BYTES:]))
    case("a share above the prime", resealed(plain[:-SHARE_BYTES] + b"\xff" * SHARE_BYTES))
    case("three shares under one seal", resealed(plain[:-SHARE_BYTES]))
    case("a byte too few under one seal", resealed(plain[:-1]))
    case("a byte too many under one seal", resealed(plain + b"\0"))
    case("shares a second time", sealed, again=True)
    case("shares before the list of keys", sealed, after="advertise")


def refused_contributions(bad: Refused) -> None:
    good = bad.sessions["four silos"]
    statistics, metrics = good["sums"]
    words = statistics["words"]["south"]
    changed = f"{int(words[0], 16) ^ 1:x}{words[1:]}"

    def case(name: str, after: str, which: Json, data: str, *, again: bool = False, about: str | None = None) -> None:
        given = {"sum": which["name"], "words": data, "context": about or which["context"]}
        bad.step(name, "contribute", "south", after, given, again=again)

    case("another vector under the same masks", "receive", statistics, changed, again=True)
    case("the same vector for something else", "receive", statistics, words, again=True, about="00" * 32)
    case("a contribution before shares came", "share", statistics, words)
    case("metrics before the first sum's survivors", "contribute statistics", metrics, metrics["words"]["south"])


def refused_survivors(bad: Refused) -> None:
    good = bad.sessions["four silos"]
    after = "contribute statistics"

    def case(name: str, survivors: list[str], *, after: str = after, again: bool = False) -> None:
        bad.step(name, "sign", "south", after, {"sum": "statistics", "survivors": survivors}, again=again)

    case("survivors without the silo that is asked", ["north", "west", "east"])
    case("survivors with a silo twice", ["south", "north", "north", "west"])
    case("survivors in another order", ["south", "west", "north", "east"])
    case("survivors with a stranger", ["south", "north", "west", "mars"])
    case("survivors below the threshold", ["south", "north"])
    case("a second, shorter list of survivors", ["south", "north", "west"], again=True)
    case("survivors before a contribution", good["cohort"], after="receive")
    given = {"sum": "statistics", "survivors": ["d", "a", "b", "f", "c", "e"]}
    bad.step("a survivor that shared nothing", "sign", "d", after, given, session="seven silos")
    given = {"sum": "metrics", "survivors": ["oslo", "bern", "rome", "lima", "kyiv"]}
    bad.step("one that was dead comes back", "sign", "oslo", "contribute metrics", given, session="five silos")


def refused_releases(bad: Refused) -> None:
    good = bad.sessions["four silos"]
    statistics, metrics = good["sums"]
    signatures = statistics["signatures"]

    def case(
        name: str, given: Json, *, after: str = "sign statistics", session: str = "four silos", silo: str = "south"
    ) -> None:
        bad.step(name, "release", silo, after, {"sum": "statistics", "signatures": given}, session=session)

    def other(survivors: list[str], context: str = good["layout_digest"]) -> str:
        """North's signature on another statement."""
        session = bytes.fromhex(good["session"])
        key = Identity(bytes.fromhex(good["roster"]["north"]["identity_private"]))
        return key.sign(survivors_statement(session, "statistics", good["cohort"], survivors, context)).hex()

    flipped = f"{int(signatures['north'][0], 16) ^ 1:x}{signatures['north'][1:]}"
    case("too few signatures", {silo: signatures[silo] for silo in ("south", "north")})
    case("no signatures", {})
    case("a changed signature", signatures | {"north": flipped})
    case("another silo's signature", signatures | {"north": signatures["west"]})
    case("a signature of a stranger", signatures | {"mars": signatures["west"]})
    case("a signature on a shorter list", signatures | {"north": other(["south", "north", "west"])})
    case("a signature about another layout", signatures | {"north": other(good["cohort"], "00" * 32)})
    case("a signature of the other sum", signatures | {"north": metrics["signatures"]["north"]})
    case("shares before the survivors were signed", signatures, after="contribute statistics")
    case("shares after the secrets were wiped", signatures, after="wipe statistics")
    five = bad.sessions["five silos"]
    survivors, session = five["sums"][0]["survivors"], bytes.fromhex(five["session"])
    key = Identity(bytes.fromhex(five["roster"]["rome"]["identity_private"]))
    statement = survivors_statement(session, "statistics", five["cohort"], survivors, five["layout_digest"])
    given = five["sums"][0]["signatures"] | {"rome": key.sign(statement).hex()}
    case("a signature of one that did not survive", given, session="five silos", silo="oslo")


def refused_unmasking(bad: Refused) -> None:
    def case(name: str, session: str, change: Callable[[Json], Any]) -> None:
        good = bad.sessions[session]["sums"][0]
        released = copy.deepcopy(good["released"])
        change(released)
        named = {silo: silo if shares == good["released"][silo] else shares for silo, shares in released.items()}
        given = {"sum": "statistics", "released": named}
        bad.step(name, "unmask", "", "", given, session=session)

    four, five = bad.sessions["four silos"], bad.sessions["five silos"]
    kinds = four["share"]["north"]["shares"]
    wrong_seed = kinds["metrics seed"]["shares"]["south"]
    wrong_kind = kinds["statistics mask"]["shares"]["south"]
    mask_of_rome = five["share"]["rome"]["shares"]["metrics mask"]["shares"]

    def other_secret(released: Json) -> None:
        for silo, shares in released.items():
            shares["north"] = kinds["metrics seed"]["shares"][silo]

    def other_mask_key(released: Json) -> None:
        for silo, shares in released.items():
            shares["rome"] = mask_of_rome[silo]

    case("one wrong share", "four silos", lambda released: released["south"].update(north=wrong_seed))
    case("one share of the other kind", "four silos", lambda released: released["south"].update(north=wrong_kind))
    case("a seed that was not committed to", "four silos", other_secret)
    case("a mask key that was not advertised", "five silos", other_mask_key)
    case("too few that released", "four silos", lambda released: [released.pop(silo) for silo in ("west", "east")])
    case("a share too few", "four silos", lambda released: released["south"].pop("north"))
    case("a share too many", "four silos", lambda released: released["south"].update(mars=wrong_seed))
    case("a released share that is the prime", "four silos", lambda r: r["south"].update(north="ff" * 65 + "01"))
