"""Shares, values, files, plans and messages that must be refused."""

from __future__ import annotations

import numpy as np

from gramfuse_protocol.messages import npy
from gramfuse_protocol.secure_sum.shares import PRIME, SHARE_BYTES
from tests.vectors.made.messages import messages, packed
from tests.vectors.made.parts import shamir
from tests.vectors.made.refused_steps import Refused
from tests.vectors.made.sources import Json, Source


def refused_parts(bad: Refused) -> None:
    shares = shamir(Source("refused"), 3, [1, 2, 3])["shares"]
    others = shamir(Source("refused as well"), 3, [1, 2, 3])["shares"]
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


def refused_messages(bad: Refused) -> None:
    survivors, evaluate, masked, *_ = map(packed, messages())

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
