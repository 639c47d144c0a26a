"""Measures time, memory and bytes of a secure sum, at a silo and at the coordinator, against Flower's SecAgg+.

    python benchmarks/secure_cost.py
    python benchmarks/secure_cost.py --elements 2000000 --silos 5 --out cost.json

The layout is that of a BERT-like encoder with full Gram blocks up to 3072 wide, and as many layers as fit; a plain
tensor fills the rest. The random values exist before the clock starts (every block is a view of one random array);
making the scales is timed. Every measurement runs in a fresh process. Memory is the growth of the peak resident size
(ru_maxrss) over the measured part; the absolute peak, including interpreter, torch and Flower, is printed too. Times
are those of the fastest round, memory is the largest of all rounds, on both sides.

A silo's work, from the plain values to the transport:

* gramfuse: keys, shares, masks; scales, encode, mask, write with fsync; read back, pack and serialize each piece.
* Flower: the functions of its client mod in order, from serialized float32 parameters to serialized integers. It does
  not write to disk, so gramfuse's work is also measured up to the masked words, which are then dropped.

The coordinator's work: from the spooled vectors (Flower: the replies in memory, as in its workflow) to the decoded sum,
with all silos and with one dead. The network is not included. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import psutil
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import Parameters, bytes_to_ndarray, ndarray_to_bytes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from numpy.typing import NDArray

from gramfuse_client.state.masked_vector import BUFFER_WORDS, read_masked, write_masked
from gramfuse_protocol.contract.layout import PIECE_BYTES, Block, Group, Layout, Linear, Tensor
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
from gramfuse_protocol.secure_sum.scales import Scale, scales
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_server.run.secure_sums import add_up
from gramfuse_server.run.spool import Spool

Figures = dict[str, Any]
Floats = NDArray[np.float64]

WEIGHTING: Literal["uniform"] = "uniform"
COLLUDING = 1
HIDDEN = 768
EXAMPLES = 1000
CONTEXT = "0" * 64
WORKS = ("silo", "coordinator, all there", "coordinator, one dead")
CHECKED = 1000  # words to check at both ends of the first Gram block and of the last tensor

FASTER = 5.0
MEMORY = 1.3
MASKS_GB = 1.5
BYTES = 8 * 1.01

# The defaults of Flower's SecAggPlusWorkflow.
FLOWER = {
    Key.CLIPPING_RANGE: 8.0,
    Key.TARGET_RANGE: 2**22,
    Key.MOD_RANGE: 2**32,
    Key.MAX_WEIGHT: 1000.0,
}
FLOWER_FEWER = 10_000_000


def main() -> None:
    """Measure, and print two Markdown tables: costs and targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=100_000_000, help="size of one silo's contribution")
    parser.add_argument(
        "--silos", type=int, default=5, help="size of the cohort; at least four, so that one can be dead"
    )
    parser.add_argument("--out", type=Path, help="file for all figures, as JSON")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the fastest counts, on both sides")
    options = parser.parse_args()
    if options.elements < 1000 or options.silos < 4 or options.rounds < 1:
        parser.error("needs at least 1000 elements, 4 silos and one round")
    fewer = options.elements if fits_flower(options.elements, options.silos) else min(options.elements, FLOWER_FEWER)
    results: Figures = {
        "elements": options.elements,
        "flower_elements": fewer,
        "silos": options.silos,
        "machine": machine(),
        "rounds": [measure(options.elements, fewer, options.silos) for _ in range(options.rounds)],
    }
    results |= fastest(results["rounds"])
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(tables(results))


def measure(elements: int, fewer: int, silos: int) -> Figures:
    """Run every measurement once, each in a fresh process; Flower's with `fewer` elements."""
    results: Figures = {}
    results["parts"] = in_fresh_process(parts, elements, silos)
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as folder:
        results["silo without disk"] = in_fresh_process(partial(silo, disk=False), elements, silos, Path(folder))
        results["silo"] = in_fresh_process(silo, elements, silos, Path(folder))
        for dead, name in enumerate(WORKS[1:]):
            results[name] = in_fresh_process(coordinator, elements, silos, dead, Path(folder))
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as folder:
        results["flower silo"], public = in_fresh_process(flower_silo, fewer, silos, Path(folder))
        for dead, name in enumerate(WORKS[1:]):
            results[f"flower {name}"] = in_fresh_process(flower_coordinator, fewer, silos, dead, Path(folder), public)
    return results


def fastest(rounds: Sequence[Figures]) -> Figures:
    """Return each task's fastest round with the largest memory of all rounds, and the speeds of the parts."""
    results: Figures = {"parts": min((one["parts"] for one in rounds), key=lambda parts: parts["encode ns"])}
    for name in rounds[0].keys() - {"parts"}:
        best = min((one[name] for one in rounds), key=lambda figures: float(figures["wall"]))
        results[name] = {**best, **{key: max(one[name][key] for one in rounds) for key in ("grown", "peak")}}
    return results


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def fits_flower(elements: int, silos: int) -> bool:
    """Whether Flower's coordinator has enough memory: all replies and three more vectors, all int64."""
    return bool(psutil.virtual_memory().available > 1.25 * 8 * (silos + 3) * elements)


class Meter:
    """Seconds spent in its `with` blocks, and the process's peak memory at creation and after the last block."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.before = self.peak = high_water()

    def __enter__(self) -> Meter:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._began[0]
        self.cpu += time.process_time() - self._began[1]
        self.peak = high_water()


def together(steps: Mapping[str, Meter]) -> Figures:
    """Combine the figures of the steps of one task; all meters must be created before the first step."""
    before, peak = min(m.before for m in steps.values()), max(m.peak for m in steps.values())
    return {
        "wall": sum(m.wall for m in steps.values()),
        "cpu": sum(m.cpu for m in steps.values()),
        "grown": peak - before,
        "peak": peak,
        "steps": {name: {"wall": m.wall, "cpu": m.cpu} for name, m in steps.items()},
    }


def high_water() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Input data


def layout_of(elements: int) -> Layout:
    """Return a layout whose sums have exactly this many elements."""
    hidden = HIDDEN
    while sum_entries(one := layer(0, hidden)) > elements - 3:
        hidden //= 2
    count = (elements - 3) // sum_entries(one)
    groups = [group for number in range(count) for group in layer(number, hidden)]
    tensors = [
        Tensor(name=weight.weight, shape=(weight.d_out, group.d_in), merge="regmean")
        for group in groups
        for weight in group.weights
    ]
    rest = Tensor(name="rest", shape=(elements - 2 - count * sum_entries(one),), merge="mean")
    return Layout(groups=tuple(groups), tensors=(*tensors, rest), frozen=())


def layer(number: int, hidden: int) -> list[Group]:
    """Return the groups of one encoder layer: attention's inputs and output, and the two linear maps of the MLP."""
    sizes = {
        "qkv": (hidden, (hidden, hidden, hidden)),
        "attention": (hidden, (hidden,)),
        "up": (hidden, (4 * hidden,)),
        "down": (4 * hidden, (hidden,)),
    }
    groups = []
    for name, (d_in, outputs) in sizes.items():
        name = f"{number}.{name}"
        weights = tuple(Linear(weight=f"{name}.{at}", d_out=d_out, transposed=True) for at, d_out in enumerate(outputs))
        exponents = tuple(j % 8 - 4 for j in range(d_in))
        groups.append(Group(name=name, d_in=d_in, structure="full", weights=weights, exponents=exponents))
    return groups


def sum_entries(groups: Sequence[Group]) -> int:
    """Return the number of elements of groups in `Layout.sums`: s, t, m and a count of token rows."""
    return sum(group.blocks.entries + 2 * group.d_in * group.d_out + 1 for group in groups)


def values(layout: Layout, silo: int) -> Iterator[tuple[Block, Floats]]:
    """Yield one silo's blocks: its weight is 1, its other counts are EXAMPLES, everything else is from `noise`."""
    random_values = noise(silo, max(block.entries for block in layout.sums))
    for block in layout.sums:
        if block.name == "count":
            yield block, np.array([1, *[EXAMPLES] * (block.entries - 1)], np.float64)
        else:
            yield block, random_values[: block.entries].reshape(block.shape)


@lru_cache(maxsize=1)
def noise(silo: int, entries: int) -> Floats:
    """Return a silo's random values; every block is a slice of them."""
    return np.random.default_rng(silo).standard_normal(entries)


def contribution(layout: Layout, silos: int, silo: int) -> Iterator[tuple[str, Floats, Scale]]:
    """Yield (name, values, scale) of each block, the input of `write_masked`."""
    for (block, array), (_, scale) in zip(values(layout, silo), scales(layout, silos, WEIGHTING), strict=True):
        yield block.name, array, scale


# gramfuse


@dataclass
class Federation:
    """All silos of a session. Randomness comes from a seed, so that every process has the same session."""

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
        self.members[name], streams = secure_sum.contribute(self.roster, self.members[name], "statistics", "", CONTEXT)
        return streams

    def released(self, survivors: Sequence[str]) -> dict[str, dict[str, bytes]]:
        """Return the shares that the survivors release, by survivor and owner."""
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
    """Exchange keys and shares; only the first silo's work is metered."""
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
    """Measure encoding and masking separately, on one core, into reused buffers."""
    layout = layout_of(elements)
    session = federation(silos, Meter())
    keys = session.streams(session.names[0])
    out = np.ones(max(BUFFER_WORDS, *(block.entries for block in layout.sums)), "<u8")
    encoding, masking = Meter(), Meter()
    for name, array, scale in contribution(layout, silos, 0):
        with encoding:
            encode(array, scale, silos, name, lambda count: out[:count])
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
    """Measure all work of the first silo; then write every silo's vector into the spool.

    Args:
        disk: whether the masked words are written and read back; if not, they are only computed.
    """
    layout, path, spool = layout_of(elements), folder / "masked", Spool(folder / "spool")
    for _ in values(layout, 0):
        pass  # create the random values before the measurement
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
            arrays = {"masked": read_masked(path, start, stop - start)}
            frame = pack(MaskedReply(**about, sum_of="statistics", piece=piece, arrays=arrays))
            carried = [npy.encode(buffer) for buffer in frame.buffers]  # like gramfuse_protocol.messages.flower_records
            sent += len(frame.header.encode("utf-8")) + sum(map(len, carried))
        del arrays, frame, carried
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
    """Measure adding the survivors' spooled vectors, unmasking, and decoding."""
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
        for index, (name, array, scale) in enumerate(contribution(layout, silos, number)):
            if index in summed:
                expected[index] += ends(encode(array, scale, silos, name).reshape(-1))
    for index, part in summed.items():
        np.testing.assert_array_equal(part, expected[index])
    if (accumulator.weight, accumulator.examples) != (len(survivors), EXAMPLES * len(survivors)):
        raise AssertionError("the sum is wrong")
    return figures


def spots(layout: Layout, words: NDArray[np.uint64]) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Yield (index, words to check) of the first Gram block and of the last tensor."""
    start = 0
    for index, block in enumerate(layout.sums):
        if index in (1, len(layout.sums) - 1):
            yield index, ends(words[start : start + block.entries])
        start += block.entries


def ends(array: NDArray[Any]) -> NDArray[Any]:
    """Return the first and last CHECKED entries, or all if there are fewer."""
    return array if array.size <= 2 * CHECKED else np.concatenate([array[:CHECKED], array[-CHECKED:]])


# Flower


def flower_silo(elements: int, silos: int, folder: Path) -> tuple[Figures, Figures]:
    """Measure the work of Flower's client mod at the first silo; then write every silo's vector to files.

    Returns:
        The figures, and the coordinator's knowledge: public keys by node, and released shares by number of dead silos.
    """
    threshold = smallest_threshold(silos, COLLUDING)
    configs = {**FLOWER, Key.SAMPLE_NUMBER: silos, Key.SHARE_NUMBER: silos, Key.THRESHOLD: threshold}
    states = {nid: SecAggPlusState(nid=nid) for nid in range(silos)}
    parameters = flower_parameters(elements, 0)
    keys, masking, others = Meter(), Meter(), Meter()
    public: dict[int, tuple[bytes, bytes]] = {}
    mailbox: dict[int, dict[str, list[Any]]] = {nid: {Key.SOURCE_LIST: [], Key.CIPHERTEXT_LIST: []} for nid in states}
    for nid, state in states.items():
        with others if nid else keys:
            reply = _setup(state, configs)
        public[nid] = (reply[Key.PUBLIC_KEY_1], reply[Key.PUBLIC_KEY_2])
    for nid, state in states.items():
        with others if nid else keys:
            reply = _share_keys(state, {str(peer): both for peer, both in public.items()})
        for peer, sealed in zip(reply[Key.DESTINATION_LIST], reply[Key.CIPHERTEXT_LIST], strict=True):
            mailbox[peer][Key.SOURCE_LIST].append(nid)
            mailbox[peer][Key.CIPHERTEXT_LIST].append(sealed)
    with masking:
        reply = _collect_masked_vectors(states[0], mailbox[0], EXAMPLES, parameters)
    figures = together({"keys and shares": keys, "quantize, mask, serialize": masking})
    figures["bytes"] = sum(map(len, reply[Key.MASKED_PARAMETERS]))
    for nid, state in states.items():
        if nid:
            del reply, parameters
            parameters = flower_parameters(elements, nid)
            reply = _collect_masked_vectors(state, mailbox[nid], EXAMPLES, parameters)
        for index, data in enumerate(reply[Key.MASKED_PARAMETERS]):
            (folder / f"{nid}-{index}").write_bytes(data)
    released: dict[int, dict[int, list[bytes]]] = {}
    for dead in (0, 1):
        active, gone = list(states)[: silos - dead], list(states)[silos - dead :]
        released[dead] = {nid: [] for nid in states}
        for nid in active:
            about = {Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: gone}
            reply = _unmask(states[nid], about)
            for owner, share in zip(reply[Key.NODE_ID_LIST], reply[Key.SHARE_LIST], strict=True):
                released[dead][owner].append(share)
    return figures, {"keys": public, "released": released}


def flower_parameters(elements: int, silo: int) -> Parameters:
    """Return one silo's values as a Flower client sends them: float32, serialized tensor by tensor."""
    tensors = [ndarray_to_bytes(array.astype(np.float32)) for _, array in values(layout_of(elements), silo)]
    return Parameters(tensors=tensors, tensor_type="numpy.ndarray")


def flower_coordinator(elements: int, silos: int, dead: int, folder: Path, public: Figures) -> Figures:
    """Measure the work of Flower's workflow on the replies, which are all in memory at once.

    The statements are those of SecAggPlusWorkflow.collect_masked_vectors_stage and .unmask_stage, without messages and
    strategy. Reading the replies is not timed, but their memory counts.
    """
    layout, active = layout_of(elements), range(silos - dead)
    modulus, target, clip = FLOWER[Key.MOD_RANGE], FLOWER[Key.TARGET_RANGE], FLOWER[Key.CLIPPING_RANGE]
    adding, unmasking, decoding = Meter(), Meter(), Meter()
    count = len(layout.sums) + 1  # the weight comes first
    replies = [[(folder / f"{nid}-{index}").read_bytes() for index in range(count)] for nid in active]
    with adding:
        vector = None
        for reply in replies:
            theirs = [bytes_to_ndarray(data) for data in reply]
            vector = theirs if vector is None else parameters_addition(vector, theirs)
        vector = parameters_mod(vector, modulus)
    with unmasking:
        for nid, shares in public["released"][dead].items():
            secret = combine_shares(shares)
            if nid in active:
                mask = pseudo_rand_gen(secret, modulus, get_parameters_shape(vector))
                vector = parameters_subtraction(vector, mask)
                continue
            for peer in public["keys"]:
                if peer == nid:
                    continue
                shared = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(public["keys"][peer][0]))
                mask = pseudo_rand_gen(shared, modulus, get_parameters_shape(vector))
                vector = (parameters_addition if nid > peer else parameters_subtraction)(vector, mask)
        vector = parameters_mod(vector, modulus)
    with decoding:
        weight, vector = factor_extract(vector)
        means = dequantize(vector, clip, target)
        for mean in means:
            mean += -(len(active) - 1) * clip
            mean *= target / weight
    figures = together({"add": adding, "unmask": unmasking, "decode": decoding})
    expected = [ends(array) for nid in active for *_, (_, array) in [values(layout, nid)]]
    np.testing.assert_allclose(ends(means[-1]), np.mean(expected, axis=0), atol=1e-4)
    return figures


# Output


def machine() -> str:
    """Describe the machine and the package versions."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    cpu = info.partition("model name")[2].partition("\n")[0].strip(" :\t") or platform.machine()
    memory, load = psutil.virtual_memory().total / 2**30, os.getloadavg()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "cryptography", "flwr"))
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, load {load:.1f} at the start; "
        f"Python {platform.python_version()}, {packages}"
    )


def tables(results: Figures) -> str:
    """Return the results as Markdown."""
    elements, fewer, parts = results["elements"], results["flower_elements"], results["parts"]
    note = "" if fewer == elements else f" Flower was measured with {fewer:,} elements, for lack of memory, and scaled."
    speeds = (
        f"On one core, into reused buffers: encoding {parts['encode GB/s']:.2f} GB/s, {parts['encode ns']:.2f} ns "
        f"per element; {parts['masks']} masks {parts['masks GB/s']:.2f} GB/s each, together {parts['mask ns']:.2f} ns."
    )
    text = [
        f"A contribution of {elements:,} elements ({8 * elements / 1e6:,.0f} MB), {results['silos']} silos, "
        f"fastest of {len(results['rounds'])}.{note}",
        f"{results['machine']}.\n",
        "| work | s per 100 M elements | CPU s per 100 M | ns per element | memory grew by | contributions | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    text += rows("silo without disk: gramfuse", results["silo without disk"], elements)
    for name in WORKS:
        text += rows(f"{name}: gramfuse", results[name], elements)
        text += rows(f"{name}: Flower SecAgg+", results[f"flower {name}"], fewer)
    text += [
        f"\n{speeds}\n",
        "| target | measured | required | |",
        "|---|---|---|---|",
        *target_rows(results),
    ]
    return "\n".join(text)


def rows(name: str, figures: Figures, size: int) -> Iterator[str]:
    """Yield the table rows of a task and its steps."""
    grown, peak = figures["grown"], figures["peak"]
    memory = f"{grown / 1e6:,.0f} MB | {grown / (8 * size):.2f} | {peak / 1e6:,.0f} MB"
    for title, part, rest in [(f"**{name}**", figures, memory), *((n, f, "| |") for n, f in figures["steps"].items())]:
        wall, cpu = part["wall"] / size, part["cpu"] / size
        yield f"| {title} | {wall * 1e8:.2f} | {cpu * 1e8:.2f} | {wall * 1e9:.2f} | {rest} |"


def target_rows(results: Figures) -> Iterator[str]:
    """Yield a row for each target, marked `met` or `MISSED`."""
    elements, fewer, gigabytes = results["elements"], results["flower_elements"], results["parts"]["masks GB/s"]

    def ratio(name: str, key: str, ours: Figures) -> float:
        """Return Flower's figure over ours, per element."""
        return float(results[f"flower {name}"][key] / fewer / (ours[key] / elements))

    def row(target: str, measured: str, required: str, met: bool) -> str:
        return f"| {target} | {measured} | {required} | {'met' if met else 'MISSED'} |"

    for scope, ours in (
        ("silo, whole work", results["silo"]),
        ("silo, without the disk, which Flower does not use", results["silo without disk"]),
    ):
        for key, unit in (("wall", "seconds"), ("cpu", "CPU seconds")):
            speedup = ratio("silo", key, ours)
            yield row(f"{scope}: {unit} of Flower over ours", f"{speedup:.1f}", f"≥ {FASTER:g}", speedup >= FASTER)
    for name in WORKS:
        grown, times = results[name]["grown"] / (8 * elements), ratio(name, "grown", results[name])
        measured = f"{grown:.2f} (Flower takes {times:.1f} times ours)"
        yield row(f"{name}: memory in contributions", measured, f"≤ {MEMORY:g}", grown <= MEMORY)
    yield row("masks made and added, GB/s per core", f"{gigabytes:.2f}", f"≥ {MASKS_GB:g}", gigabytes >= MASKS_GB)
    each, theirs = results["silo"]["bytes"] / elements, results["flower silo"]["bytes"] / fewer
    yield row("bytes per element", f"{each:.5f} (Flower: {theirs:.5f})", f"≤ {BYTES:g}", 8 <= each <= BYTES)


if __name__ == "__main__":
    main()
