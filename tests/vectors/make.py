"""Makes the test vectors beside it from this implementation, the same bytes every time.

    python tests/vectors/make.py            write them
    python tests/vectors/make.py --check    exit 1 if what is there differs

* secure_sum.json: whole sessions, the first with every value in between.
* parts.json: small vectors of each part.
* refused.json: what must be refused, and with which error.

Byte strings are hexadecimal; words are eight little-endian bytes each, one after the other. Whatever random bytes a
silo consumed stand in the vector, so replaying one takes no generator.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from gramfuse_model.normal_equations import summands
from gramfuse_protocol.canonical import canonical_json, digest
from gramfuse_protocol.contract.layout import Group, Layout, Linear, SharedOutputs, Tensor
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.roster import smallest_threshold
from gramfuse_protocol.messages import npy, wire
from gramfuse_protocol.messages.phases import (
    EvaluateRequest,
    MaskedReply,
    Message,
    SurvivorsRequest,
    UnmaskReply,
    UploadReply,
)
from gramfuse_protocol.secure_sum import masks
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum import unmasking as unmask
from gramfuse_protocol.secure_sum.fixed_point import capacity, decode, encode
from gramfuse_protocol.secure_sum.keys import Identity, Label, agree, derive, framed
from gramfuse_protocol.secure_sum.scales import METRICS_SCALE, scales
from gramfuse_protocol.secure_sum.shares import PRIME, SHARE_BYTES, combine, split
from gramfuse_protocol.secure_sum.statements import (
    SUMS,
    Advert,
    advert_statement,
    commitment,
    metrics_context,
    model_digest,
    round_digest,
    session_id,
    survivors_statement,
)
from gramfuse_protocol.statistics.contribution import Statistics

HERE = Path(__file__).parent
ALPHA = 0.75
PINNED = ("sha256", "config", "processor")
"""Few bits, so that the summands are exact in float64 whatever the order in which they are added up."""

Json = dict[str, Any]


class Source:
    """Random bytes that are not: SHA-256 of a name and a counter, block after block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.blocks = 0

    def __call__(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += hashlib.sha256(f"{self.name} {self.blocks}".encode()).digest()
            self.blocks += 1
        return data[:size]

    def integers(self, count: int, bound: int) -> list[int]:
        """Integers from -bound to bound."""
        return [int.from_bytes(self(4), "little") % (2 * bound + 1) - bound for _ in range(count)]


class Recorded:
    """A source that keeps what it gave."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.given = b""

    def __call__(self, size: int) -> bytes:
        data = self.source(size)
        self.given += data
        return data


def words_of(data: str) -> masks.Words:
    return np.frombuffer(bytes.fromhex(data), "<u8").copy()


def hex_of(words: masks.Words) -> str:
    return words.astype("<u8").tobytes().hex()


def exponent_list(layout: Layout, silos: int, weighting: Any) -> list[int]:
    """f of every word of the statistics."""
    found: list[int] = []
    for block, scale in scales(layout, silos, weighting):
        found += np.log2(np.broadcast_to(scale, block.shape)).astype(int).reshape(-1).tolist()
    return found


# Layouts, contributions and plans


def first_layout() -> Layout:
    """One full group of two weights that share their input, stored both ways, and a bias."""
    linear = (Linear(weight="q.weight", d_out=1, transposed=True), Linear(weight="k.weight", d_out=2, transposed=False))
    return Layout(
        groups=(Group(name="q", d_in=2, structure="full", weights=linear, exponents=(-2, 1)),),
        tensors=(
            Tensor(name="q.weight", shape=(1, 2), merge="regmean"),
            Tensor(name="q.bias", shape=(2,), merge="mean"),
            Tensor(name="k.weight", shape=(2, 2), merge="regmean"),
        ),
        frozen=("embeddings.weight",),
    )


def second_layout() -> Layout:
    """A block with a rest, a diagonal, experts that are one tensor, and a scalar."""
    return Layout(
        groups=(
            Group(
                name="up",
                d_in=3,
                structure="block:2",
                weights=(Linear(weight="up.weight", d_out=2, transposed=True),),
                exponents=(3, -7, 0),
            ),
            Group(
                name="down",
                d_in=2,
                structure="diagonal",
                weights=(Linear(weight="down.weight", d_out=1, transposed=True),),
                exponents=(-40, -3),
            ),
            Group(
                name="experts.up",
                d_in=2,
                structure="full",
                weights=(Linear(weight="experts.up", d_out=1, transposed=True),),
                experts=2,
                exponents=(0, -5),
            ),
        ),
        tensors=(
            Tensor(name="up.weight", shape=(2, 3), merge="regmean"),
            Tensor(name="down.weight", shape=(1, 2), merge="regmean"),
            Tensor(name="experts.up", shape=(2, 1, 2), merge="regmean"),
            Tensor(name="scale", shape=(), merge="mean"),
        ),
        frozen=(),
    )


def third_layout() -> Layout:
    """A head of three labels, of which the first and the last are north's and east's alone, and a normalisation."""
    parts = (
        SharedOutputs(silos=("north", "east"), outputs=(0, 2)),
        SharedOutputs(silos=("north", "east", "west"), outputs=(1,)),
    )
    groups = tuple(
        Group(
            name=f"head[{n}]",
            d_in=2,
            structure="full",
            weights=(Linear(weight="head.weight", d_out=len(part.outputs), transposed=True),),
            rows=("all",),
            part=n,
            exponents=(0, -1),
        )
        for n, part in enumerate(parts)
    )
    return Layout(
        groups=groups,
        tensors=(
            Tensor(name="head.weight", shape=(3, 2), merge="regmean", parted=True),
            Tensor(name="head.bias", shape=(3,), merge="mean", parted=True),
            Tensor(name="norm.running_var", shape=(2,), merge="mean", buffer=True),
            Tensor(name="norm.num_batches_tracked", shape=(), merge="sum", buffer=True),
        ),
        frozen=(),
        parts=parts,
    )


def contribution(layout: Layout, source: Source) -> Statistics:
    """A silo's statistics: few bits where they are multiplied, any float32 where they are not."""
    blocks = {}
    for block in layout.blocks:
        name = block.name.partition(":")[2]
        if block.name.startswith("gram:"):
            group = next(group for group in layout.groups if group.name == name)
            bound = 2.0 ** (2 * min(group.exponents))
            values = np.array(source.integers(block.entries, 100), np.float64) / 64 * bound
        elif any(tensor.name == name and tensor.merge == "regmean" for tensor in layout.tensors):
            values = np.array(source.integers(block.entries, 100), np.float64) / 512
        elif any(tensor.name == name and tensor.merge == "sum" for tensor in layout.tensors):
            values = np.array(source.integers(block.entries, 100), np.float64)
        else:
            values = np.array(source.integers(block.entries, 10**6), np.float64) * 1e-9
        blocks[block.name] = values.astype(np.float32).reshape(block.shape)
    tokens = {group.name: abs(n) for group, n in zip(layout.groups, source.integers(9, 5000), strict=False)}
    return Statistics(300 + source.integers(1, 99)[0], tokens, blocks)


def contribution_json(statistics: Statistics) -> Json:
    return {
        "examples": statistics.examples,
        "tokens": dict(statistics.tokens),
        "blocks": {name: array.astype(np.float64).reshape(-1).tolist() for name, array in statistics.blocks.items()},
    }


def statistics_values(layout: Layout, statistics: Statistics, weighting: Any, silo: str) -> list[float]:
    found: list[float] = []
    for _, values in summands(layout, statistics, alpha=ALPHA, weighting=weighting, silo=silo):
        found += values.reshape(-1).tolist()
    return found


def plan_text(name: str, keys: Mapping[str, str], layout: Layout, weighting: str, labels: Sequence[str], c: int) -> str:
    task = f'task = "classification"\nlabels = {json.dumps(list(labels))}' if labels else 'task = "regression"'
    silos = "".join(f'\n[[silo]]\nname = "{silo}"\npublic-key = "{key}"\n' for silo, key in keys.items())
    pins = "".join(f'{key} = "{hashlib.sha256((name + key).encode()).hexdigest()}"\n' for key in PINNED)
    return (
        f'[plan]\nname = "{name}"\n\n[model]\nbase = "base"\n{pins}{task}\n\n[merge]\nalpha = {ALPHA}\n'
        f'weighting = "{weighting}"\nlayout = "{layout.digest}"\n\n[privacy]\ncolluding = {c}\n{silos}'
    )


# Sessions


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
            for kind in secure_sum.KINDS:
                size = (self.roster.threshold - 1) * SHARE_BYTES
                part, given = given[:size], given[size:]
                drawn = [part[at : at + SHARE_BYTES] for at in range(0, size, SHARE_BYTES)]
                points = {advert.silo: self.roster.index(advert.silo) for advert in self.adverts}
                secret = bytes.fromhex(getattr(secrets, kind)[name])
                shares = split(secret, self.roster.threshold, points.values(), _replay(part))
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
        info = framed(Label.CHANNEL, self.session, sender, receiver)
        key = derive(secret, Label.CHANNEL, self.session, sender, receiver)
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
        key = derive(seed, Label.SELF, self.session, *fields)
        return {
            "info": framed(Label.SELF, self.session, *fields).hex(),
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
        key = derive(secret, Label.PAIR, self.session, *fields)
        return {
            "added_by": first,
            "subtracted_by": second,
            "secret": secret.hex(),
            "info": framed(Label.PAIR, self.session, *fields).hex(),
            "key": key.hex(),
            "first_words": hex_of(stream(key, 4)),
        }


def _replay(data: bytes) -> Callable[[int], bytes]:
    parts = iter([data[at : at + SHARE_BYTES] for at in range(0, len(data), SHARE_BYTES)])
    return lambda size: next(parts)


def stream(key: bytes, count: int, start: int = 0) -> masks.Words:
    words = np.zeros(count, np.uint64)
    masks.apply(words, [masks.Mask(key, 1)], start)
    return words


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


# Parts


def parts() -> Json:
    source = Source("parts")
    return {
        "canonical": _canonical(),
        "framed": [
            {"label": str(label), "fields": fields, "framed": framed(label, *map(bytes.fromhex, fields)).hex()}
            for label, fields in (
                (Label.CONTEXT, []),
                (Label.ADVERT, [""]),
                (Label.SURVIVORS, ["00", "", "6e6f727468"]),
                (Label.SELF, [source(300).hex()]),
            )
        ],
        "commitment": [{"seed": seed.hex(), "commitment": commitment(seed)} for seed in (bytes(32), source(32))],
        "derive": [
            {
                "secret": secret.hex(),
                "label": str(label),
                "fields": fields,
                "key": derive(secret, label, *map(bytes.fromhex, fields)).hex(),
            }
            for secret, label, fields in (
                (bytes(32), Label.CHANNEL, []),
                (source(32), Label.PAIR, [source(32).hex(), "", "ff"]),
            )
        ],
        "thresholds": [
            {"silos": n, "colluding": c, "threshold": smallest_threshold(n, c)}
            for n in (3, 4, 5, 10, 1024)
            for c in (0, 1, 2)
        ],
        "shares": [_shamir(source, 1, [1]), _shamir(source, 3, [1, 2, 5, 1024]), _shamir_of_extremes()],
        "masks": [
            {"key": key.hex(), "start": start, "words": hex_of(stream(key, 5, start))}
            for key, start in ((bytes(32), 0), (source(32), 0), (source(32), 6), (source(32), 2**33))
        ],
        "encode": _encode(),
        "decode": _decode(),
        "layouts": _layouts(),
        "metrics_context": [
            {"candidates": pairs, "context": metrics_context(dict(pairs))}
            for pairs in ([], [["b", "11" * 32], ["a", "22" * 32]], [["a", "22" * 32], ["b", "11" * 32]])
        ],
        "rounds": [_round(number, start) for number, start in ((1, []), (2, [0.5, -1.5]), (2, [0.0]), (3, [0.0]))],
        "wire": [_packed(message) for message in _messages()],
    }


def _round(number: int, start: list[float]) -> Json:
    plan = "0123456789abcdef" * 4
    digest_of_start = model_digest(np.array([value], np.float32) for value in start) if start else ""
    return {
        "plan": plan,
        "round": number,
        "start": start,
        "start_digest": digest_of_start,
        "digest": round_digest(plan, number, digest_of_start),
    }


def _canonical() -> list[Json]:
    documents: list[Any] = [
        {"b": [1, -0.0, 0.1, None], "a": {"": True}},
        [5e-05, 0.0001, 1e16, 9007199254740993.0, 123456.0, 5e-324, 1.7976931348623157e308, 2**53 - 1, 1 - 2**53],
        {"\ufb33": 1, "\U0001f600": 2, "é": 3, "z": 4, "\r": 5, "1": 6, "</": 7},
        'quote " backslash \\ slash / control \x01\n\x1f delete \x7f',
    ]
    return [
        {"document": document, "canonical": canonical_json(document).decode(), "digest": digest(document)}
        for document in documents
    ]


def _shamir(source: Source, threshold: int, points: list[int]) -> Json:
    secret, random = source(32), Recorded(source)
    shares = split(secret, threshold, points, random)
    return {
        "secret": secret.hex(),
        "threshold": threshold,
        "random": random.given.hex(),
        "shares": {str(point): share.hex() for point, share in shares.items()},
    }


def _shamir_of_extremes() -> Json:
    """The first coefficient drawn is no residue and is drawn again; then come the largest and the smallest."""
    drawn = [b"\xff" * SHARE_BYTES, ((PRIME - 1) << 7).to_bytes(SHARE_BYTES, "little"), bytes(SHARE_BYTES)]
    secret = b"\xff" * 32
    shares = split(secret, 3, [1, 2, 3], _replay(b"".join(drawn)))
    return {
        "secret": secret.hex(),
        "threshold": 3,
        "random": b"".join(drawn).hex(),
        "shares": {str(point): share.hex() for point, share in shares.items()},
    }


def _encode() -> list[Json]:
    cases = [
        ("integers", [0.0, -0.0, 1.0, -1.0, 2.0**52 + 1, -(2.0**60), 2.0**60], 0, 4),
        ("ties go to the even integer", [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999999999999994], 0, 4),
        ("denormals", [5e-324, -5e-324, 2.2250738585072014e-308], 1022, 4),
        ("denormals that vanish", [5e-324, -5e-324, 2.2250738585072014e-308], 44, 4),
        ("a negative exponent", [2.0**116, -(2.0**115), 2.0**56 * 3.5], -56, 4),
        ("at the bound of five silos", [128.0, -128.0, 127.99999999999999], 52, 5),
        ("at the bound of 1024 silos", [256.0, -256.0], 44, 1024),
        ("one silo", [2.0**62, -(2.0**62)], 0, 1),
    ]
    return [
        {
            "name": name,
            "values": values,
            "exponent": f,
            "silos": silos,
            "capacity": capacity(silos),
            "words": hex_of(encode(np.array(values), 2.0**f, silos, name)),
        }
        for name, values, f, silos in cases
    ]


def _decode() -> list[Json]:
    integers = [0, 1, -1, 2**53 + 1, 2**53 + 3, -(2**53) - 1, 2**62 - 1, -(2**62)]
    words = np.array([n % 2**64 for n in integers], np.uint64)
    return [
        {"integers": list(map(str, integers)), "exponent": f, "words": hex_of(words), "values": values.tolist()}
        for f in (-56, 0, 44, 124)
        for values in (decode(words, 2.0**f),)
    ]


def _layouts() -> list[Json]:
    found = []
    layouts = (first_layout(), second_layout(), third_layout(), third_layout())
    for layout, silo in zip(layouts, ("north", "north", "north", "west"), strict=True):
        source = Source(f"layout {layout.digest} {silo}")
        statistics = contribution(layout, source)
        for weighting in ("uniform", "examples"):
            values = statistics_values(layout, statistics, weighting, silo)
            f = exponent_list(layout, 4, weighting)
            found.append(
                {
                    "layout": json.loads(layout.to_json()),
                    "digest": layout.digest,
                    "silos": 4,
                    "silo": silo,
                    "alpha": str(ALPHA),
                    "weighting": weighting,
                    "blocks": [[block.name, list(block.shape)] for block in layout.sums],
                    "exponents": f,
                    "contribution": contribution_json(statistics),
                    "values": values,
                    "words": hex_of(encode(np.array(values), 2.0 ** np.array(f, np.float64), 4, "values")),
                }
            )
    return found


def _messages() -> list[Message]:
    about: Json = {"plan": "0123456789abcdef" * 4, "session": "fedcba9876543210" * 2}
    deltas = {"delta:é": np.array([[1.5, -2.0], [0.0, 1e-3]], np.float32), "delta:one": np.array(7.0, np.float32)}
    return [
        SurvivorsRequest(**about, round=2, sum_of="statistics", survivors=("south", "north", "east")),
        EvaluateRequest(**about, candidate="regmean", arrays=deltas),
        MaskedReply(
            **about,
            silo="north",
            sum_of="metrics",
            piece=3,
            arrays={"masked": np.array([1, 2**64 - 1, 2**32], np.uint64)},
        ),
        UploadReply(
            **about,
            silo="north",
            piece=0,
            arrays={"gram:none": np.zeros((0,), np.float32), "delta:one[0:1]": np.array([-0.0], np.float32)},
        ),
        UnmaskReply(**about, silo="north", sum_of="metrics", shares={"west": "ab" * 66, "east": "cd" * 66}),
    ]


def _packed(message: Message) -> Json:
    frame = wire.pack(message)
    return {
        "direction": type(message).__name__,
        "phase": message.phase,
        "body": message.model_dump(mode="json"),
        "arrays": [
            [name, str(array.dtype), list(array.shape), array.tobytes().hex()] for name, array in message.arrays.items()
        ],
        "header": frame.header,
        "buffers": [buffer.tobytes().hex() for buffer in frame.buffers],
        "npy": [npy.encode(buffer).hex() for buffer in frame.buffers],
    }


# What must be refused


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


def refused(good: Sequence[Json]) -> list[Json]:
    bad = Refused(good)
    _refused_cohorts(bad)
    _refused_adverts(bad)
    _refused_shares(bad)
    _refused_contributions(bad)
    _refused_survivors(bad)
    _refused_releases(bad)
    _refused_unmasking(bad)
    _refused_parts(bad)
    _refused_messages(bad)
    return bad.found


def _refused_cohorts(bad: Refused) -> None:
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


def _refused_adverts(bad: Refused) -> None:
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


def _refused_shares(bad: Refused) -> None:
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


def _refused_contributions(bad: Refused) -> None:
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


def _refused_survivors(bad: Refused) -> None:
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


def _refused_releases(bad: Refused) -> None:
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


def _refused_unmasking(bad: Refused) -> None:
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


def _refused_parts(bad: Refused) -> None:
    shares = _shamir(Source("refused"), 3, [1, 2, 3])["shares"]
    others = _shamir(Source("refused as well"), 3, [1, 2, 3])["shares"]
    prime = PRIME.to_bytes(SHARE_BYTES, "little").hex()
    for name, given in {
        "too few shares": {"1": shares["1"], "2": shares["2"]},
        "a share that is the prime": shares | {"2": prime},
        "a share of 65 bytes": shares | {"2": shares["2"][:-2]},
        "a share of 67 bytes": shares | {"2": shares["2"] + "00"},
        "shares of two secrets": shares | {"2": others["2"]},
        "a share at another point": {"1": shares["1"], "2": shares["2"], "4": shares["3"]},
    }.items():
        bad.part(name, "combine", "SecurityError", shares=given, threshold=3)
    for name, values, f, silos in (
        ("a value beyond the bound of five silos", ["128.00000000000003"], 52, 5),
        ("a value beyond the bound, negative", ["0.0", "-128.00000000000003"], 52, 5),
        ("a value that overflows", ["1e308", "0.0"], 52, 4),
        ("NaN", ["1.0", "nan"], 0, 4),
        ("infinity", ["inf"], 0, 4),
        ("minus infinity", ["-inf"], -56, 4),
    ):
        bad.part(name, "encode", "ContributionError", values=values, exponent=f, silos=silos)
    plain = npy.encode(np.arange(4, dtype=np.uint8))
    for name, data in {
        "no .npy file": b"",
        "a .npy file of version 2": plain[:6] + b"\x02" + plain[7:],
        "a .npy file with a byte too many": plain + b"\0",
        "a .npy file with a byte too few": plain[:-1],
        "a .npy file of words": plain.replace(b"|u1", b"<u2"),
        "a .npy file of Python objects": plain.replace(b"'|u1'", b"'|O' "),
    }.items():
        bad.part(name, "npy", "FederationError", data=data.hex())
    text = bad.sessions["four silos"]["plan_text"]
    key = bad.sessions["four silos"]["roster"]["south"]["identity_public"]
    for name, changed in {
        "a threshold that a lying coordinator could use": text.replace("[privacy]", "[privacy]\nthreshold = 2"),
        "a minimum below the threshold": text.replace("[privacy]", "[privacy]\nminimum-survivors = 2"),
        "more colluding than can be withstood": text.replace("colluding = 1", "colluding = 4"),
        "two silos": "\n[[silo]]".join(text.split("\n[[silo]]")[:3]),
        "a silo without a key": text.replace(f'public-key = "{key}"\n', ""),
    }.items():
        bad.part(name, "plan", "PlanError", text=changed)


def _refused_messages(bad: Refused) -> None:
    survivors, evaluate, masked, *_ = map(_packed, _messages())

    def case(name: str, good: Json, header: str | None = None, buffers: list[str] | None = None) -> None:
        given = {
            "direction": good["direction"],
            "header": good["header"] if header is None else header,
            "buffers": good["buffers"] if buffers is None else buffers,
        }
        bad.part(name, "unpack", "FederationError", **given)

    def replaced(name: str, good: Json, old: str, new: str, buffers: list[str] | None = None) -> None:
        case(name, good, good["header"].replace(old, new, 1), buffers)

    moved = survivors["header"].partition('"body"')[2].removesuffix("}")
    case("bytes after the last array", masked, buffers=[masked["buffers"][0] + "00"])
    case("an array with a byte missing", masked, buffers=[masked["buffers"][0][:-2]])
    case("no buffer where an array is announced", masked, buffers=[])
    case("a buffer where no array is announced", survivors, buffers=["00"])
    case("an empty buffer", survivors, buffers=[""])
    case("a short buffer that is not the last", masked, buffers=[masked["buffers"][0][:16], masked["buffers"][0][16:]])
    case("a header that is no JSON", survivors, survivors["header"][:-1])
    case("a header with a line break at the end", survivors, survivors["header"] + "\n")
    replaced("a header with a space", survivors, '"arrays":', '"arrays": ')
    replaced("a header with an escaped letter", survivors, '"south"', '"\\u0073outh"')
    replaced("a header without its arrays", survivors, '{"arrays":[],', "{")
    case("a header with its keys in another order", survivors, '{"body"' + moved + ',"arrays":[]}')
    replaced("a header with one key twice", survivors, '"protocol":1', '"protocol":1,"protocol":1')
    replaced("a header with one key more", survivors, '"phase"', '"extra":1,"phase"')
    replaced("a body with one key more", survivors, '"protocol"', '"more":1,"protocol"')
    replaced("a body with one key less", survivors, '"sum_of":"statistics",', "")
    replaced("another protocol version", survivors, '"protocol":1', '"protocol":2')
    replaced("a version that is no integer", survivors, '"protocol":1', '"protocol":1.0')
    replaced("a phase that there is not", survivors, '"phase":"survivors"', '"phase":"dead"')
    replaced("a sum that there is not", survivors, '"statistics"', '"gradients"')
    replaced("a nonce in capitals", survivors, "fedcba", "FEDCBA")
    replaced("a silo name that is none", survivors, '"north"', '"North"')
    replaced("a negative piece", masked, '"piece":3', '"piece":-3')
    replaced("a piece that is text", masked, '"piece":3', '"piece":"3"')
    replaced("an array of another dtype", masked, '"uint64"', '"int64"')
    replaced("an array with a negative size", masked, "[3]", "[-3]")
    replaced("an array with a size that is no integer", masked, "[3]", "[3.0]")
    replaced("an array larger than what came", masked, "[3]", "[4]")
    replaced("an array of 2^62 words", masked, "[3]", "[4611686018427387904]")
    replaced("one array twice", evaluate, "delta:one", "delta:é")
    replaced("an array in a header of another form", masked, '["masked","uint64",[3]]', '["masked","uint64"]')


def documents() -> dict[str, str]:
    good = sessions()
    files = {"secure_sum.json": {"sessions": good}, "parts.json": parts(), "refused.json": {"refused": refused(good)}}
    return {name: _text(document) + "\n" for name, document in files.items()}


def _text(value: Any, indent: int = 0) -> str:
    """JSON of which whatever fits on one line stands on one line."""
    flat = json.dumps(value, ensure_ascii=True)
    if not isinstance(value, dict | list) or len(flat) + indent <= 110:
        return flat
    start = "\n" + " " * (indent + 1)
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {_text(item, indent + 1)}" for key, item in value.items()]
        return "{" + start + f",{start}".join(lines) + "\n" + " " * indent + "}"
    return "[" + start + f",{start}".join(_text(item, indent + 1) for item in value) + "\n" + " " * indent + "]"


def main(arguments: Sequence[str]) -> int:
    differ = []
    for name, text in documents().items():
        path = HERE / name
        if "--check" in arguments:
            if not path.exists() or path.read_bytes() != text.encode("ascii"):
                differ.append(name)
        else:
            path.write_bytes(text.encode("ascii"))
    for name in differ:
        print(f"{name} is not what make.py makes", file=sys.stderr)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
