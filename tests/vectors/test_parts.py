"""Small vectors of each part, in gramfuse and in independent.py."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from gramfuse_model.normal_equations import summands
from gramfuse_protocol.canonical import canonical_json, digest
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.roster import smallest_threshold
from gramfuse_protocol.messages import npy, wire
from gramfuse_protocol.messages import phases as messages_module
from gramfuse_protocol.secure_sum import masks
from gramfuse_protocol.secure_sum.fixed_point import capacity, decode, encode
from gramfuse_protocol.secure_sum.keys import Purpose, derive, framed
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.secure_sum.shares import split
from gramfuse_protocol.secure_sum.statements import commitment, metrics_context, model_digest, round_digest
from gramfuse_protocol.statistics.contribution import Statistics
from tests.vectors import independent
from tests.vectors.replaying import PARTS, Json, Other, Ours, Replayed, hex_of, integers_of, words_of


@pytest.mark.parametrize("vector", PARTS["canonical"], ids=lambda vector: vector["digest"][:8])
def test_canonical_form(vector: Json) -> None:
    assert canonical_json(vector["document"]).decode() == vector["canonical"]
    assert independent.canonical(vector["document"]) == vector["canonical"]
    assert digest(vector["document"]) == vector["digest"]
    assert hashlib.sha256(vector["canonical"].encode()).hexdigest() == vector["digest"]


@pytest.mark.parametrize("vector", PARTS["framed"], ids=lambda vector: vector["label"][11:])
def test_framing(vector: Json) -> None:
    fields = [bytes.fromhex(field) for field in vector["fields"]]
    assert framed(Purpose(vector["label"]), *fields).hex() == vector["framed"]
    assert independent.framed(vector["label"].removeprefix("gramfuse/1 "), *fields).hex() == vector["framed"]


@pytest.mark.parametrize("vector", PARTS["commitment"], ids=lambda vector: vector["seed"][:8])
def test_commitment(vector: Json) -> None:
    seed = bytes.fromhex(vector["seed"])
    assert commitment(seed) == independent.hashed("commitment", seed).hex() == vector["commitment"]


@pytest.mark.parametrize("vector", PARTS["derive"], ids=lambda vector: vector["label"][11:])
def test_derivation(vector: Json) -> None:
    secret, fields = bytes.fromhex(vector["secret"]), [bytes.fromhex(field) for field in vector["fields"]]
    assert derive(secret, Purpose(vector["label"]), *fields).hex() == vector["key"]
    assert independent.derived(secret, vector["label"].removeprefix("gramfuse/1 "), *fields).hex() == vector["key"]


@pytest.mark.parametrize("vector", PARTS["thresholds"], ids=lambda vector: f"{vector['silos']}-{vector['colluding']}")
def test_thresholds(vector: Json) -> None:
    n, c, t = vector["silos"], vector["colluding"], vector["threshold"]
    assert smallest_threshold(n, c) == t
    assert 2 * t > n + c >= 2 * (t - 1)


@pytest.mark.parametrize("vector", PARTS["shares"], ids=["one", "three", "extremes"])
def test_shares(vector: Json) -> None:
    secret, points = bytes.fromhex(vector["secret"]), [int(point) for point in vector["shares"]]
    for divide in (split, independent.split):
        random = Replayed(vector["random"])
        shares = divide(secret, vector["threshold"], points, random)
        as_text = {str(x): share.hex() if isinstance(share, bytes) else share for x, share in shares.items()}
        assert as_text == vector["shares"]
        assert not random.left
    for side in (Ours, Other):
        last = dict(list(vector["shares"].items())[-vector["threshold"] :])
        assert side.combine(last, vector["threshold"]) == vector["secret"]
        assert side.combine(vector["shares"], vector["threshold"]) == vector["secret"]


@pytest.mark.parametrize("vector", PARTS["masks"], ids=lambda vector: f"{vector['key'][:4]}-{vector['start']}")
def test_masks(vector: Json) -> None:
    key, start = bytes.fromhex(vector["key"]), vector["start"]
    expected = integers_of(vector["words"])
    assert independent.stream(key, len(expected), start) == expected
    words = np.zeros(len(expected), np.uint64)
    masks.apply(words, [masks.Mask(key, 1)], start)
    assert words.tolist() == expected
    masks.apply(words, [masks.Mask(key, -1)], start)
    masks.apply(words, [masks.Mask(key, -1)], start)
    assert words.tolist() == [-word % 2**64 for word in expected]


def test_a_mask_entered_later_goes_on_where_the_first_part_ended() -> None:
    whole, later = PARTS["masks"][1], PARTS["masks"][2]
    assert whole["start"] == 0
    words = np.zeros(11, np.uint64)
    masks.apply(words, [masks.Mask(bytes.fromhex(later["key"]), 1)], 0)
    assert words[6:].tolist() == integers_of(later["words"])


@pytest.mark.parametrize("vector", PARTS["encode"], ids=lambda vector: vector["name"].replace(" ", "-"))
def test_encoding(vector: Json) -> None:
    values, f, silos = vector["values"], vector["exponent"], vector["silos"]
    assert hex_of(encode(np.array(values), 2.0**f, silos, "values")) == vector["words"]
    assert independent.encode(values, [f] * len(values), silos) == integers_of(vector["words"])
    assert capacity(silos) == independent.capacity(silos) == vector["capacity"]
    # The bound is met, not passed.
    integers = [word - 2**64 if word >> 63 else word for word in integers_of(vector["words"])]
    assert max(map(abs, integers)) <= 2 ** vector["capacity"]


@pytest.mark.parametrize("vector", PARTS["decode"], ids=lambda vector: str(vector["exponent"]))
def test_decoding(vector: Json) -> None:
    words, f = integers_of(vector["words"]), vector["exponent"]
    assert words == [int(integer) % 2**64 for integer in vector["integers"]]
    assert decode(words_of(vector["words"]), 2.0**f).tolist() == vector["values"]
    assert independent.decode(words, [f] * len(words)) == vector["values"]


@pytest.mark.parametrize(
    "vector", PARTS["layouts"], ids=lambda vector: f"{vector['digest'][:8]}-{vector['silo']}-{vector['weighting']}"
)
def test_layout_and_scales(vector: Json) -> None:
    silos, weighting = vector["silos"], vector["weighting"]
    layout = Layout.parse(json.dumps(vector["layout"]))
    assert layout.digest == vector["digest"]
    assert [[block.name, list(block.shape)] for block in layout.sums] == vector["blocks"]
    assert sum(math.prod(shape) for _, shape in vector["blocks"]) == len(vector["exponents"]) == layout.sum_entries
    assert independent.exponents(vector["layout"], silos, weighting) == vector["exponents"]
    given = vector["contribution"]
    shapes = {block.name: block.shape for block in layout.blocks}
    blocks = {name: np.array(values, np.float32).reshape(shapes[name]) for name, values in given["blocks"].items()}
    statistics = Statistics(given["examples"], given["tokens"], blocks)
    values, words = [], []
    summed = summands(layout, statistics, alpha=float(vector["alpha"]), weighting=weighting, silo=vector["silo"])
    for (block, value), (_, scale) in zip(summed, scales(layout, silos, weighting), strict=True):
        scaled = np.broadcast_to(scale, block.shape).reshape(-1)
        values += np.asarray(value).reshape(-1).tolist()
        words.append(encode(np.asarray(value).reshape(-1), scaled, silos, block.name))
    assert values == vector["values"]
    assert hex_of(np.concatenate(words)) == vector["words"]
    exact = independent.summands(vector["layout"], given, vector["alpha"], weighting, vector["silo"])
    assert exact == [Fraction(value) for value in vector["values"]]
    assert independent.encode(exact, vector["exponents"], silos) == integers_of(vector["words"])


@pytest.mark.parametrize("vector", PARTS["metrics_context"], ids=["none", "two", "two the other way round"])
def test_metrics_context(vector: Json) -> None:
    candidates = dict(vector["candidates"])
    assert metrics_context(candidates) == independent.metrics_context(candidates) == vector["context"]


@pytest.mark.parametrize("vector", PARTS["rounds"], ids=["first", "second", "another start", "another round"])
def test_rounds(vector: Json) -> None:
    plan, number, start = (vector[key] for key in ("plan", "round", "start"))
    if start:
        ours = model_digest(np.array([value], np.float32) for value in start)
        assert ours == independent.model_digest(start) == vector["start_digest"]
    digest = vector["start_digest"]
    assert round_digest(plan, number, digest) == independent.round_digest(plan, number, digest) == vector["digest"]


@pytest.mark.parametrize("vector", PARTS["wire"], ids=lambda vector: vector["direction"])
def test_messages(vector: Json) -> None:
    arrays = {n: np.frombuffer(bytes.fromhex(data), t).reshape(s) for n, t, s, data in vector["arrays"]}
    kind = getattr(messages_module, vector["direction"])
    message = kind.model_validate_json(json.dumps(vector["body"])).model_copy(update={"arrays": arrays})
    frame = wire.pack(message)
    buffers = [buffer.tobytes().hex() for buffer in frame.buffers]
    assert (frame.header, buffers) == (vector["header"], vector["buffers"])
    assert [npy.encode(buffer).hex() for buffer in frame.buffers] == vector["npy"]
    for buffer, file in zip(frame.buffers, vector["npy"], strict=True):
        assert npy.decode(bytes.fromhex(file)).tobytes() == buffer.tobytes()
    read = Ours.unpack(vector["direction"], vector["header"], vector["buffers"])
    assert read.model_dump(mode="json") == vector["body"]
    assert {name: array.tobytes() for name, array in read.arrays.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    plain = {name: (dtype, shape, bytes.fromhex(data)) for name, dtype, shape, data in vector["arrays"]}
    header, data = independent.pack(vector["phase"], vector["body"], plain)
    assert (header, data.hex()) == (vector["header"], "".join(vector["buffers"]))
    assert Other.unpack(vector["direction"], header, vector["buffers"]) == (vector["phase"], vector["body"], plain)
