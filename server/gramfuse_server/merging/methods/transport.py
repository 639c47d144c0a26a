"""Fuses two models by optimal transport: matches the hidden units of one with those of the other, then averages.

Source: Singh and Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, section 4, with uniform marginals and the
Euclidean distance of incoming weights, on feed-forward pairs only, as in the comparisons of Jin et al., ICLR 2023.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.statistics.contribution import Float64
from gramfuse_server.merging.methods.arithmetic import Differences, Weights, weighted_mean
from gramfuse_server.merging.methods.registry import MethodModel, NotAllowed, Silos, method

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gramfuse_model.layers import LinearModule

SAME = 1e-9
"""Relative difference, in float64, up to which two outputs of a model count as equal."""

ITERATIONS = 10_000_000
"""Most steps of the network simplex; POT's own limit is too low for thousands of units."""


def load_pot() -> Any:
    """Return the module of POT, Python Optimal Transport.

    Raises:
        PlanError: if it is not installed.
    """
    try:
        import ot
    except ImportError:
        raise PlanError("optimal transport needs the library POT; run: pip install 'gramfuse[transport]'") from None
    return ot


@method(
    name="transport",
    label="transport",
    words="two models averaged after matching their hidden units",
    paper="Singh and Jaggi, NeurIPS 2020",
    needs=("models",),
    refusals=(
        NotAllowed(
            lambda plan: len(plan.silo) != 2,
            "it matches the hidden units of two models, so the plan must have exactly two silos; leave it out",
        ),
    ),
    ready=load_pot,
)
def transport(silos: Silos) -> MethodModel:
    """Match the hidden units of two silos' models, and return the mean.

    Raises:
        PlanError: if a silo was lost, or the base model has no feed-forward pair with matchable units.
    """
    from gramfuse_model.probing.public_batch import public_batch

    if len(silos.names) != 2:
        raise PlanError(f"transport: needs exactly two models, but {len(silos.names)} silo is left")
    trained = [tensor.name for tensor in silos.layout.tensors]
    pairs, others = feed_forward_pairs(silos.base.model, public_batch(silos.base), trained)
    if not pairs:
        why = f": the units of {others[0]} depend on other weights, as in a gated block" if others else ""
        raise PlanError(
            f"transport: the units of no feed-forward pair of this base model can be matched{why}; leave it out"
        )
    more: dict[str, Any] = {"pairs": len(pairs)}
    if others:
        more["note"] = f"averaged without matching their units: {', '.join(others)}"
    return MethodModel(transport_mean(pairs, silos.start(), *silos.parents()), more=more)


class Pair(NamedTuple):
    """Two linear modules with only an elementwise function between them.

    Args:
        first: name of the weight whose outputs are the hidden units.
        bias: name of its bias, or None.
        second: name of the weight whose inputs they are.
        first_transposed, second_transposed: whether a weight is stored as Wᵀ, (d_out, d_in).
    """

    first: str
    bias: str | None
    second: str
    first_transposed: bool
    second_transposed: bool


def feed_forward_pairs(
    model: nn.Module, batch: Mapping[str, torch.Tensor], trained: Sequence[str]
) -> tuple[list[Pair], list[str]]:
    """Find the feed-forward pairs of a model.

    Candidates are consecutive linear modules in the same part of the model; the first has as many outputs as the second
    has inputs, and more outputs than inputs. A candidate is a pair if its hidden units can be permuted without changing
    the model's output; in a gated block, for example, they cannot be permuted without the gate.

    Args:
        model: the base model; unchanged.
        batch: keyword arguments of its forward, to compare outputs on.
        trained: names of the parameters to fuse.

    Returns:
        The pairs, and the first weights of the other candidates.
    """
    import torch

    from gramfuse_model.layers import linear_modules

    probe = copy.deepcopy(model).cpu().double().eval()
    parameters = dict(probe.named_parameters())
    exact = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    with torch.no_grad():
        before = probe(**exact).logits
        pairs, skipped = [], []
        for first, second in pairwise(linear_modules(probe)):
            if not _same_part(first, second) or not first.d_in < first.d_out == second.d_in:
                continue
            bias = first.weight.removesuffix("weight") + "bias"
            pair = Pair(
                first.weight,
                bias if bias in parameters else None,
                second.weight,
                first.kind.transposed,
                second.kind.transposed,
            )
            if any(name not in trained for name in (pair.first, pair.second, pair.bias) if name is not None):
                continue
            if _invariant(probe, parameters, pair, first.d_out, exact, before):
                pairs.append(pair)
            else:
                skipped.append(pair.first)
    return pairs, skipped


def transport_mean(
    pairs: Sequence[Pair],
    start: Mapping[str, NDArray[Any]],
    differences: Sequence[Differences],
    weights: Sequence[Weights],
) -> dict[str, Float64]:
    """Match the hidden units of the second model with those of the first, and return the weighted mean of both.

    Args:
        start: the base model's parameters.
        differences: of the two models from the base, by parameter name.
        weights: of the two models in the mean, as in `gramfuse_server.merging.methods.arithmetic`.

    Returns:
        Differences of the mean from the base, float64.

    Raises:
        PlanError: if POT is not installed.
    """
    one, other = differences
    moved: dict[str, Float64] = {name: start[name].astype(np.float64) + delta for name, delta in other.items()}
    for pair in pairs:
        anchor = start[pair.first].astype(np.float64) + one[pair.first]
        units, theirs = _rows(anchor, pair.first_transposed), _rows(moved[pair.first], pair.first_transposed)
        order = match(units, theirs)
        moved[pair.first] = _rows(order @ theirs, pair.first_transposed)
        if pair.bias is not None:
            moved[pair.bias] = order @ moved[pair.bias]
        columns = _rows(moved[pair.second], pair.second_transposed)  # (d_out, units)
        moved[pair.second] = _rows(columns @ order.T, pair.second_transposed)
    matched = {name: values - start[name].astype(np.float64) for name, values in moved.items()}
    return weighted_mean([one, matched], weights)


def match(units: Float64, others: Float64) -> Float64:
    """Return the transport map from `others` to `units` with the least total distance.

    Args:
        units, others: (n, features), a unit's incoming weights in each row.

    Returns:
        (n, n), with row and column sums of 1: a permutation matrix, or a mixture of several if distances tie.

    Raises:
        PlanError: if POT is not installed.
    """
    ot, n = load_pot(), len(units)
    uniform = np.full(n, 1.0 / n)
    plan = n * np.asarray(ot.emd(uniform, uniform, ot.dist(units, others, metric="euclidean"), numItermax=ITERATIONS))
    permutation = np.rint(plan)
    return permutation if np.abs(plan - permutation).max() < 1e-6 else plan


def _rows(weight: Float64, transposed: bool) -> Float64:
    """Convert a weight between its stored form and (d_out, d_in); its own inverse."""
    return weight if transposed else weight.T


def _same_part(first: LinearModule, second: LinearModule) -> bool:
    """Whether both are in the same part of the model: body or head."""
    return first.weight.split(".")[0] == second.weight.split(".")[0]


def _invariant(
    probe: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    pair: Pair,
    units: int,
    batch: Mapping[str, torch.Tensor],
    before: torch.Tensor,
) -> bool:
    """Whether the model's output is invariant under a permutation of the hidden units."""
    import torch

    order = torch.arange(units).roll(1)
    moved = {pair.first: (parameters[pair.first], 0 if pair.first_transposed else 1)}
    moved[pair.second] = (parameters[pair.second], 1 if pair.second_transposed else 0)
    if pair.bias is not None:
        moved[pair.bias] = (parameters[pair.bias], 0)
    kept = {name: parameter.clone() for name, (parameter, _) in moved.items()}
    try:
        for parameter, axis in moved.values():
            parameter.copy_(parameter.index_select(axis, order))
        after = probe(**batch).logits
    finally:
        for name, (parameter, _) in moved.items():
            parameter.copy_(kept[name])
    return bool((after - before).abs().max() <= SAME * before.abs().max())
