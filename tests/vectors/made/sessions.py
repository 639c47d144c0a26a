"""Whole sessions of the secure sum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.messages import wire
from gramfuse_protocol.messages.phases import EvaluateRequest
from gramfuse_protocol.secure_sum import masks
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum import unmasking as unmask
from gramfuse_protocol.secure_sum.fixed_point import capacity, decode, encode
from gramfuse_protocol.secure_sum.keys import Identity, Purpose, agree, derive, framed
from gramfuse_protocol.secure_sum.scales import METRICS_SCALE
from gramfuse_protocol.secure_sum.shares import SHARE_BYTES, combine, split
from gramfuse_protocol.secure_sum.statements import (
    SUMS,
    advert_statement,
    metrics_context,
    session_id,
    survivors_statement,
)
from tests.vectors.made.contributions import (
    ALPHA,
    contribution,
    contribution_json,
    exponent_list,
    first_layout,
    second_layout,
    statistics_values,
)
from tests.vectors.made.sources import Json, Recorded, Source, hex_of, replay, stream

PINNED = ("sha256", "config", "processor")


def plan_text(name: str, keys: Mapping[str, str], layout: Layout, weighting: str, labels: Sequence[str], c: int) -> str:
    task = f'task = "classification"\nlabels = {json.dumps(list(labels))}' if labels else 'task = "regression"'
    silos = "".join(f'\n[[silo]]\nname = "{silo}"\npublic-key = "{key}"\n' for silo, key in keys.items())
    pins = "".join(f'{key} = "{hashlib.sha256((name + key).encode()).hexdigest()}"\n' for key in PINNED)
    return (
        f'[plan]\nname = "{name}"\n\n[model]\nbase = "base"\n{pins}{task}\n\n[merge]\nalpha = {ALPHA}\n'
        f'weighting = "{weighting}"\nlayout = "{layout.digest}"\n\n[privacy]\ncolluding = {c}\n{silos}'
    )


class Session:
    """One session of the secure sum, step by step; `vector` fills up with what happens.

    Args:
        roster: silos in the plan's order.
        unready: those that are not in the cohort.
        mute: those that send keys and no shares.
        dead: by sum, those that are members and whose contribution does not come.
        signers: by sum, how many of the survivors' signatures are shown and how many release; all by default.
        brief: whether to leave out what follows from the rest: coefficients, and how shares are sealed.
    """

    def __init__(
        self,
        name: str,
        silos: Sequence[str],
        layout: Layout,
        *,
        weighting: str,
        labels: Sequence[str],
        candidates: Sequence[str],
        colluding: int = 1,
        unready: Sequence[str] = (),
        mute: Sequence[str] = (),
        dead: Mapping[str, Sequence[str]] | None = None,
        signers: Mapping[str, int] | None = None,
        brief: bool = False,
    ) -> None:
        self.brief = brief
        self.layout, self.weighting, self.labels = layout, weighting, labels
        self.dead, self.signers = dead or {}, signers or {}
        self.source = Source(name)
        self.identities = {silo: Identity(private) for silo in silos if (private := self.source(32))}
        privates = Source(name)
        text = plan_text(
            name.replace(" ", "-"),
            {silo: identity.public.hex() for silo, identity in self.identities.items()},
            layout,
            weighting,
            labels,
            colluding,
        )
        plan = Plan.parse(text)
        self.roster = plan.roster
        self.nonce = self.source(16).hex()
        self.members: dict[str, secure_sum.Member] = {}
        self.vector: Json = {
            "name": name,
            "plan_text": text,
            "plan_document": plan.document(),
            "plan_canonical": canonical_json(plan.document()).decode(),
            "plan": plan.digest,
            "layout": json.loads(layout.to_json()),
            "layout_digest": layout.digest,
            "threshold": plan.threshold,
            "minimum": plan.minimum_survivors,
            "roster": {
                silo: {"identity_private": privates(32).hex(), "identity_public": identity.public.hex()}
                for silo, identity in self.identities.items()
            },
            "nonce": self.nonce,
            "cohort": [silo for silo in silos if silo not in unready],
        }
        self._advertise()
        self._share([silo for silo in self.members if silo not in mute])
        self.vector["sums"] = [self._sum("statistics", self._statistics())]
        self.vector["sums"].append(self._sum("metrics", self._metrics(candidates)))

    def _advertise(self) -> None:
        steps = self.vector["advertise"] = {}
        for silo in self.vector["cohort"]:
            random = Recorded(self.source)
            member = secure_sum.advertise(
                self.roster, self.nonce, silo, self.vector["cohort"], self.identities[silo], random
            )
            self.members[silo] = member
            steps[silo] = {
                "random": random.given.hex(),
                "channel_private": member.secrets.channel,
                "mask_private": dict(member.secrets.mask),
                "seed": dict(member.secrets.seed),
                "statement": advert_statement(self.roster.plan, self.nonce, member.advert.fields).hex(),
                "advert": member.advert.model_dump(mode="json"),
            }

    def _share(self, sharing: Sequence[str]) -> None:
        self.adverts = [member.advert for member in self.members.values()]
        self.session = session_id(self.roster.plan, self.nonce, self.adverts)
        self.vector["session"] = self.session.hex()
        steps = self.vector["share"] = {}
        sealed: dict[str, dict[str, bytes]] = {}
        for silo in sharing:
            random = Recorded(self.source)
            self.members[silo], sealed[silo] = secure_sum.share(self.roster, self.members[silo], self.adverts, random)
            steps[silo] = {
                "random": random.given.hex(),
                "shares": self._shares(silo, random.given),
                "sealed": {peer: self._sealing(silo, peer, data) for peer, data in sealed[silo].items()},
            }
        for silo in sharing:
            for_it = {peer: data[silo] for peer, data in sealed.items() if peer != silo}
            self.members[silo] = secure_sum.receive(self.roster, self.members[silo], for_it)

    def _shares(self, silo: str, given: bytes) -> Json:
        """Every coefficient but the secret, and the shares by the silo that each is for."""
        secrets, found = self.members[silo].secrets, {}
        for name in SUMS:
            for kind in secure_sum.SECRET_KINDS:
                size = (self.roster.threshold - 1) * SHARE_BYTES
                part, given = given[:size], given[size:]
                drawn = [part[at : at + SHARE_BYTES] for at in range(0, size, SHARE_BYTES)]
                points = {advert.silo: self.roster.index(advert.silo) for advert in self.adverts}
                secret = bytes.fromhex(getattr(secrets, kind)[name])
                shares = split(secret, self.roster.threshold, points.values(), replay(part))
                entry: Json = {"shares": {peer: shares[point].hex() for peer, point in points.items()}}
                if not self.brief:
                    coefficients = [int.from_bytes(c, "little") >> 7 for c in drawn]
                    entry["coefficients"] = [c.to_bytes(SHARE_BYTES, "little").hex() for c in coefficients]
                found[f"{name} {kind}"] = entry
        return found

    def _sealing(self, sender: str, receiver: str, sealed: bytes) -> Json:
        if self.brief:
            return {"sealed": sealed.hex()}
        secret = agree(
            bytes.fromhex(self.members[sender].secrets.channel),
            bytes.fromhex(self.members[receiver].advert.channel),
            receiver,
        )
        info = framed(Purpose.CHANNEL, self.session, sender, receiver)
        key = derive(secret, Purpose.CHANNEL, self.session, sender, receiver)
        plain = ChaCha20Poly1305(key).decrypt(bytes(12), sealed, info)
        return {
            "secret": secret.hex(),
            "info_and_associated_data": info.hex(),
            "key": key.hex(),
            "plain": plain.hex(),
            "sealed": sealed.hex(),
        }

    def _statistics(self) -> Json:
        silos = len(self.roster.names)
        vector: Json = {
            "context": self.layout.digest,
            "alpha": str(ALPHA),
            "weighting": self.weighting,
            "capacity": capacity(silos),
            "exponents": exponent_list(self.layout, silos, self.weighting),
            "contributions": {},
            "values": {},
        }
        for silo in self.roster.names:
            statistics = contribution(self.layout, self.source)
            vector["contributions"][silo] = contribution_json(statistics)
            vector["values"][silo] = statistics_values(self.layout, statistics, self.weighting, silo)
        return vector

    def _metrics(self, candidates: Sequence[str]) -> Json:
        silos, digests, requests = len(self.roster.names), {}, {}
        for name in candidates:
            arrays = {
                block.name: (np.array(self.source.integers(block.entries, 99), np.float32) / 1024).reshape(block.shape)
                for block, *_ in self.layout.deltas
            }
            frame = wire.pack(EvaluateRequest(plan=self.roster.plan, session=self.nonce, candidate=name, arrays=arrays))
            data = [buffer.tobytes() for buffer in frame.buffers]
            digests[name] = hashlib.sha256(frame.header.encode() + b"".join(data)).hexdigest()
            requests[name] = {
                "header": frame.header,
                "buffers": [part.hex() for part in data],
                "digest": digests[name],
            }
        size = 2 + 3 * len(self.labels) if self.labels else 7
        scale = METRICS_SCALE
        values: dict[str, list[float]] = {}
        for silo in self.roster.names:
            drawn = self.source.integers(size * len(candidates), 50)
            values[silo] = [float(abs(x)) if self.labels else x / 7 for x in drawn]
        return {
            "context": metrics_context(digests),
            "candidates": requests,
            "capacity": capacity(silos),
            "exponents": [int(np.log2(scale))] * (size * len(candidates)),
            "values": values,
        }

    def _sum(self, name: Any, about: Json) -> Json:
        """Contribute, sign, release and unmask."""
        some = next(member for member in self.members.values() if name in member.members)
        members = list(some.members[name])
        survivors = [silo for silo in members if silo not in self.dead.get(name, ())]
        scale = 2.0 ** np.array(about["exponents"], np.float64)
        words, masked = {}, {}
        for silo in members:
            values = np.array(about["values"][silo])
            words[silo] = encode(values, scale, len(self.roster.names), name)
            masked[silo] = words[silo].copy()
            sent = hashlib.sha256(words[silo].tobytes()).hexdigest()
            self.members[silo], on = secure_sum.contribute(
                self.roster, self.members[silo], name, sent, about["context"]
            )
            masks.apply(masked[silo], on)
        signing = survivors[-self.signers.get(name, len(survivors)) :]
        signatures = {}
        for silo in survivors:
            self.members[silo], signature = secure_sum.sign(
                self.roster, self.members[silo], self.identities[silo], name, survivors
            )
            signatures[silo] = signature
        given = {silo: signatures[silo] for silo in signing}
        released = {silo: secure_sum.release(self.roster, self.members[silo], name, given) for silo in signing}
        signed = secure_sum.Signed(survivors=tuple(survivors), context=about["context"])
        off = unmask.unmasking(self.roster, self.nonce, self.adverts, name, members, signed, released)
        total = np.zeros(len(scale), np.uint64)
        for silo in survivors:
            total += masked[silo]
        masks.apply(total, off)
        statement = survivors_statement(self.session, name, members, survivors, about["context"])
        return {
            "name": name,
            **about,
            "values": {silo: about["values"][silo] for silo in members},
            "members": members,
            "words": {silo: hex_of(words[silo]) for silo in members},
            "self_masks": {silo: self._self_mask(name, about["context"], silo) for silo in members},
            "pair_masks": [
                self._pair_mask(name, about["context"], a, b) for a in members for b in members if self._before(a, b)
            ],
            "masked": {silo: hex_of(masked[silo]) for silo in members},
            "survivors": survivors,
            "statement": statement.hex(),
            "signatures": {silo: signature.hex() for silo, signature in signatures.items()},
            "signatures_shown": list(given),
            "released": {
                silo: {owner: share.hex() for owner, share in shares.items()} for silo, shares in released.items()
            },
            "opened": {
                owner: {
                    "kind": kind,
                    "secret": combine(
                        {self.roster.index(silo): shares[owner] for silo, shares in released.items()},
                        self.roster.threshold,
                    ).hex(),
                }
                for owner in members
                for kind in ("seed" if owner in survivors else "mask",)
            },
            "unmasking": [{"key": mask.key.hex(), "sign": mask.sign} for mask in off],
            "sum_words": hex_of(total),
            "sum": decode(total, scale).tolist(),
        }

    def _before(self, a: str, b: str) -> bool:
        return self.roster.index(a) < self.roster.index(b)

    def _self_mask(self, name: Any, context: str, silo: str) -> Json:
        seed, fields = bytes.fromhex(self.members[silo].secrets.seed[name]), (name, bytes.fromhex(context), silo)
        key = derive(seed, Purpose.SELF, self.session, *fields)
        return {
            "info": framed(Purpose.SELF, self.session, *fields).hex(),
            "key": key.hex(),
            "first_words": hex_of(stream(key, 4)),
        }

    def _pair_mask(self, name: Any, context: str, first: str, second: str) -> Json:
        secret = agree(
            bytes.fromhex(self.members[first].secrets.mask[name]),
            bytes.fromhex(self.members[second].advert.masks[name]),
            second,
        )
        fields = (name, bytes.fromhex(context), first, second)
        key = derive(secret, Purpose.PAIR, self.session, *fields)
        return {
            "added_by": first,
            "subtracted_by": second,
            "secret": secret.hex(),
            "info": framed(Purpose.PAIR, self.session, *fields).hex(),
            "key": key.hex(),
            "first_words": hex_of(stream(key, 4)),
        }


def sessions() -> list[Json]:
    return [
        Session(
            "four silos",
            ["south", "north", "west", "east"],
            first_layout(),
            weighting="uniform",
            labels=["no", "yes"],
            candidates=["simple", "regmean"],
        ).vector,
        Session(
            "five silos",
            ["oslo", "bern", "rome", "lima", "kyiv"],
            second_layout(),
            weighting="examples",
            labels=[],
            candidates=["regmean"],
            dead={"statistics": ["rome"]},
            brief=True,
        ).vector,
        Session(
            "seven silos",
            ["d", "a", "g", "b", "f", "c", "e"],
            first_layout(),
            weighting="examples",
            labels=["no", "yes"],
            candidates=["regmean"],
            colluding=0,
            unready=["g"],
            mute=["a"],
            dead={"metrics": ["f"]},
            signers={"statistics": 4},
            brief=True,
        ).vector,
    ]
