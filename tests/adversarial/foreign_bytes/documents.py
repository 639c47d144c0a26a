"""Good documents of every kind, and how long and how large one step may be."""

from __future__ import annotations

import hashlib
import random
from typing import Any, NamedTuple

import numpy as np

from gramfuse_protocol.contract.layout import Group, Layout, Linear, SharedOutputs, Tensor
from gramfuse_protocol.contract.node_key import generate
from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.messages.phases import REPLIES, REQUESTS, Message, StatisticsBody
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.secure_sum.member import Member
from gramfuse_protocol.secure_sum.statements import Advert

SECONDS = 1.0
"""Most processor time of one step."""

MEGABYTES = 256
"""Most memory of one step."""

LAYOUT = Layout(
    groups=(
        Group(
            name="a",
            d_in=3,
            structure="full",
            weights=(Linear(weight="a.weight", d_out=2, transposed=True),),
            exponents=(1, -2, 0),
        ),
        Group(name="h0", d_in=2, structure="block:2", weights=(Linear(weight="h", d_out=1, transposed=True),), part=0),
        Group(name="h1", d_in=2, structure="diagonal", weights=(Linear(weight="h", d_out=2, transposed=True),), part=1),
    ),
    tensors=(
        Tensor(name="a.weight", shape=(2, 3), merge="regmean"),
        Tensor(name="h", shape=(3, 2), merge="regmean", parted=True),
        Tensor(name="a.bias", shape=(2,), merge="mean"),
    ),
    frozen=("e",),
    parts=(SharedOutputs(silos=("a", "b"), outputs=(0,)), SharedOutputs(silos=("b", "c"), outputs=(1, 2))),
)

NAMES = ("north", "south", "east")
IDENTITIES = {name: Identity(hashlib.sha256(name.encode()).digest()) for name in NAMES}
NODE_KEY = generate()[1]

PLAN = """[plan]
name = "clinics"

[model]
base = "bundled:minilm"
task = "multi-label"
labels = ["an ä", "b", "c"]
threshold = 0.25

[training]
learning-rate = 2e-5
freeze = ["embeddings", "*.layer.0.*"]

[merge]
alpha = 0.9
gram = { "*" = "full", "*.1.*" = "block:64" }
rounds = 2

[privacy]
colluding = 1
metrics = "sum"
""" + "".join(
    f'\n[[silo]]\nname = "{name}"\npublic-key = "{IDENTITIES[name].public.hex()}"\n'
    + (f'node-key = "{NODE_KEY}"\n' if name == "north" else "")
    for name in NAMES
)

SILO = f"""name = "north"
state = "state"
threads = 2
approved = ["{"ab" * 32}"]

[data]
train = "train.jsonl"
held-out = 0.2

[limits]
minimum-examples = 50
train-hours = "20:00-06:00"

[coordinator]
address = "[2001:db8::1]:9092"
"""

ABOUT: dict[str, Any] = {"plan": "0" * 63 + "a", "session": "f" * 32, "round": 2}
ROSTER = Roster(ABOUT["plan"], {name: identity.public for name, identity in IDENTITIES.items()}, 3, 3)


class Transcript(NamedTuple):
    """All that crossed the coordinator's door in the first phases of a session."""

    members: tuple[Member, ...]
    adverts: tuple[Advert, ...]
    sealed: dict[str, dict[str, bytes]]


def transcript() -> Transcript:
    draw = random.Random(3).randbytes
    begun = [secure_sum.advertise(ROSTER, ABOUT["session"], n, NAMES, IDENTITIES[n], draw) for n in NAMES]
    adverts = tuple(member.advert for member in begun)
    shared = [secure_sum.share(ROSTER, member, adverts, draw) for member in begun]
    return Transcript(
        tuple(member for member, _ in shared), adverts, {member.name: sealed for member, sealed in shared}
    )


TRANSCRIPT = transcript()


def messages() -> tuple[list[Message], list[Any]]:
    """Return good requests and replies, one of each phase at least."""
    delta = {"delta:a.weight": np.ones((2, 3), np.float32), "delta:a.bias": np.zeros(2, np.float32)}
    sealed = {name: {peer: data.hex() for peer, data in of.items()} for name, of in TRANSCRIPT.sealed.items()}
    bodies: dict[str, dict[str, Any]] = {
        "join": {"plan_text": PLAN, "layout": LAYOUT.to_json()},
        "train": {"arrays": delta},
        "keys": {"cohort": NAMES},
        "shares": {"adverts": TRANSCRIPT.adverts},
        "masked": {"sum_of": "statistics", "sealed": sealed["south"], "piece": 1, "piece_bytes": 64},
        "survivors": {"sum_of": "metrics", "survivors": NAMES},
        "unmask": {"sum_of": "metrics", "signatures": dict.fromkeys(NAMES, "ab" * 64)},
        "upload": {"piece": 0, "piece_bytes": 64},
        "evaluate": {"candidate": "regmean", "arrays": delta},
        "finish": {},
    }
    replies: dict[str, dict[str, Any]] = {
        "join": {},
        "train": {"examples": 7, "tokens": {"a": 9, "h0": 4}},
        "keys": {"advert": TRANSCRIPT.adverts[0]},
        "shares": {"sealed": sealed["north"]},
        "masked": {"sum_of": "statistics", "piece": 1, "arrays": {"masked": np.arange(8, dtype="<u8")}},
        "survivors": {"sum_of": "metrics", "signature": "ab" * 64},
        "unmask": {"sum_of": "metrics", "shares": dict.fromkeys(NAMES, "cd" * 66)},
        "upload": {"piece": 0, "arrays": delta},
        "evaluate": {"candidate": "regmean", "arrays": {"sums": np.ones((3, 3))}},
        "finish": {},
        "refusal": {"error": "RefusalError", "exit_code": 13, "reason": "not today"},
    }
    whole = {block.name: np.ones(block.shape, np.float32) for block in LAYOUT.blocks}
    tokens = {group.name: 5 for group in LAYOUT.groups}
    statistics = StatisticsBody(layout=LAYOUT.to_json(), examples=3, tokens=tokens, arrays=whole)
    return (
        [REQUESTS[phase](**ABOUT, **body) for phase, body in bodies.items()],
        [*(REPLIES[phase](**ABOUT, silo="north", **body) for phase, body in replies.items()), statistics],
    )


ASKED, SAID = messages()
EVERY_REPLY: dict[str, Any] = {**REPLIES, "statistics": StatisticsBody}
