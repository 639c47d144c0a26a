"""Small vectors of each part of the protocol."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from gramfuse_protocol.canonical import canonical_json, digest
from gramfuse_protocol.contract.roster import smallest_threshold
from gramfuse_protocol.secure_sum.fixed_point import capacity, decode, encode
from gramfuse_protocol.secure_sum.keys import Purpose, derive, framed
from gramfuse_protocol.secure_sum.shares import PRIME, SHARE_BYTES, split
from gramfuse_protocol.secure_sum.statements import commitment, metrics_context, model_digest, round_digest
from tests.vectors.made.contributions import (
    ALPHA,
    contribution,
    contribution_json,
    exponent_list,
    first_layout,
    second_layout,
    statistics_values,
    third_layout,
)
from tests.vectors.made.messages import messages, packed
from tests.vectors.made.sources import Json, Recorded, Source, hex_of, replay, stream


def parts() -> Json:
    source = Source("parts")
    return {
        "canonical": _canonical(),
        "framed": [
            {"label": str(label), "fields": fields, "framed": framed(label, *map(bytes.fromhex, fields)).hex()}
            for label, fields in (
                (Purpose.CONTEXT, []),
                (Purpose.ADVERT, [""]),
                (Purpose.SURVIVORS, ["00", "", "6e6f727468"]),
                (Purpose.SELF, [source(300).hex()]),
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
                (bytes(32), Purpose.CHANNEL, []),
                (source(32), Purpose.PAIR, [source(32).hex(), "", "ff"]),
            )
        ],
        "thresholds": [
            {"silos": n, "colluding": c, "threshold": smallest_threshold(n, c)}
            for n in (3, 4, 5, 10, 1024)
            for c in (0, 1, 2)
        ],
        "shares": [shamir(source, 1, [1]), shamir(source, 3, [1, 2, 5, 1024]), _shamir_of_extremes()],
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
        "wire": [packed(message) for message in messages()],
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


def shamir(source: Source, threshold: int, points: list[int]) -> Json:
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
    shares = split(secret, 3, [1, 2, 3], replay(b"".join(drawn)))
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
