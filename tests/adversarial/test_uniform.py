"""What a coordinator receives in a session looks like noise, whatever it adds up, until the right sum is opened."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import chisquare

from gramfuse_model.normal_equations import summands
from gramfuse_protocol.contract.layout import Group, Layout, Linear, Tensor
from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum import unmasking as unmask
from gramfuse_protocol.secure_sum.fixed_point import decode, encode
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.secure_sum.masks import apply
from gramfuse_protocol.secure_sum.member import Member, Signed
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.secure_sum.shares import SHARE_BYTES, combine
from gramfuse_protocol.secure_sum.statements import Sum
from gramfuse_protocol.statistics.contribution import Statistics

SILOS, THRESHOLD = 5, 4
NAMES = tuple(f"silo-{chr(97 + n)}" for n in range(SILOS))
NONCE = "1d" * 16
D, OUT = 160, 64


def a_layout() -> Layout:
    """Two groups, one full and one in blocks with a rest, and a bias: 34,000 words."""
    rng = np.random.default_rng(1)
    groups = tuple(
        Group(
            name=name,
            d_in=D,
            structure=structure,
            weights=(Linear(weight=f"{name}.weight", d_out=OUT // 2, transposed=True),),
            exponents=tuple(rng.integers(-4, 3, D).tolist()),
        )
        for name, structure in (("attention", "full"), ("feed-forward", "block:48"))
    )
    tensors = [Tensor(name=f"{group.name}.weight", shape=(OUT // 2, D), merge="regmean") for group in groups]
    return Layout(groups=groups, tensors=(*tensors, Tensor(name="bias", shape=(OUT,), merge="mean")), frozen=())


def a_contribution(layout: Layout, seed: int) -> Statistics:
    """Statistics of correlated inputs with the layout's amplitudes and of small weight differences."""
    rng = np.random.default_rng(seed)
    blocks: dict[str, np.ndarray] = {}
    for group in layout.groups:
        mix = rng.standard_normal((D, 12)) + 0.5
        x = rng.standard_normal((300, 12)) @ mix.T / 4 * np.exp2(np.array(group.exponents, np.float64))
        gram = x.T @ x / len(x)
        parts = [
            np.stack([gram[i : i + width, i : i + width] for i in range(first, first + count * width, width)])
            for first, count, width in group.blocks.parts
        ]
        blocks[f"gram:{group.name}"] = group.blocks.pack(parts).astype(np.float32)
    for tensor in layout.tensors:
        blocks[f"delta:{tensor.name}"] = (0.01 * rng.standard_normal(tensor.shape)).astype(np.float32)
    return Statistics(1000 + 37 * seed, {group.name: 29_000 + seed for group in layout.groups}, blocks)


@dataclass(frozen=True)
class Recorded:
    """A session, on both sides of the wire."""

    layout: Layout
    roster: Roster
    dead: tuple[str, ...]
    states: Mapping[str, Member]
    """Each silo's, which the coordinator does not see."""
    channels: Mapping[str, str]
    """Each silo's private channel key."""
    plain: Mapping[str, np.ndarray]
    """Each silo's encoded statistics, which the coordinator does not see."""
    masked: Mapping[str, np.ndarray]
    shares: Mapping[str, Mapping[str, bytes]]
    received: bytes
    """Every byte that the coordinator received, in order."""

    @property
    def alive(self) -> tuple[str, ...]:
        return tuple(name for name in NAMES if name not in self.dead)

    def opened(self, silos: Sequence[str]) -> np.ndarray:
        """The uploads of these silos, with everything taken off that the released shares give."""
        total = sum((self.masked[name] for name in silos), np.zeros(self.layout.sum_entries, np.uint64))
        adverts = next(iter(self.states.values())).adverts
        signed = Signed(survivors=self.alive, context=self.layout.digest)
        apply(total, unmask.unmasking(self.roster, NONCE, adverts, "statistics", NAMES, signed, self.shares))
        return total


def session(dead: tuple[str, ...]) -> Recorded:
    """Run a session through the pure functions; the dead upload, and are gone before they sign."""
    name_of_sum: Sum = "statistics"
    layout = a_layout()
    source = random.Random(20)
    identities = {name: Identity(source.randbytes(32)) for name in NAMES}
    roster = Roster("ee" * 32, {name: i.public for name, i in identities.items()}, THRESHOLD, THRESHOLD)
    record: list[bytes] = []
    states = {n: secure_sum.advertise(roster, NONCE, n, NAMES, identities[n], source.randbytes) for n in NAMES}
    adverts = [state.advert for state in states.values()]
    channels = {name: str(state.secrets.channel) for name, state in states.items()}
    record += [advert.model_dump_json().encode() for advert in adverts]
    sealed = {}
    for name in NAMES:
        states[name], sealed[name] = secure_sum.share(roster, states[name], adverts, source.randbytes)
        record += sealed[name].values()
    plain, masked = {}, {}
    for number, name in enumerate(NAMES):
        states[name] = secure_sum.receive(roster, states[name], {p: sealed[p][name] for p in NAMES if p != name})
        blocks = summands(layout, a_contribution(layout, number), alpha=0.9, weighting="uniform")
        plain[name] = np.concatenate(
            [
                encode(values, scale, SILOS, block.name).reshape(-1)
                for (block, values), (_, scale) in zip(blocks, scales(layout, SILOS, "uniform"), strict=True)
            ]
        )
        masked[name] = plain[name].copy()
        states[name], masks = secure_sum.contribute(roster, states[name], name_of_sum, "d1", layout.digest)
        apply(masked[name], masks)
        record.append(masked[name].tobytes())
    alive = tuple(name for name in NAMES if name not in dead)
    signatures = {}
    for name in alive:
        states[name], signatures[name] = secure_sum.sign(roster, states[name], identities[name], name_of_sum, alive)
        record.append(signatures[name])
    shares = {name: secure_sum.release(roster, states[name], name_of_sum, signatures) for name in alive}
    record += [share for released in shares.values() for share in released.values()]
    return Recorded(layout, roster, dead, states, channels, plain, masked, shares, b"|".join(record))


@pytest.fixture(scope="module", params=[(), ("silo-d",)], ids=["all survive", "one drops out"])
def recorded(request: pytest.FixtureRequest) -> Recorded:
    return session(request.param)


def signed(words: np.ndarray) -> np.ndarray:
    return words.view(np.int64).astype(np.float64)


def test_the_bytes_of_each_upload_are_uniform(recorded: Recorded) -> None:
    assert recorded.layout.sum_entries >= 20_000
    for name in NAMES:
        for data in (recorded.masked[name].view(np.uint8), recorded.masked[name].view(np.uint8)[7::8]):
            assert chisquare(np.bincount(data, minlength=256)).pvalue > 1e-6, name
        # The test is worth something: what was masked is far from uniform.
        assert chisquare(np.bincount(recorded.plain[name].view(np.uint8), minlength=256)).pvalue < 1e-100


def test_no_sum_of_some_uploads_has_anything_to_do_with_any_silo(recorded: Recorded) -> None:
    # Pair masks of silos that are both in the subset cancel; the self masks, and those with the rest, do not.
    n = recorded.layout.sum_entries
    plain = np.stack([signed(recorded.plain[name]) for name in NAMES])
    for count in range(1, SILOS + 1):
        for chosen in itertools.combinations(NAMES, count):
            total = sum((recorded.masked[name] for name in chosen), np.zeros(n, np.uint64))
            correlations = np.corrcoef(np.vstack([signed(total), plain]))[0, 1:]
            assert np.abs(correlations).max() < 4 / np.sqrt(n), chosen
            assert chisquare(np.bincount(total.view(np.uint8), minlength=256)).pvalue > 1e-6, chosen


def test_what_was_released_opens_the_sum_of_the_survivors_and_no_other(recorded: Recorded) -> None:
    n = recorded.layout.sum_entries
    plain = np.stack([signed(recorded.plain[name]) for name in NAMES])
    for count in range(1, SILOS + 1):
        for chosen in itertools.combinations(NAMES, count):
            total = recorded.opened(chosen)
            if chosen == recorded.alive:
                columns = zip(*(recorded.plain[name].view(np.int64).tolist() for name in chosen), strict=True)
                assert total.view(np.int64).tolist() == [sum(column) for column in columns]
            else:
                correlations = np.corrcoef(np.vstack([signed(total), plain]))[0, 1:]
                assert np.abs(correlations).max() < 4.5 / np.sqrt(n), chosen


def test_the_opened_sum_decodes_to_the_statistics_of_all_survivors(recorded: Recorded) -> None:
    words = recorded.opened(recorded.alive)
    expected = {block.name: np.zeros(block.shape) for block in recorded.layout.sums}
    for name in recorded.alive:
        silo = a_contribution(recorded.layout, NAMES.index(name))
        for block, values in summands(recorded.layout, silo, alpha=0.9, weighting="uniform"):
            expected[block.name] += values
    start = 0
    for block, scale in scales(recorded.layout, SILOS, "uniform"):
        part = words[start : start + block.entries].reshape(block.shape)
        start += block.entries
        error = np.abs(decode(part, scale) - expected[block.name])
        assert (error <= SILOS / 2 / scale + 1e-13 * np.abs(expected[block.name])).all(), block.name
    count = words[: 2 + len(recorded.layout.groups)].tolist()
    numbers = [NAMES.index(name) for name in recorded.alive]
    tokens = sum(29_000 + k for k in numbers)
    assert count == [len(numbers), sum(1000 + 37 * k for k in numbers), tokens, tokens]


def test_no_secret_and_no_statistic_is_among_the_bytes_that_were_received(recorded: Recorded) -> None:
    received = recorded.received
    hexadecimal = received.decode("latin-1")
    for name, state in recorded.states.items():
        masks, seeds = state.secrets.mask, state.secrets.seed
        hidden = [recorded.channels[name], *masks.values(), *seeds.values()]
        for shares in (*state.held.values(), state.own_shares):
            hidden += shares["metrics"].values()
        for secret in hidden:
            assert len(secret) in (64, 2 * SHARE_BYTES)
            assert secret not in hexadecimal
            assert bytes.fromhex(secret) not in received
        # A count of examples or tokens, or any other encoded word, would be eight bytes somewhere.
        for word in recorded.plain[name][:200]:
            if word:
                assert word.tobytes() not in received


def test_the_shares_of_a_dead_silo_open_its_pair_masks_and_leave_it_masked() -> None:
    recorded = session(("silo-d",))
    alone = recorded.opened(("silo-d",))
    plain = signed(recorded.plain["silo-d"])
    adverts = recorded.states["silo-a"].adverts
    # Its private mask key is known now, and with it every mask that it had with others; its own is not.
    private = combine(
        {recorded.roster.index(name): shares["silo-d"] for name, shares in recorded.shares.items()}, THRESHOLD
    ).hex()
    assert private == recorded.states["silo-d"].secrets.mask["statistics"]
    known = recorded.states["silo-d"].model_copy(
        update={
            "secrets": recorded.states["silo-d"].secrets.model_copy(update={"seed": {"statistics": "00" * 32}}),
            "adverts": adverts,
        }
    )
    context = recorded.layout.digest
    _, masks = secure_sum.contribute(recorded.roster, known, "statistics", "d1", context)
    left = recorded.masked["silo-d"].copy()
    apply(left, [mask.inverse for mask in masks[1:]])
    for words in (alone, left):
        assert abs(np.corrcoef(signed(words), plain)[0, 1]) < 4 / np.sqrt(plain.size)
        assert chisquare(np.bincount(words.view(np.uint8), minlength=256)).pvalue > 1e-6
    # And it is right that this is all that hides it: with its own mask gone too, it is open.
    _, masks = secure_sum.contribute(recorded.roster, recorded.states["silo-d"], "statistics", "d1", context)
    apply(left, [masks[0].inverse])
    np.testing.assert_array_equal(left, recorded.plain["silo-d"])
