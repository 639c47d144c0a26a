"""Makes the layout: which linear weights share an input, found by running the base model once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from types import NoneType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from gramfuse_model.buffers import changed_by_training
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
from gramfuse_protocol.contract.layout import EXPONENT, Group, Layout, Linear, Rows, SharedOutputs, Tensor
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import ModelError

QUIETEST = 8
"""Powers of two by which a feature's scale may lie below that of the loudest in its group."""

NAMED = 3
"""Weights that an error names where a pattern fits none."""


def plan_layout(plan: Plan, base: Base, given: Layout | None = None) -> Layout:
    """Return the layout of a plan over its base model, and check it against a locked plan.

    Args:
        given: the layout that came with a locked plan. It is taken if it has the plan's digest and differs from the
            one derived here by no more than what rounding on another machine may do to its exponents.

    Raises:
        ModelError: if the plan is locked to another layout.
    """
    parts = _parts(plan)
    check_long_texts(plan, base)
    batch = public_batch(base)
    with trying(base, batch):
        layout = derive_layout(
            base.model,
            batch,
            plan.merge.model_copy(update={"experts": plan.merge.experts_in(secure=plan.privacy.secure_aggregation)}),
            scaled=True,
            shared=base.shared,
            parts=parts,
            parted=last_layer(base.model, len(plan.model.labels)) if parts else frozenset(),
        )
    if given is not None and given.digest == plan.merge.layout and given.follows(layout):
        return given
    if plan.merge.layout is not None and layout.digest != plan.merge.layout:
        raise ModelError(
            f"the layout derived here has digest {layout.digest}, the plan is locked to {plan.merge.layout}; "
            "both sides must run the same versions of gramfuse and transformers"
        )
    return layout


def _parts(plan: Plan) -> tuple[SharedOutputs, ...]:
    """Return the labels by the silos that annotate them; nothing if all silos annotate all, or keep their heads."""
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
    """Run a model once on a public batch and find its groups.

    Example:
        >>> layout = gramfuse.derive_layout(base, batch)
        >>> [weight.weight for weight in layout.groups[-1].weights]
        ['classifier.weight']

    Linear modules belong to one group if every one of their calls received the identical tensor, and if they
    have the same Gram structure. Each tensor of experts (`gramfuse_model.experts`) is a group of its own. Modules that
    the model does not call, and experts that compute something else, keep the mean. A module that is called several
    times with different inputs, as ALBERT's layers are, has one Gram matrix over all of them. Modules that see tokens
    without context (`gramfuse_model.probing.context_free`) are averaged, unless `merge.context_free` says otherwise,
    and so are those of whose input it cannot be told which rows are tokens (`gramfuse_model.probing.rows`). Buffers
    that training changes (`gramfuse_model.buffers`) are averaged, and counters summed, whatever is frozen. A model in
    half precision is in float32 meanwhile, and as it was afterwards.

    Args:
        batch: keyword arguments of the model's forward: texts of different words and lengths, padded, or images. For a
            model with encoder and decoder, targets (`labels`, −100 where padded) must have other lengths than inputs.
        merge: structures and exclusions; by default full Gram matrices for everything.
        scaled: whether the layout says how large each feature is on this batch, which a secure sum needs; the batch
            must then be public.
        shared: names of the parameters and buffers that are merged; the others are in no layout. By default all.
        parts: outputs of the last layer by the silos that have them.
        parted: names of that layer's weight and bias.

    Raises:
        ModelError: naming an argument of a wrong type; if a pattern fits nothing or asks for what `merge.context_free`
            does not give, if nothing is left to merge, if the model's outputs for an example depend on padding or on
            the rest of its batch, if the batch does not show what must be seen (lengths that differ, and more than one
            token), or if training changes a buffer that cannot be merged, or if the model fails, with what it said.
    """
    check_argument("derive_layout: model", model, nn.Module, "a torch.nn.Module", ModelError)
    check_argument("derive_layout: batch", batch, Mapping, "one batch, the arguments of forward by name", ModelError)
    check_argument("derive_layout: merge", merge, (Merge, NoneType), "a gramfuse.Merge", ModelError)
    merge = merge or Merge()
    parameters = {name: p for name, p in model.named_parameters() if shared is None or name in shared}
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ModelError("no parameter that is trained is shared by all silos, so there is nothing to merge")
    linears = [linear for linear in (*linear_modules(model), *experts_of(model)) if linear.weight in parameters]
    _check_patterns(merge, linears)
    with in_float32(model):
        seen = _look(model, widened(batch), merge, {one.weight: one for one in linears if one.parameter.requires_grad})
    buffers = dict(model.named_buffers())
    return Layout(
        groups=tuple(_groups(seen, parts, parted, scaled=scaled)),
        tensors=(
            *(
                Tensor(
                    name=name,
                    shape=tuple(p.shape),
                    merge="regmean" if name in seen.calls else "mean",
                    parted=name in parted,
                    context_free=name in seen.single,
                    unmatched=name in seen.unmatched,
                )
                for name, p in parameters.items()
                if p.requires_grad
            ),
            *(
                Tensor(name=name, shape=tuple(buffers[name].shape), merge=how, buffer=True)
                for name, how in seen.buffers.items()
                if shared is None or name in shared
            ),
        ),
        frozen=tuple(name for name, p in parameters.items() if not p.requires_grad),
        parts=parts,
    )


def _check_patterns(merge: Merge, linears: Sequence[LinearModule]) -> None:
    for key, patterns in (("gram", tuple(merge.gram)), ("exclude", merge.exclude)):
        for pattern in patterns:
            fitting = [linear for linear in linears if fnmatchcase(linear.weight, pattern)]
            if not fitting:
                raise ModelError(
                    f"merge.{key}: pattern {pattern!r} fits no linear weight of the base model; it has, for instance, "
                    f"{', '.join(_closest(pattern, [linear.weight for linear in linears]))}"
                )
            averaged = merge.experts_in(secure=False) == "mean" and all(linear.experts for linear in fitting)
            if key == "gram" and pattern != "*" and averaged:
                raise ModelError(
                    f"merge.gram: pattern {pattern!r} fits only experts of a mixture, {fitting[0].weight!r} for one, "
                    "which are averaged, so that it has no effect; take it out, or, only if all silos accept it, use "
                    'merge.experts = "full"'
                )


def _closest(pattern: str, weights: Sequence[str]) -> list[str]:
    """Return the weights that are most like a pattern, one of each family, the most similar first."""
    of_families = {family(weight): weight for weight in reversed(weights)}
    likeness = SequenceMatcher(None, "", pattern.strip("*"))

    def alike(weight: str) -> int:
        likeness.set_seq1(weight)
        return sum(block.size for block in likeness.get_matching_blocks())

    return sorted(of_families.values(), key=alike, reverse=True)[:NAMED]


class _Seen(NamedTuple):
    """What a model shows on a public batch. Weights are those of linear modules that are trained, by name.

    Attributes:
        single: whose layers see tokens without context.
        structures: of their Gram matrices.
        candidates: those that may have one.
        rows: which rows of their inputs count.
        unmatched: those that may have none, since it cannot be told which rows count.
        calls: of candidates, in the order in which the model first calls them.
        buffers: those that training changes, and how they are merged.
    """

    single: frozenset[str]
    structures: Mapping[str, str | None]
    candidates: Mapping[str, LinearModule]
    rows: Mapping[str, tuple[Rows, ...]]
    unmatched: frozenset[str]
    calls: Mapping[str, Calls]
    buffers: Mapping[str, Literal["mean", "sum"]]


def _look(model: nn.Module, batch: Mapping[str, Any], merge: Merge, trained: Mapping[str, LinearModule]) -> _Seen:
    modules = {weight: linear.module for weight, linear in trained.items()}
    found = find_rows(model, batch, modules)
    single = context_free(model, batch, modules)
    structures = {
        weight: _structure(merge, weight, context_free=weight in single)
        for weight in trained
        if not any(fnmatchcase(weight, pattern) for pattern in merge.exclude)
        and not (trained[weight].experts and merge.experts_in(secure=False) == "mean")
    }
    wanted = [weight for weight, structure in structures.items() if structure is not None and weight in found]
    rows = {
        weight: kinds
        for weight in wanted
        if (kinds := found[weight]) is not None and not (trained[weight].experts and "table" in kinds)
    }
    candidates = {weight: trained[weight] for weight in rows}
    return _Seen(
        single=single,
        structures=structures,
        candidates=candidates,
        rows=rows,
        unmatched=frozenset(wanted) - rows.keys(),
        calls=calls_of(model, batch, candidates),
        buffers=changed_by_training(model, batch),
    )


def _groups(seen: _Seen, parts: tuple[SharedOutputs, ...], parted: Collection[str], *, scaled: bool) -> Iterator[Group]:
    members: dict[tuple[Any, ...], list[str]] = {}
    for weight, found in seen.calls.items():
        alone = weight if seen.candidates[weight].experts else None
        members.setdefault((found.keys, seen.structures[weight], weight in parted, alone), []).append(weight)
    for (_, structure, split, _), weights in members.items():
        first = seen.candidates[weights[0]]
        for part in range(len(parts)) if split else (None,):
            yield Group(
                name=weights[0].removesuffix(".weight") + ("" if part is None else f"[{part}]"),
                d_in=first.d_in,
                structure=structure,
                weights=tuple(
                    Linear(
                        weight=weight,
                        d_out=seen.candidates[weight].d_out if part is None else len(parts[part].outputs),
                        transposed=seen.candidates[weight].kind.transposed,
                    )
                    for weight in weights
                ),
                rows=seen.rows[weights[0]],
                part=part,
                experts=first.experts,
                exponents=_exponents(seen.calls[weights[0]].power) if scaled else (),
            )


def _exponents(power: torch.Tensor) -> tuple[int, ...]:
    """Return the smallest e with 2^e above each feature's root mean square, raised to QUIETEST below the highest."""
    amplitudes = power.sqrt().tolist()
    found = [math.frexp(amplitude)[1] if amplitude else -EXPONENT for amplitude in amplitudes]
    floor = max(found) - QUIETEST
    return tuple(min(EXPONENT, max(-EXPONENT, floor, exponent)) for exponent in found)


def _structure(merge: Merge, weight: str, *, context_free: bool) -> str | None:
    """Return the structure of a weight's Gram matrix, or None if it has none since its layer sees no context."""
    fitting = [pattern for pattern in merge.gram if fnmatchcase(weight, pattern)]
    if not fitting:
        raise ModelError(f'merge.gram: no pattern fits {weight!r}; add a pattern "*"')
    pattern = max(fitting, key=lambda pattern: (len(pattern), pattern))
    structure = merge.gram[pattern]
    if not context_free or merge.context_free == "full":
        return structure
    if pattern != "*" and parse_structure(structure) != 1:
        raise ModelError(
            f"merge.gram: pattern {pattern!r} asks for {structure!r} of {weight!r}, whose layer sees tokens without "
            "context, so that its Gram matrix would tell which tokens occur and how often. Add a longer pattern that "
            f'fits such weights only, with "diagonal": merge.context-free = {merge.context_free!r} says what becomes '
            'of them. Or, only if all silos accept it, use merge.context-free = "full"'
        )
    return None if merge.context_free == "mean" else "diagonal"
