"""gramfuse's work at a silo and at the coordinator."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from gramfuse_client.state.masked_vector import BUFFER_WORDS, read_masked, write_masked
from gramfuse_protocol.contract.form import PIECE_BYTES
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.roster import Roster, smallest_threshold
from gramfuse_protocol.messages import npy
from gramfuse_protocol.messages.phases import MaskedReply
from gramfuse_protocol.messages.wire import pack
from gramfuse_protocol.secure_sum import masks
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum import unmasking as unmask
from gramfuse_protocol.secure_sum.fixed_point import encode
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.secure_sum.member import Member, Signed
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_server.run.secure_sums import add_up
from gramfuse_server.run.spool import Spool
from meter import Figures, Meter, together
from summed import COLLUDING, EXAMPLES, WEIGHTING, contribution, layout_of, values

CONTEXT = "0" * 64
CHECKED = 1000  # words at both ends of the first Gram block and of the last tensor that are checked


@dataclass
class Federation:
    """All silos of a session. What is random is drawn from a seed, so that every process has the same."""

    roster: Roster
    nonce: str
    identities: Mapping[str, Identity]
    members: dict[str, Member]

    @property
    def names(self) -> tuple[str, ...]:
        """The silos."""
        return self.roster.names

    def streams(self, name: str) -> list[masks.Mask]:
        """Return the masks of a silo."""
        self.members[name], found = secure_sum.contribute(self.roster, self.members[name], "statistics", "", CONTEXT)
        return found

    def released(self, survivors: Sequence[str]) -> dict[str, dict[str, bytes]]:
        """Return what the survivors release of their shares."""
        signatures = {}
        for name in survivors:
            self.streams(name)
            self.members[name], signatures[name] = secure_sum.sign(
                self.roster, self.members[name], self.identities[name], "statistics", survivors
            )
        return {
            name: secure_sum.release(self.roster, self.members[name], "statistics", signatures) for name in survivors
        }


def federation(silos: int, meter: Meter) -> Federation:
    """Exchange keys and shares; what the first silo does is metered."""
    draw = random.Random(silos).randbytes
    names = [f"silo-{n + 1}" for n in range(silos)]
    identities = {name: Identity(draw(32)) for name in names}
    threshold = smallest_threshold(silos, COLLUDING)
    roster = Roster("0" * 64, {name: key.public for name, key in identities.items()}, threshold, threshold)
    nonce, members, sealed = draw(16).hex(), {}, {}
    others = Meter()
    for name in names:
        with meter if name == names[0] else others:
            members[name] = secure_sum.advertise(roster, nonce, name, names, identities[name], draw)
    adverts = [member.advert for member in members.values()]
    for name in names:
        with meter if name == names[0] else others:
            members[name], sealed[name] = secure_sum.share(roster, members[name], adverts, draw)
    for name in names:
        theirs = {peer: sealed[peer][name] for peer in names if peer != name}
        with meter if name == names[0] else others:
            members[name] = secure_sum.receive(roster, members[name], theirs)
    return Federation(roster, nonce, identities, members)


def cut(elements: int) -> list[tuple[int, int]]:
    """Return the pieces of a vector as (start, stop)."""
    size = PIECE_BYTES // 8
    return [(start, min(elements, start + size)) for start in range(0, elements, size)]


def parts(elements: int, silos: int) -> Figures:
    """Measure encoding alone and masking alone, on one core, into buffers that are used again and again."""
    layout = layout_of(elements)
    session = federation(silos, Meter())
    keys = session.streams(session.names[0])
    out = np.ones(max(BUFFER_WORDS, *(block.entries for block in layout.sums)), "<u8")
    encoding, masking = Meter(), Meter()
    for name, found, scale in contribution(layout, silos, 0):
        with encoding:
            encode(found, scale, silos, name, lambda count: out[:count])
    buffer = out[:BUFFER_WORDS]
    with mock.patch("os.cpu_count", return_value=1), masking:
        for start in range(0, elements, buffer.size):
            masks.apply(buffer[: elements - start], keys, start)
    return {
        "encode GB/s": 8 * elements / encoding.cpu / 1e9,
        "encode ns": encoding.cpu / elements * 1e9,
        "masks": len(keys),
        "masks GB/s": 8 * elements * len(keys) / masking.cpu / 1e9,
        "mask ns": masking.cpu / elements * 1e9,
    }


def silo(elements: int, silos: int, folder: Path, *, disk: bool = True) -> Figures:
    """Measure all that the first silo does; afterwards put every silo's vector into the spool.

    Args:
        disk: whether the masked words are written and read back; if not, they are made, and that is all.
    """
    layout, path, spool = layout_of(elements), folder / "masked", Spool(folder / "spool")
    for _ in values(layout, 0):
        pass  # the random values are made before anything is measured
    keys, masking, packing = Meter(), Meter(), Meter()
    session = federation(silos, keys)
    with keys:
        streams = session.streams(session.names[0])
    with ExitStack() as stack:
        if not disk:
            for name in ("gramfuse_client.state.masked_vector._write", "os.fsync"):
                stack.enter_context(mock.patch(name))
        with masking:
            write_masked(path, contribution(layout, silos, 0), silos, streams)
    if not disk:
        return together({"keys and shares": keys, "scales, encode, mask": masking})
    about: dict[str, Any] = {"plan": session.roster.plan, "session": session.nonce, "silo": session.names[0]}
    sent = 0
    for piece, (start, stop) in enumerate(cut(elements)):
        with packing:
            found = {"masked": read_masked(path, start, stop - start)}
            frame = pack(MaskedReply(**about, sum_of="statistics", piece=piece, arrays=found))
            carried = [
                npy.encode(buffer) for buffer in frame.buffers
            ]  # as gramfuse_protocol.messages.flower_records does
            sent += len(frame.header.encode("utf-8")) + sum(map(len, carried))
        del found, frame, carried
    figures = together(
        {
            "keys and shares": keys,
            "scales, encode, mask, write, fsync": masking,
            "read back, pack, serialize": packing,
        }
    )
    figures["bytes"] = sent
    for number, name in enumerate(session.names):
        if number:
            streams = session.streams(name)
            write_masked(path, contribution(layout, silos, number), silos, streams)
        for piece, (start, stop) in enumerate(cut(elements)):
            spool.save(name, piece, {"masked": read_masked(path, start, stop - start)})
    return figures


def coordinator(elements: int, silos: int, dead: int, folder: Path) -> Figures:
    """Measure the sum of the survivors' spooled vectors, taking the masks off, and decoding."""
    layout, spool, session = layout_of(elements), Spool(folder / "spool"), federation(silos, Meter())
    members, survivors = session.names, session.names[: silos - dead]
    adverts = [session.members[name].advert for name in members]
    released = session.released(survivors)
    signed = Signed(survivors=survivors, context=CONTEXT)
    accumulator = Accumulator(layout, alpha=0.9, weighting=WEIGHTING)
    adding, unmasking, decoding = Meter(), Meter(), Meter()
    with adding:
        words = add_up(spool, survivors, cut(elements))
    with unmasking:
        masks.apply(
            words,
            unmask.unmasking(session.roster, session.nonce, adverts, "statistics", members, signed, released),
        )
    summed = {index: part.copy() for index, part in spots(layout, words)}
    with decoding:
        accumulator.load(words, silos)
    figures = together({"add": adding, "unmask": unmasking, "decode": decoding})
    expected = {index: np.zeros_like(part) for index, part in summed.items()}
    for number in range(len(survivors)):
        for index, (name, found, scale) in enumerate(contribution(layout, silos, number)):
            if index in summed:
                expected[index] += ends(encode(found, scale, silos, name).reshape(-1))
    for index, part in summed.items():
        np.testing.assert_array_equal(part, expected[index])
    if (accumulator.weight, accumulator.examples) != (len(survivors), EXAMPLES * len(survivors)):
        raise AssertionError("the sum is wrong")
    return figures


def spots(layout: Layout, words: NDArray[np.uint64]) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Yield index and checked words of the first Gram block and of the last tensor."""
    start = 0
    for index, block in enumerate(layout.sums):
        if index in (1, len(layout.sums) - 1):
            yield index, ends(words[start : start + block.entries])
        start += block.entries


def ends(array: NDArray[Any]) -> NDArray[Any]:
    """Return the first and the last CHECKED entries; all, if there are fewer."""
    return array if array.size <= 2 * CHECKED else np.concatenate([array[:CHECKED], array[-CHECKED:]])
