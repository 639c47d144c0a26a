"""The secure sum a second time, for the tests: written from docs/protocol.md, without gramfuse and without NumPy.

Short rather than fast. Keys, digests, shares and signatures are hexadecimal text, as in the messages; a vector of words
is a list of integers. Whatever must not be raises Refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

SUMS = ("statistics", "metrics")
PRIME = 2**521 - 1
WRAP = 2**64
BUFFER = 2**25
ITEM = {"float32": 4, "float64": 8, "uint64": 8}

Random = Callable[[int], bytes]


class Refused(Exception):
    """What was asked for or sent breaks the protocol."""


def must(condition: object, why: str) -> None:
    if not condition:
        raise Refused(why)


# Bytes


def framed(label: str, *fields: bytes | str) -> bytes:
    data = [f.encode() if isinstance(f, str) else f for f in (f"gramfuse/1 {label}", *fields)]
    return b"".join(struct.pack("<I", len(f)) + f for f in data)


def hashed(label: str, *fields: bytes | str) -> bytes:
    return hashlib.sha256(framed(label, *fields)).digest()


def derived(secret: bytes, label: str, *fields: bytes | str) -> bytes:
    """HKDF-SHA-256 of one block: extract with a salt of zeros, expand once."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, framed(label, *fields) + b"\x01", "sha256")


def agreed(private: bytes, public: str) -> bytes:
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(bytes.fromhex(public))
        )
    except ValueError:  # the library refuses a secret of zeros
        raise Refused("a public key of low order") from None
    must(any(secret), "a public key of low order")
    return secret


def public(private: bytes) -> str:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def check_signature(key: str, signature: str, statement: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), statement)
    except InvalidSignature:
        raise Refused("a forged signature") from None


# Shamir


def split(secret: bytes, threshold: int, points: Sequence[int], random: Random) -> dict[int, str]:
    polynomial = [int.from_bytes(secret, "little")]
    while len(polynomial) < threshold:
        coefficient = int.from_bytes(random(66), "little") // 128
        if coefficient < PRIME:
            polynomial.append(coefficient)
    values = {x: sum(a * pow(x, k, PRIME) for k, a in enumerate(polynomial)) % PRIME for x in points}
    return {x: value.to_bytes(66, "little").hex() for x, value in values.items()}


def share_value(share: str) -> int:
    value = int.from_bytes(bytes.fromhex(share), "little")
    must(len(share) == 132 and value < PRIME, "not a share")
    return value


def combine(shares: Mapping[int, str], threshold: int) -> bytes:
    must(len(shares) >= threshold, "too few shares")
    points = sorted(shares)[:threshold]
    secret = 0
    for x in points:
        others = [y for y in points if y != x]
        at_zero = math.prod(others) * pow(math.prod(y - x for y in others), -1, PRIME)
        secret += share_value(shares[x]) * at_zero
    secret %= PRIME
    must(secret < 2**256, "shares of different secrets")
    return secret.to_bytes(32, "little")


# Words


def stream(key: bytes, count: int, start: int = 0) -> list[int]:
    """`count` words of a mask, from an even word on."""
    cipher = Cipher(algorithms.AES(key), modes.CTR((start // 2).to_bytes(16, "big"))).encryptor()
    return list(struct.unpack(f"<{count}Q", cipher.update(bytes(8 * count))))


def added(vectors: Sequence[Sequence[int]], signs: Sequence[int]) -> list[int]:
    columns = zip(*vectors, strict=True)
    return [sum(s * w for s, w in zip(signs, words, strict=True)) % WRAP for words in columns]


def capacity(silos: int) -> int:
    k = 62
    while silos * 2**k > 2**62:
        k -= 1
    return k


def encode(values: Sequence[float], exponents: Sequence[int], silos: int) -> list[int]:
    words = []
    for value, f in zip(values, exponents, strict=True):
        must(math.isfinite(value), "a value that is no number")
        q = round(Fraction(value) * Fraction(2) ** f)  # to nearest, ties to even
        must(abs(q) <= 2 ** capacity(silos), "a value beyond the range")
        words.append(q % WRAP)
    return words


def decode(words: Sequence[int], exponents: Sequence[int]) -> list[float]:
    signed = [word - WRAP if word >= WRAP // 2 else word for word in words]
    return [float(q / Fraction(2) ** f) for q, f in zip(signed, exponents, strict=True)]


# What is summed


def packed(group: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The (row, column) of each packed entry of a group's Gram matrix; those of experts stand along one diagonal."""
    d, structure = group["d_in"], group["structure"]
    b = {"full": d, "diagonal": 1}.get(structure) or min(d, int(structure.removeprefix("block:")))
    ends = [min(d, j - j % b + b) for j in range(d)]
    one = [(j, k) for j in range(d) for k in range(j, ends[j])]
    return [(d * expert + j, d * expert + k) for expert in range(group["experts"] or 1) for j, k in one]


def exponents(layout: Mapping[str, Any], silos: int, weighting: str) -> list[int]:
    """f for every word of the statistics."""
    room = capacity(silos) - {"uniform": 0, "examples": 18}[weighting]
    s: list[int] = []
    t: list[int] = []
    for group in layout["groups"]:
        e = group["exponents"]
        g = min(e)
        while Fraction(4) ** g < sum(Fraction(4) ** x for x in e):
            g += 1
        outputs = sum(weight["d_out"] for weight in group["weights"])
        s += [room - 20 - e[j % len(e)] - e[k % len(e)] for j, k in packed(group)]
        t += [room - 20 - x - g for x in e * (group["experts"] or 1) for _ in range(outputs)]
    m: list[int] = []
    for tensor in layout["tensors"]:
        m += [room - (24 if tensor["buffer"] else 8)] * math.prod(tensor["shape"])
    return [0] * (2 + len(layout["groups"]) + len(layout["parts"])) + s + t + m


def summands(
    layout: Mapping[str, Any], contribution: Mapping[str, Any], alpha: str, weighting: str, silo: str
) -> list[Fraction]:
    """Every value that a silo adds to the statistics, exactly."""
    whole = Fraction(contribution["examples"] if weighting == "examples" else 1)
    held = [whole if silo in part["silos"] else Fraction(0) for part in layout["parts"]]
    by_output = {o: c for part, c in zip(layout["parts"], held, strict=True) for o in part["outputs"]}
    blocks = {name: [Fraction(x) for x in values] for name, values in contribution["blocks"].items()}
    s, t, m, tokens = [], [], [], []
    for group in layout["groups"]:
        part = group["part"]
        c = whole if part is None else held[part]
        tokens.append(Fraction(contribution["tokens"][group["name"]] if c else 0))
        shrunk: dict[tuple[int, int], Fraction] = {}
        for (j, k), value in zip(packed(group), blocks["gram:" + group["name"]], strict=True):
            shrunk[j, k] = shrunk[k, j] = c * value * (1 if j == k else Fraction(alpha))
            s.append(shrunk[j, k])
        d, experts = group["d_in"], group["experts"] or 1
        for expert, j in ((expert, j) for expert in range(experts) for j in range(d)):
            for weight in group["weights"]:
                delta = blocks["delta:" + weight["weight"]]
                outputs = len(delta) // d // experts
                own = delta[expert * d * outputs : (expert + 1) * d * outputs]
                for o in range(outputs) if part is None else layout["parts"][part]["outputs"]:
                    t.append(
                        sum(
                            shrunk.get((expert * d + j, expert * d + i), Fraction(0))
                            * own[o * d + i if weight["transposed"] else i * outputs + o]
                            for i in range(d)
                        )
                        + Fraction(0)
                    )
    for tensor in layout["tensors"]:
        delta = blocks["delta:" + tensor["name"]]
        each = len(delta) // tensor["shape"][0] if tensor["parted"] else 0
        weight = Fraction(1) if tensor["merge"] == "sum" else whole
        m += [(by_output[i // each] if tensor["parted"] else weight) * x for i, x in enumerate(delta)]
    return [whole, Fraction(contribution["examples"]), *tokens, *held, *s, *t, *m]


# Statements


def advert_fields(advert: Mapping[str, Any]) -> list[bytes | str]:
    keys = [advert["channel"]]
    for name in SUMS:
        keys += [advert["masks"][name], advert["commitments"][name]]
    return [advert["silo"], *map(bytes.fromhex, keys)]


def advert_statement(plan: str, nonce: str, advert: Mapping[str, Any]) -> bytes:
    return framed("advert", bytes.fromhex(plan), bytes.fromhex(nonce), *advert_fields(advert))


def model_digest(start: Sequence[float]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(start)}f", *start)).hexdigest()


def round_digest(plan: str, number: int, start: str) -> str:
    return plan if number == 1 else hashed("round", bytes.fromhex(plan), str(number), bytes.fromhex(start)).hex()


def session_of(plan: str, nonce: str, adverts: Sequence[Mapping[str, Any]]) -> bytes:
    fields = [field for advert in adverts for field in advert_fields(advert)]
    return hashed("session", bytes.fromhex(plan), bytes.fromhex(nonce), *fields)


def survivors_statement(
    session: bytes, name: str, members: Sequence[str], survivors: Sequence[str], context: str
) -> bytes:
    lists = [framed("survivors", *members), framed("survivors", *survivors)]
    return framed("survivors", session, name, *lists, bytes.fromhex(context))


def metrics_context(candidates: Mapping[str, str]) -> str:
    fields = [field for name, digest in candidates.items() for field in (name, bytes.fromhex(digest))]
    return hashed("context", *fields).hex()


# The two sides


class Roster:
    def __init__(self, plan: str, silos: Mapping[str, str], threshold: int, minimum: int) -> None:
        self.plan, self.silos, self.threshold = plan, dict(silos), threshold
        self.floor = max(threshold, minimum)
        self.point = {name: n for n, name in enumerate(silos, 1)}

    def check(self, names: Sequence[str], within: Sequence[str]) -> None:
        must(set(names) <= set(within), "an unknown silo")
        places = [self.point[name] for name in names]
        must(places == sorted(set(places)), "twice, or out of order")
        must(len(names) >= self.floor, "too few silos")


class Silo:
    """One silo in one session. Its steps in order: advertise, share, receive, contribute, sign, release."""

    def __init__(self, roster: Roster, name: str, identity: str) -> None:
        self.roster, self.name = roster, name
        self.identity = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(identity))
        self.adverts: dict[str, Mapping[str, Any]] = {}
        self.members: dict[str, list[str]] = {}
        self.sent: dict[str, tuple[list[int], str]] = {}
        self.signed: dict[str, tuple[list[str], str]] = {}

    def advertise(self, nonce: str, cohort: Sequence[str], random: Random) -> Mapping[str, Any]:
        self.roster.check(cohort, list(self.roster.silos))
        must(self.name in cohort, "not invited")
        key = self.identity.public_key().public_bytes_raw().hex()
        must(self.roster.silos[self.name] == key, "the roster has another key")
        self.nonce, self.cohort, self.channel = nonce, list(cohort), random(32)
        self.secrets = {(name, kind): random(32) for name in SUMS for kind in ("mask", "seed")}
        self.advert: dict[str, Any] = {
            "silo": self.name,
            "channel": public(self.channel),
            "masks": {name: public(self.secrets[name, "mask"]) for name in SUMS},
            "commitments": {name: hashed("commitment", self.secrets[name, "seed"]).hex() for name in SUMS},
        }
        statement = advert_statement(self.roster.plan, nonce, self.advert)
        self.advert["signature"] = self.identity.sign(statement).hex()
        return self.advert

    def share(self, adverts: Sequence[Mapping[str, Any]], random: Random) -> dict[str, str]:
        must(not self.adverts, "a second list of keys")
        self.roster.check([advert["silo"] for advert in adverts], self.cohort)
        for advert in adverts:
            statement = advert_statement(self.roster.plan, self.nonce, advert)
            check_signature(self.roster.silos[advert["silo"]], advert["signature"], statement)
        keys = [key for advert in adverts for key in (advert["channel"], *advert["masks"].values())]
        must(len(keys) == len(set(keys)), "one key twice")
        must(self.advert in adverts, "own keys left out or changed")
        present = {advert["silo"]: advert for advert in adverts}
        session = session_of(self.roster.plan, self.nonce, adverts)
        points = [self.roster.point[name] for name in present]
        split_up = [split(secret, self.roster.threshold, points, random) for secret in self.secrets.values()]
        dealt = {name: [shares[self.roster.point[name]] for shares in split_up] for name in present}
        sealed = {}
        for peer in present.keys() - {self.name}:
            for name in SUMS:
                agreed(self.secrets[name, "mask"], present[peer]["masks"][name])
            key = derived(agreed(self.channel, present[peer]["channel"]), "channel", session, self.name, peer)
            plain = bytes.fromhex("".join(dealt[peer]))
            about = framed("channel", session, self.name, peer)
            sealed[peer] = ChaCha20Poly1305(key).encrypt(bytes(12), plain, about).hex()
        self.adverts, self.session, self.held = present, session, {self.name: dealt[self.name]}
        return sealed

    def receive(self, sealed: Mapping[str, str]) -> None:
        must(self.adverts and not self.members, "not now")
        must(sealed.keys() <= self.adverts.keys() - {self.name}, "shares of a stranger")
        members = [name for name in self.adverts if name in sealed or name == self.name]
        self.roster.check(members, list(self.adverts))
        held = {}
        for peer, data in sealed.items():
            secret = agreed(self.channel, self.adverts[peer]["channel"])
            key = derived(secret, "channel", self.session, peer, self.name)
            try:
                plain = ChaCha20Poly1305(key).decrypt(
                    bytes(12), bytes.fromhex(data), framed("channel", self.session, peer, self.name)
                )
            except InvalidTag:
                raise Refused("shares that do not open") from None
            must(len(plain) == 4 * 66, "no four shares")
            held[peer] = [plain[at : at + 66].hex() for at in range(0, len(plain), 66)]
            for share in held[peer]:
                share_value(share)
        self.held |= held
        self.members["statistics"] = members

    def contribute(self, name: str, words: Sequence[int], context: str) -> list[int]:
        must(name in self.members, "members unknown")
        sent = (list(words), context)
        must(self.sent.setdefault(name, sent) == sent, "two vectors under one mask, or one about two things")
        keys, signs = [self_key(self.secrets[name, "seed"], self.session, name, context, self.name)], [1]
        for peer in self.members[name]:
            if peer != self.name:
                secret = agreed(self.secrets[name, "mask"], self.adverts[peer]["masks"][name])
                keys.append(pair_key(self.roster, secret, self.session, name, context, self.name, peer))
                signs.append(1 if self.roster.point[self.name] < self.roster.point[peer] else -1)
        return added([words, *(stream(key, len(words)) for key in keys)], [1, *signs])

    def sign(self, name: str, survivors: Sequence[str]) -> str:
        must(name in self.members and name in self.sent, "nothing was sent")
        context = self.sent[name][1]
        self.roster.check(survivors, self.members[name])
        must(self.name in survivors, "said to be dead")
        signed = (list(survivors), context)
        must(self.signed.setdefault(name, signed) == signed, "a second list of survivors")
        if name == "statistics":
            self.members["metrics"] = list(survivors)
        statement = survivors_statement(self.session, name, self.members[name], survivors, context)
        return self.identity.sign(statement).hex()

    def release(self, name: str, signatures: Mapping[str, str]) -> dict[str, str]:
        must(name in self.signed, "nothing was signed")
        must((name, "seed") in self.secrets, "wiped")
        survivors, context = self.signed[name]
        check_survivors(self.roster, self.session, name, self.members[name], survivors, context, signatures)
        place = 2 * SUMS.index(name)
        return {peer: self.held[peer][place + (peer in survivors)] for peer in self.members[name]}

    def wipe(self, name: str) -> None:
        del self.secrets[name, "mask"], self.secrets[name, "seed"]


def check_survivors(
    roster: Roster,
    session: bytes,
    name: str,
    members: Sequence[str],
    survivors: Sequence[str],
    context: str,
    signatures: Mapping[str, str],
) -> None:
    must(set(signatures) <= set(survivors) and len(signatures) >= roster.threshold, "not enough survivors signed")
    statement = survivors_statement(session, name, members, survivors, context)
    for silo, signature in signatures.items():
        check_signature(roster.silos[silo], signature, statement)


def self_key(seed: bytes, session: bytes, name: str, context: str, owner: str) -> bytes:
    return derived(seed, "self mask", session, name, bytes.fromhex(context), owner)


def pair_key(roster: Roster, secret: bytes, session: bytes, name: str, context: str, one: str, other: str) -> bytes:
    pair = sorted((one, other), key=roster.point.__getitem__)
    return derived(secret, "pair mask", session, name, bytes.fromhex(context), *pair)


def unmask(
    roster: Roster,
    nonce: str,
    adverts: Sequence[Mapping[str, Any]],
    name: str,
    members: Sequence[str],
    context: str,
    masked: Mapping[str, Sequence[int]],
    shares: Mapping[str, Mapping[str, str]],
) -> list[int]:
    """The coordinator's last step: the sum of the survivors' words, without masks."""
    session = session_of(roster.plan, nonce, adverts)
    present = {advert["silo"]: advert for advert in adverts}
    must(all(set(given) == set(members) for given in shares.values()), "not one share for each member")
    vectors, signs = list(masked.values()), [1] * len(masked)
    size = len(vectors[0])
    for owner in members:
        secret = combine({roster.point[by]: given[owner] for by, given in shares.items()}, roster.threshold)
        if owner in masked:
            must(hashed("commitment", secret).hex() == present[owner]["commitments"][name], "another seed")
            vectors.append(stream(self_key(secret, session, name, context, owner), size))
            signs.append(-1)
        else:
            must(public(secret) == present[owner]["masks"][name], "another mask key")
            for survivor in masked:
                shared = agreed(secret, present[survivor]["masks"][name])
                vectors.append(stream(pair_key(roster, shared, session, name, context, owner, survivor), size))
                signs.append(-1 if roster.point[survivor] < roster.point[owner] else 1)
    return added(vectors, signs)


# Documents and messages


def canonical(document: Any) -> str:
    """JSON in canonical form; a float becomes a string."""
    if isinstance(document, float):
        must(math.isfinite(document), "no number")
        return f'"{document!r}"'
    if isinstance(document, dict):
        keys = sorted(document, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(f"{canonical(key)}:{canonical(document[key])}" for key in keys) + "}"
    if isinstance(document, list):
        return "[" + ",".join(map(canonical, document)) + "]"
    return json.dumps(document, ensure_ascii=False)


def pack(phase: str, body: Mapping[str, Any], arrays: Mapping[str, tuple[str, list[int], bytes]]) -> tuple[str, bytes]:
    """A message's header, and its buffers in one."""
    index = [[name, dtype, shape] for name, (dtype, shape, _) in arrays.items()]
    header = canonical({"arrays": index, "body": dict(body), "phase": phase})
    return header, b"".join(data for *_, data in arrays.values())


def unpack(header: str, buffers: Sequence[bytes], fields: Mapping[str, set[str]]) -> tuple[str, Any, Any]:
    """Phase, body and arrays. `fields`: what the bodies of each phase have; what the fields hold is not looked at."""
    try:
        document = json.loads(header)
        must(document["body"].keys() == fields[document["phase"]], "another phase or other fields")
        must(canonical(document) == header and document.keys() == {"arrays", "body", "phase"}, "not canonical")
        must(all(len(b) == BUFFER for b in buffers[:-1]) and all(0 < len(b) <= BUFFER for b in buffers), "buffers")
        data, arrays = b"".join(buffers), {}
        for name, dtype, shape in document["arrays"]:
            must(isinstance(name, str) and name not in arrays, "an array twice")
            must(all(type(size) is int and size >= 0 for size in shape), "a shape")
            size = ITEM[dtype] * math.prod(shape)
            must(size <= len(data), "an array too long")
            arrays[name], data = (dtype, shape, data[:size]), data[size:]
        must(not data, "bytes of no array")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"no message: {error}") from None
    return document["phase"], document["body"], arrays
