"""Masks of few bits, of one scalar, of zeros, from a generator of statistics, or related to each other."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import numpy as np
import pytest

import gramfuse_protocol
from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum import unmasking as unmask
from gramfuse_protocol.secure_sum.fixed_point import capacity
from gramfuse_protocol.secure_sum.keys import Purpose, agree, derive
from gramfuse_protocol.secure_sum.masks import Mask, apply
from gramfuse_protocol.secure_sum.member import Signed
from gramfuse_protocol.secure_sum.statements import SUMS
from tests.adversarial.deployed_failures.federation import (
    CONTEXT,
    NONCE,
    PLAN,
    Federation,
    assert_unrelated,
    contributed,
    differing_bits,
    federation,
    flipped,
    masks_of,
    signed_by,
    stream,
)

# Flower SecAgg+: a seed folded to 32 bits.


def test_every_bit_of_every_secret_changes_the_whole_mask() -> None:
    fed = federation(4, 3)
    member = fed.received("silo-b")
    _, before = contributed(fed.roster, member)
    assert [len(mask.key) for mask in before] == [32] * 4

    def masks_with(kind: str, bit: int) -> list[Mask]:
        changed = {
            **getattr(member.secrets, kind),
            "statistics": flipped(getattr(member.secrets, kind)["statistics"], bit),
        }
        secrets = member.secrets.model_copy(update={kind: changed})
        return contributed(fed.roster, member.with_(secrets=secrets))[1]

    self_keys = [masks_with("seed", bit)[0].key for bit in range(256)]
    # X25519 fixes five bits of a private key (RFC 7748, section 5); the other 251 all count.
    free = [bit for bit in range(256) if bit not in (0, 1, 2, 254, 255)]
    pair_keys = [[mask.key for mask in masks_with("mask", bit)[1:]] for bit in free]
    for old, keys in zip(before, [self_keys, *zip(*pair_keys, strict=True)], strict=True):
        assert_unrelated([old.key, *keys[:40]])
        assert len({old.key, *keys}) == 1 + len(keys)
        assert all(72 < differing_bits(old.key, key) < 184 for key in keys)


def test_every_bit_of_plan_session_and_context_changes_the_whole_mask() -> None:
    fed = federation(4, 3)
    member = fed.received("silo-b")
    _, before = contributed(fed.roster, member)
    others = [contributed(fed.roster, member.with_(nonce=flipped(NONCE, bit)))[1] for bit in range(0, 128, 3)]
    for bit in range(0, 256, 5):
        plan = Roster(flipped(PLAN, bit), fed.roster.keys, fed.roster.threshold, fed.roster.minimum)
        others.append(contributed(plan, member)[1])
        context = flipped(CONTEXT["statistics"], bit)
        others.append(secure_sum.contribute(fed.roster, member, "statistics", "d1", context)[1])
    for place, old in enumerate(before):
        assert_unrelated([old.key, *(masks[place].key for masks in others)])


def test_secrets_that_agree_when_folded_to_32_bits_give_unrelated_masks() -> None:
    # Flower folds a secret by XOR to 32 bits. Two bits that lie 32 apart cancel, so the folded values agree.
    def folded(secret: bytes) -> int:
        words = np.frombuffer(secret, "<u4")
        return int(np.bitwise_xor.reduce(words))

    fed = federation(4, 3)
    a, b = (fed.members[name] for name in ("silo-a", "silo-b"))
    secret = agree(bytes.fromhex(a.secrets.mask["statistics"]), bytes.fromhex(b.advert.masks["statistics"]), "silo-b")
    twins = [secret]
    for bit in range(0, 224, 9):
        twins.append(bytes.fromhex(flipped(flipped(secret.hex(), bit), bit + 32)))
    swapped = secret[4:8] + secret[:4] + secret[8:]
    twins.append(swapped)
    assert len({folded(twin) for twin in twins}) == 1
    about = "statistics", bytes.fromhex(CONTEXT["statistics"])
    keys = [derive(twin, Purpose.PAIR, fed.session, *about, "silo-a", "silo-b") for twin in twins]
    assert keys[0] == masks_of(fed, "silo-a")[1].key
    assert_unrelated(keys)
    streams = np.stack([stream([Mask(key, 1)], 512) for key in keys])
    assert np.unique(streams).size == streams.size


def test_mask_words_take_all_64_bits_with_equal_chance() -> None:
    # Flower draws below a modulus that is smaller than the word, so upper bits of its masks stay zero.
    fed = federation(4, 3)
    words = 2**16
    for masks in ([masks_of(fed, "silo-a")[0]], masks_of(fed, "silo-c")):
        values = stream(masks, words)
        ones = np.unpackbits(values.view(np.uint8)).reshape(words, 64).sum(axis=0)
        assert (np.abs(ones - words / 2) < 5 * np.sqrt(words) / 2).all()  # five standard deviations
        highest = np.bincount((values >> np.uint64(56)).astype(int), minlength=256)
        assert (np.square(highest - words / 256) / (words / 256)).sum() < 255 + 6 * np.sqrt(2 * 255)
        assert values.max() > 2**64 - 2**52
        assert np.unique(values).size == words


# OpenFL: one scalar per party; the aggregator reconstructs every private key.


def test_no_two_words_of_a_mask_are_equal_or_move_together() -> None:
    fed = federation(4, 3)
    words = 2**14
    plain = random.Random(6).choices(range(2**40), k=words)
    differences = []
    for name in fed.names:
        masked = np.array(plain, np.uint64)
        apply(masked, masks_of(fed, name))
        difference = masked - np.array(plain, np.uint64)
        assert np.unique(difference).size == words
        assert np.unique(np.diff(difference)).size == words - 1
        differences.append(difference.astype(np.int64).astype(np.float64))
    shifted = [d[k : words - 8 + k] for d in differences for k in range(8)]
    correlations = np.corrcoef(np.stack(shifted))
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 5 / np.sqrt(words - 8)


# FedML LightSecAgg: the noise is zeros.


def test_no_word_goes_out_without_noise() -> None:
    words = 2**15
    for fed in (federation(4, 3), federation(5, 4)):
        for sum_name in SUMS:
            for name in fed.names:
                masks = masks_of(fed, name, sum_name)
                assert len(masks) == len(fed.names)  # its own, and one with every other
                for chosen in ([mask] for mask in masks):
                    assert np.count_nonzero(stream(chosen, words)) == words
                assert np.count_nonzero(stream(masks, words)) == words
                # Even if every peer tells the coordinator its mask, the silo's own is left.
                assert np.count_nonzero(stream(masks[:1], words)) == words


# declearn: numpy's PCG64 as the source of masks.


def test_no_module_of_the_protocol_can_reach_a_generator_of_statistics() -> None:
    sources = sorted(Path(gramfuse_protocol.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & {"random", "torch"}, path
                assert "numpy.random" not in {alias.name for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in {"random", "torch"}, path
                assert node.module != "numpy.random", path
                assert node.module != "numpy" or "random" not in {alias.name for alias in node.names}, path
            elif isinstance(node, ast.Attribute):
                numpy = isinstance(node.value, ast.Name) and node.value.id in {"np", "numpy"}
                assert not (numpy and node.attr == "random"), path


def test_seeding_generators_changes_no_mask_and_reveals_none() -> None:
    fed = federation(4, 3)
    expected = stream(masks_of(fed, "silo-a"), 100)
    for seed in (0, 1, 12345):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index, union-attr]
        again = Federation(4, 3)
        np.testing.assert_array_equal(stream(masks_of(again, "silo-a"), 100), expected)
        after = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index, union-attr]
        assert before == after  # nothing was drawn from them either


# Fed-BioMed LOM: related keys from round to round, and ten nodes or more.


@pytest.fixture(scope="module")
def twelve() -> list[Federation]:
    """Twelve silos in two sessions."""
    return [federation(12, 7, seed, nonce) for seed, nonce in ((1, "0" * 31 + "1"), (2, "0" * 31 + "2"))]


def test_masks_of_all_pairs_sums_and_sessions_are_unrelated(twelve: list[Federation]) -> None:
    keys = {
        mask.key for fed in twelve for sum_name in SUMS for name in fed.names for mask in masks_of(fed, name, sum_name)
    }
    assert len(keys) == 2 * 2 * (12 + 12 * 11 // 2)  # a pair has one key, and nothing else has it
    numbers = np.array([np.frombuffer(key, np.uint64) for key in sorted(keys)])
    differences = numbers[:, None, :] ^ numbers[None, :, :]
    apart = np.bitwise_count(differences).sum(axis=2)
    upper = np.triu_indices(len(keys), 1)
    assert 72 < apart[upper].min() < apart[upper].max() < 184
    # A fixed relation between rounds or pairs would show as one difference that comes twice.
    assert len({d.tobytes() for d in differences[upper]}) == upper[0].size


def test_with_the_same_secrets_another_session_still_has_unrelated_masks() -> None:
    # A silo whose random source repeats itself: only the nonce differs.
    one, other = federation(4, 3, 1, "0" * 32), federation(4, 3, 1, "0" * 31 + "1")
    assert one.members["silo-a"].secrets == other.members["silo-a"].secrets
    assert_unrelated([mask.key for fed in (one, other) for mask in masks_of(fed, "silo-a")])


def test_twelve_silos_sum_values_of_full_width(twelve: list[Federation]) -> None:
    fed = twelve[0]
    limit = 2 ** capacity(12)
    assert limit == 2**58
    rng = random.Random(7)
    dead = set(fed.names[9:])  # three of the five that may
    alive = tuple(name for name in fed.names if name not in dead)
    plain = {name: [limit, -limit, *(rng.randint(-limit, limit) for _ in range(62))] for name in fed.names}
    states, signatures = {}, {}
    total = np.zeros(64, np.uint64)
    for name in alive:
        state = fed.received(name)
        masked = np.array([value % 2**64 for value in plain[name]], np.uint64)
        apply(masked, contributed(fed.roster, state)[1])
        total += masked
        states[name], signatures[name] = signed_by(fed, state, "statistics", alive)
    shares = {name: secure_sum.release(fed.roster, states[name], "statistics", signatures) for name in alive[2:]}
    adverts = states[alive[0]].adverts
    signed = Signed(survivors=alive, context=CONTEXT["statistics"])
    apply(total, unmask.unmasking(fed.roster, fed.nonce, adverts, "statistics", fed.names, signed, shares))
    assert total.view(np.int64).tolist() == [sum(plain[name][n] for name in alive) for n in range(64)]
