"""Derives the layout: runs the base model once to find which linear weights share an input."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from glob import escape
from types import NoneType
from typing import Any, Literal, NamedTuple

from torch import nn

from gramfuse_model.buffers import changed_by_training
from gramfuse_model.derive_head import derive_head
from gramfuse_model.exponents import exponents_of
from gramfuse_model.heads import last_layer
from gramfuse_model.layers import LinearModule, experts_of, linear_modules
from gramfuse_model.loading.base_model import Base
from gramfuse_model.loading.precision import in_float32, widened
from gramfuse_model.probing.calls import Calls, calls_of
from gramfuse_model.probing.context_free import context_free
from gramfuse_model.probing.public_batch import check_long_texts, public_batch, trying
from gramfuse_model.probing.rows import find_rows
from gramfuse_protocol.arguments import check_argument
from gramfuse_protocol.contract.coverage import family
from gramfuse_protocol.contract.gram_structure import parse_structure
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.layout import Group, Layout, Linear, RowKind, SharedOutputs, Tensor
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import ModelError

SUGGESTIONS = 3
"""Number of weights that an error suggests if a pattern matches none."""


def plan_layout(plan: Plan, base: Base, given: Layout | None = None) -> Layout:
    """Derive the layout of a plan over its base model, and check it against a locked plan.

    Args:
        given: the layout that came with a locked plan. It is used if it has the plan's digest and differs from the
            derived one only in exponents, by as much as rounding on another machine explains.

    Raises:
        ModelError: if the plan is locked to a different layout.
    """
    parts = _parts(plan)
    check_long_texts(plan, base)
    batch = public_batch(base)
    with trying(base, batch):
        head = derive_head(base, batch, plan.model.single_task) if plan.fits_head else None
        alone = head is not None and plan.training.epochs == 0
        layout = derive_layout(
            base.model,
            batch,
            _merge_of(plan, head),
            scaled=True,
            shared=frozenset(head.tensors) if head is not None and alone else base.shared,
            parts=parts,
            parted=last_layer(base.model, len(plan.model.labels)) if parts else frozenset(),
        )
    if head is not None:
        layout = _with_head(layout, head, [name for name, _ in base.model.named_parameters()] if alone else ())
    if given is not None and given.digest == plan.merge.layout and given.follows(layout):
        return given
    if plan.merge.layout is not None and layout.digest != plan.merge.layout:
        raise ModelError(
            f"the layout derived here has digest {layout.digest}, but the plan is locked to {plan.merge.layout}; "
            "both sides must run the same versions of gramfuse and transformers"
        )
    return layout


def _merge_of(plan: Plan, head: HeadLayout | None) -> Merge:
    """Return the settings by which a plan's layout is derived.

    With a head that is fitted before training, the last layer is averaged: fewer silos may be in the statistics than in
    the head's sums, and the Gram matrix of the same layer's inputs could then be subtracted.
    """
    changes: dict[str, Any] = {"experts": plan.merge.experts_in(secure=plan.privacy.secure_aggregation)}
    if plan.training.epochs == 0:
        return Merge(exclude=("*",))
    if plan.merge.method == "average":
        changes["exclude"] = ("*",)
    elif head is not None and plan.model.head == "fitted":
        changes["exclude"] = (*plan.merge.exclude, escape(head.weight))
    return plan.merge.model_copy(update=changes)


def _with_head(layout: Layout, head: HeadLayout, untrained: Iterable[str]) -> Layout:
    """Return a layout with a head that is fitted.

    Args:
        untrained: names of parameters; those that are not the head's are frozen too.
    """
    frozen = next((name for name in head.tensors if name in layout.frozen), None)
    if frozen is not None:
        raise ModelError(
            f"training.freeze freezes {frozen!r}, which the plan fits (model.head, merge.refit); exempt it, or use "
            'model.head = "same" and merge.refit = false'
        )
    return Layout(
        **{name: getattr(layout, name) for name in Layout.model_fields}
        | {"head": head, "frozen": (*layout.frozen, *(name for name in untrained if name not in head.tensors))}
    )


def _parts(plan: Plan) -> tuple[SharedOutputs, ...]:
    """Partition the labels by which silos annotate them; empty if all silos annotate all, or keep their heads."""
    outputs: dict[tuple[str, ...], list[int]] = {}
    for output, label in enumerate(plan.model.labels):
        outputs.setdefault(plan.holders(label), []).append(output)
    if plan.model.head == "own" or set(outputs) <= {plan.names}:
        return ()
    return tuple(SharedOutputs(silos=silos, outputs=tuple(labels)) for silos, labels in outputs.items())


def derive_layout(
    model: nn.Module,
    batch: Mapping[str, Any],
    merge: Merge | None = None,
    *,
    scaled: bool = False,
    shared: Collection[str] | None = None,
    parts: tuple[SharedOutputs, ...] = (),
    parted: Collection[str] = (),
) -> Layout:
    """Run a model on a public batch to find the groups of its layout.

    Example:
        >>> layout = gramfuse.derive_layout(base, batch)
        >>> [weight.weight for weight in layout.groups[-1].weights]
        ['classifier.weight']

    Linear modules form a group if all their calls receive identical tensors and they have the same Gram structure. Each
    tensor of experts is its own group. A module that is called several times with different inputs, like ALBERT's
    layers, has one Gram matrix over all of them.

    These are averaged instead: modules that the model does not call; experts that do not compute the standard formula;
    modules whose token rows cannot be identified; and, unless `merge.context_free` says otherwise, modules each of
    whose input rows depends on one token and not on its context. Buffers that training changes are averaged, and
    counters summed, whatever is frozen.

    A model in half precision is converted to float32 and restored afterwards.

    Args:
        batch: keyword arguments of the model's forward: padded texts with different words and lengths, or images. For
            an encoder-decoder model, targets (`labels`, −100 where padded) must differ in length from inputs.
        merge: structures and exclusions; by default full Gram matrices for everything.
        scaled: record each feature's scale on this batch, which secure sums need; the batch must then be public.
        shared: names of the parameters and buffers to merge; by default all.
        parts: outputs of the last layer, partitioned by which silos train them.
        parted: names of that layer's weight and bias.

    Raises:
        ModelError: if an argument has the wrong type; a pattern matches nothing or contradicts `merge.context_free`;
            nothing is left to merge; the model's outputs for an example depend on padding or on the rest of its batch;
            the batch is not varied enough (lengths that differ, at least two different tokens); training changes a
            buffer that cannot be merged; or the model fails.
    """
    check_argument("derive_layout: model", model, nn.Module, "a torch.nn.Module", ModelError)
    check_argument("derive_layout: batch", batch, Mapping, "one batch, the arguments of forward by name", ModelError)
    check_argument("derive_layout: merge", merge, (Merge, NoneType), "a gramfuse.Merge", ModelError)
    merge = merge or Merge()
    parameters = {name: p for name, p in model.named_parameters() if shared is None or name in shared}
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ModelError("all silos share no trainable parameter, so there is nothing to merge")
    linears = [linear for linear in (*linear_modules(model), *experts_of(model)) if linear.weight in parameters]
    _check_patterns(merge, linears)
    with in_float32(model):
        trained = {linear.weight: linear for linear in linears if linear.parameter.requires_grad}
        probed = _probe(model, widened(batch), merge, trained)
    buffers = dict(model.named_buffers())
    return Layout(
        groups=tuple(_groups(probed, parts, parted, scaled=scaled)),
        tensors=(
            *(
                Tensor(
                    name=name,
                    shape=tuple(p.shape),
                    merge="regmean" if name in probed.calls else "mean",
                    parted=name in parted,
                    context_free=name in probed.context_free,
                    unmatched=name in probed.unmatched,
                )
                for name, p in parameters.items()
                if p.requires_grad
            ),
            *(
                Tensor(name=name, shape=tuple(buffers[name].shape), merge=how, buffer=True)
                for name, how in probed.buffers.items()
                if shared is None or name in shared
            ),
        ),
        frozen=tuple(name for name, p in parameters.items() if not p.requires_grad),
        parts=parts,
    )


def _check_patterns(merge: Merge, linears: Sequence[LinearModule]) -> None:
    for key, patterns in (("gram", tuple(merge.gram)), ("exclude", merge.exclude)):
        for pattern in patterns:
            matches = [linear for linear in linears if fnmatchcase(linear.weight, pattern)]
            if not matches:
                raise ModelError(
                    f"merge.{key}: pattern {pattern!r} matches no linear weight of the base model, which has, for "
                    "example, "
                    f"{', '.join(_closest(pattern, [linear.weight for linear in linears]))}"
                )
            averaged = merge.experts_in(secure=False) == "mean" and all(linear.experts for linear in matches)
            if key == "gram" and pattern != "*" and averaged:
                raise ModelError(
                    f"merge.gram: pattern {pattern!r} matches only experts of a mixture ({matches[0].weight!r}), which "
                    "are averaged, so it has no effect; remove it or, only if all silos accept it, use "
                    'merge.experts = "full"'
                )


def _closest(pattern: str, weights: Sequence[str]) -> list[str]:
    """Return the weights most similar to a pattern, one of each family, the most similar first."""
    representatives = {family(weight): weight for weight in reversed(weights)}
    matcher = SequenceMatcher(None, "", pattern.strip("*"))

    def similarity(weight: str) -> int:
        matcher.set_seq1(weight)
        return sum(block.size for block in matcher.get_matching_blocks())

    return sorted(representatives.values(), key=similarity, reverse=True)[:SUGGESTIONS]


class _Probed(NamedTuple):
    """What running a model on a public batch shows about the weights of its trained linear modules.

    Attributes:
        context_free: weights whose layers see tokens without context.
        structures: structures of the Gram matrices.
        candidates: weights that can have a Gram matrix.
        rows: which rows of the candidates' inputs count.
        unmatched: weights without a Gram matrix because their token rows cannot be identified.
        calls: the candidates' calls, in the order in which the model first calls them.
        buffers: buffers that training changes, and how they are merged.
    """

    context_free: frozenset[str]
    structures: Mapping[str, str | None]
    candidates: Mapping[str, LinearModule]
    rows: Mapping[str, tuple[RowKind, ...]]
    unmatched: frozenset[str]
    calls: Mapping[str, Calls]
    buffers: Mapping[str, Literal["mean", "sum"]]


def _probe(model: nn.Module, batch: Mapping[str, Any], merge: Merge, trained: Mapping[str, LinearModule]) -> _Probed:
    modules = {weight: linear.module for weight, linear in trained.items()}
    readings = find_rows(model, batch, modules)
    without_context = context_free(model, batch, modules)
    structures = {
        weight: _structure(merge, weight, context_free=weight in without_context)
        for weight in trained
        if not any(fnmatchcase(weight, pattern) for pattern in merge.exclude)
        and not (trained[weight].experts and merge.experts_in(secure=False) == "mean")
    }
    wanted = [weight for weight, structure in structures.items() if structure is not None and weight in readings]
    rows = {
        weight: kinds
        for weight in wanted
        if (kinds := readings[weight]) is not None and not (trained[weight].experts and "table" in kinds)
    }
    candidates = {weight: trained[weight] for weight in rows}
    return _Probed(
        context_free=without_context,
        structures=structures,
        candidates=candidates,
        rows=rows,
        unmatched=frozenset(wanted) - rows.keys(),
        calls=calls_of(model, batch, candidates),
        buffers=changed_by_training(model, batch),
    )


def _groups(
    probed: _Probed, parts: tuple[SharedOutputs, ...], parted: Collection[str], *, scaled: bool
) -> Iterator[Group]:
    members: dict[tuple[Any, ...], list[str]] = {}
    for weight, calls in probed.calls.items():
        alone = weight if probed.candidates[weight].experts else None
        members.setdefault((calls.keys, probed.structures[weight], weight in parted, alone), []).append(weight)
    for (_, structure, split, _), weights in members.items():
        first = probed.candidates[weights[0]]
        for part in range(len(parts)) if split else (None,):
            yield Group(
                name=weights[0].removesuffix(".weight") + ("" if part is None else f"[{part}]"),
                d_in=first.d_in,
                structure=structure,
                weights=tuple(
                    Linear(
                        weight=weight,
                        d_out=probed.candidates[weight].d_out if part is None else len(parts[part].outputs),
                        transposed=probed.candidates[weight].kind.transposed,
                    )
                    for weight in weights
                ),
                rows=probed.rows[weights[0]],
                part=part,
                experts=first.experts,
                exponents=exponents_of(probed.calls[weights[0]].power) if scaled else (),
            )


def _structure(merge: Merge, weight: str, *, context_free: bool) -> str | None:
    """Return the structure of a weight's Gram matrix; None if it has none because its layer is context-free."""
    matches = [pattern for pattern in merge.gram if fnmatchcase(weight, pattern)]
    if not matches:
        raise ModelError(f'merge.gram: no pattern matches {weight!r}; add a pattern "*"')
    pattern = max(matches, key=lambda pattern: (len(pattern), pattern))
    structure = merge.gram[pattern]
    if not context_free or merge.context_free == "full":
        return structure
    if pattern != "*" and parse_structure(structure) != 1:
        raise ModelError(
            f"merge.gram: pattern {pattern!r} asks for {structure!r} for {weight!r}, whose layer sees tokens without "
            "context, so its Gram matrix would reveal which tokens occur and how often. Add a longer pattern with "
            f'"diagonal" that matches only such weights, which merge.context-free = {merge.context_free!r} then '
            'governs. Or, only if all silos accept it, use merge.context-free = "full"'
        )
    return None if merge.context_free == "mean" else "diagonal"
