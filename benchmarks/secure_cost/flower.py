"""The work of Flower's SecAgg+ at a silo and at the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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

from gramfuse_protocol.contract.roster import smallest_threshold
from meter import Figures, Meter, together
from ours import ends
from summed import COLLUDING, EXAMPLES, layout_of, values

# The defaults of Flower's SecAggPlusWorkflow.
FLOWER = {
    Key.CLIPPING_RANGE: 8.0,
    Key.TARGET_RANGE: 2**22,
    Key.MOD_RANGE: 2**32,
    Key.MAX_WEIGHT: 1000.0,
}


def flower_silo(elements: int, silos: int, folder: Path) -> tuple[Figures, Figures]:
    """Measure what Flower's client mod does at the first silo; afterwards keep every silo's vector in a file.

    Returns:
        The figures, and what the coordinator knows: public keys by node, and released shares by number of the dead.
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
    """Return one silo's values as Flower's clients send them: float32, serialized tensor by tensor."""
    tensors = [ndarray_to_bytes(found.astype(np.float32)) for _, found in values(layout_of(elements), silo)]
    return Parameters(tensors=tensors, tensor_type="numpy.ndarray")


def flower_coordinator(elements: int, silos: int, dead: int, folder: Path, public: Figures) -> Figures:
    """Measure what Flower's workflow does with the replies, which it has in memory all at once.

    The statements are those of SecAggPlusWorkflow.collect_masked_vectors_stage and .unmask_stage, without the messages
    and the strategy. Reading the replies is not timed; their memory counts.
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
    expected = [ends(found) for nid in active for *_, (_, found) in [values(layout, nid)]]
    np.testing.assert_allclose(ends(means[-1]), np.mean(expected, axis=0), atol=1e-4)
    return figures
