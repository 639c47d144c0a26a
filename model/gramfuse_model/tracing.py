"""Makes the layout: which linear weights share an input, found by running the base model once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gramfuse_model.base import Base
from gramfuse_model.batch import IGNORED
from gramfuse_model.buffers import changed_by_training
from gramfuse_model.context_free import context_free
from gramfuse_model.experts import GATE_UP, hidden_units, is_understood
from gramfuse_model.heads import answers, last_layer
from gramfuse_model.lengths import room_of
from gramfuse_model.linear import LinearModule, experts_of, linear_modules
from gramfuse_model.observation import Hook, observing
from gramfuse_model.public_text import PUBLIC_TEXT
from gramfuse_model.rows import find_rows
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.layout import EXPONENT, Group, Layout, Linear, Part, Tensor
from gramfuse_protocol.plan import Merge, Plan
from gramfuse_protocol.structure import parse_structure

LONGEST = 1024
"""Most tokens of the text that a base model is tried on, however long examples may be."""

USUAL_IMAGE = 224
"""Height and width of an image, where a model takes any."""

PUBLIC = {"input": "input_ids", "target": "labels"}
"""Where the public text stands in a batch."""

QUIETEST = 8
"""Powers of two by which a feature's scale may lie below that of the loudest in its group."""


def plan_layout(plan: Plan, base: Base, given: Layout | None = None) -> Layout:
    """Return the layout of a plan over its base model, and check it against a locked plan.

    Args:
        given: the layout that came with a locked plan. It is taken if it has the plan's digest and differs from the
            one derived here by no more than what rounding on another machine may do to its exponents.

    Raises:
        ModelError: if the plan is locked to another layout.
    """
    parts = _parts(plan)
    _check_long_texts(plan, base)
    with _of_public_text(base):
        layout = derive_layout(
            base.model,
            public_batch(base),
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


def public_batch(base: Base) -> dict[str, torch.Tensor]:
    """Return what a base model is traced on: keyword arguments of its forward, of nobody's data."""
    model, texts = base.model, list(PUBLIC_TEXT)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": _public_images(model)}
    batch = dict(base.tokenizer(texts, padding=True, return_attention_mask=True, return_tensors="pt"))
    if answers(model):
        batch |= _targets(base, texts[1:] + texts[:1])  # of other lengths than the inputs, to tell their rows apart
    return batch


def _check_long_texts(plan: Plan, base: Base) -> None:
    """Raise ModelError unless a text as long as examples may be is the same to the base model alone and beside others.

    BigBird, for one, computes something else from a certain length on, and never again once it saw a shorter text.
    """
    model, length = base.model, min(LONGEST, max(task.max_length for task in plan.tasks.values()))
    if model.main_input_name == "pixel_values":
        return
    texts = [" ".join(PUBLIC_TEXT * (1 + length // 100)), min(PUBLIC_TEXT, key=len)]
    settings = {"truncation": True, "max_length": length, "return_attention_mask": True, "return_tensors": "pt"}
    batch = dict(base.tokenizer(texts, padding=True, **settings))
    if bool(batch["attention_mask"].all()):
        return  # examples are so short that there is no difference
    if answers(model):
        batch |= _targets(base, PUBLIC_TEXT[1:3])
    try:
        find_rows(model, batch, {})
    except (IndexError, RuntimeError) as error:  # it differs with the table of positions
        raise ModelError(
            f"the base model cannot take a text of {batch['input_ids'].shape[1]} tokens, as model.max-length allows: "
            f"{error}; make model.max-length smaller"
        ) from error


@contextmanager
def _of_public_text(base: Base) -> Iterator[None]:
    """Raise ModelError, saying for how many tokens a model has places, if it cannot take the public text as a whole."""
    try:
        yield
    except (IndexError, RuntimeError) as error:  # it differs with the table of positions
        batch = public_batch(base)
        lengths = {kind: batch[key].shape[1] for kind, key in PUBLIC.items() if key in batch}
        for kind, room in room_of(base, *(lengths.get(kind, 1) for kind in PUBLIC)).items():
            if room.tokens < lengths[kind]:
                raise ModelError(
                    f"the model has places for {room.tokens:,} tokens ({room.table!r}), and its tokenizer makes "
                    f"{lengths[kind]:,} of the public text that every base model is tried on; take a base for longer "
                    "texts"
                ) from error
        raise


def _targets(base: Base, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row) for row in base.tokenizer(text_target=list(texts))["input_ids"]]
    labels = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORED)
    return {"labels": labels, "decoder_attention_mask": (labels != IGNORED).long()}


def _public_images(model: PreTrainedModel) -> torch.Tensor:
    """Return waves of different direction, length and colour, in [−1, 1]: (images, channels, height, width)."""
    size = getattr(model.config, "image_size", USUAL_IMAGE)
    height, width = (size, size) if isinstance(size, int) else size
    images, channels = len(PUBLIC_TEXT), model.config.num_channels
    n = torch.arange(images, dtype=torch.float64).view(-1, 1, 1, 1)
    channel = torch.arange(channels, dtype=torch.float64).view(1, -1, 1, 1)
    y = torch.linspace(0, 1, height, dtype=torch.float64).view(1, 1, -1, 1)
    x = torch.linspace(0, 1, width, dtype=torch.float64).view(1, 1, 1, -1)
    direction = math.pi * n / images
    along = x * torch.cos(direction) + y * torch.sin(direction)
    return torch.sin(2 * math.pi * (1 + n) * along + channel).float()


def _parts(plan: Plan) -> tuple[Part, ...]:
    """Return the labels by the silos that annotate them; nothing if all silos annotate all, or keep their heads."""
    outputs: dict[tuple[str, ...], list[int]] = {}
    for output, label in enumerate(plan.model.labels):
        outputs.setdefault(plan.holders(label), []).append(output)
    if plan.model.head == "own" or set(outputs) <= {plan.names}:
        return ()
    return tuple(Part(silos=silos, outputs=tuple(labels)) for silos, labels in outputs.items())


def derive_layout(
    model: nn.Module,
    batch: Mapping[str, Any],
    merge: Merge | None = None,
    *,
    scaled: bool = False,
    shared: Collection[str] | None = None,
    parts: tuple[Part, ...] = (),
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
    without context (`gramfuse_model.context_free`) are averaged, unless `merge.context_free` says otherwise, and so are
    those of whose input it cannot be told which rows are tokens (`gramfuse_model.rows`). Buffers that training changes
    (`gramfuse_model.buffers`) are averaged, and counters summed, whatever is frozen.

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
        ModelError: if a pattern fits nothing or asks for what `merge.context_free` does not give, if nothing is left to
            merge, if the model's outputs for an example depend on padding or on the rest of its batch, if the batch
            does not show what must be seen (lengths that differ, and more than one token), or if training changes a
            buffer that cannot be merged.
    """
    merge = merge or Merge()
    parameters = {name: p for name, p in model.named_parameters() if shared is None or name in shared}
    linears = [linear for linear in (*linear_modules(model), *experts_of(model)) if linear.weight in parameters]
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ModelError("no parameter that is trained is shared by all silos, so there is nothing to merge")
    for key, patterns in (("gram", tuple(merge.gram)), ("exclude", merge.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(linear.weight, pattern) for linear in linears):
                raise ModelError(f"merge.{key}: pattern {pattern!r} fits no linear weight of the base model")
    trained = {linear.weight: linear for linear in linears if linear.parameter.requires_grad}
    modules = {weight: linear.module for weight, linear in trained.items()}
    rows = find_rows(model, batch, modules)
    single = context_free(model, batch, modules)
    structures = {
        weight: _structure(merge, weight, context_free=weight in single)
        for weight in trained
        if not any(fnmatchcase(weight, pattern) for pattern in merge.exclude)
        and not (trained[weight].experts and merge.experts_in(secure=False) == "mean")
    }
    wanted = {weight: trained[weight] for weight, structure in structures.items() if structure is not None}
    candidates = {
        weight: linear
        for weight, linear in wanted.items()
        if rows.get(weight) is not None and not (linear.experts and "table" in (rows[weight] or ()))
    }
    calls = _calls(model, batch, candidates)
    members: dict[tuple[Any, ...], list[str]] = {}
    for weight, found in calls.items():  # in the order in which the model first calls them
        alone = weight if candidates[weight].experts else None
        members.setdefault((found.keys, structures[weight], weight in parted, alone), []).append(weight)
    groups = tuple(
        Group(
            name=weights[0].removesuffix(".weight") + ("" if part is None else f"[{part}]"),
            d_in=candidates[weights[0]].d_in,
            structure=structure,
            weights=tuple(
                Linear(
                    weight=weight,
                    d_out=candidates[weight].d_out if part is None else len(parts[part].outputs),
                    transposed=candidates[weight].kind.transposed,
                )
                for weight in weights
            ),
            rows=rows[weights[0]] or (),
            part=part,
            experts=candidates[weights[0]].experts,
            exponents=_exponents(calls[weights[0]].power) if scaled else (),
        )
        for (_, structure, split, _), weights in members.items()
        for part in (range(len(parts)) if split else (None,))
    )
    buffers = dict(model.named_buffers())
    return Layout(
        groups=groups,
        tensors=(
            *(
                Tensor(
                    name=name,
                    shape=tuple(p.shape),
                    merge="regmean" if name in calls else "mean",
                    parted=name in parted,
                    context_free=name in single,
                    unmatched=name in wanted and name in rows and name not in candidates,
                )
                for name, p in parameters.items()
                if p.requires_grad
            ),
            *(
                Tensor(name=name, shape=tuple(buffers[name].shape), merge=how, buffer=True)
                for name, how in changed_by_training(model, batch).items()
                if shared is None or name in shared
            ),
        ),
        frozen=tuple(name for name, p in parameters.items() if not p.requires_grad),
        parts=parts,
    )


@dataclass
class _Calls:
    """How one module is called: identities of the tensors that it receives, and their power.

    The power is the largest mean square of each feature over all rows of a call, padding included: float64 (d_in,). Of
    experts it is the largest that any of them would have if all rows were routed to it, so that it is known of those
    that a public batch does not use.
    """

    keys: tuple[Any, ...]
    power: torch.Tensor


def _calls(model: nn.Module, batch: Mapping[str, Any], linears: Mapping[str, LinearModule]) -> dict[str, _Calls]:
    """Run a model once and return how each of these modules is called.

    Those that are not called are left out, and experts that compute something else than is thought.
    """
    calls: dict[str, _Calls] = {}
    strange: set[str] = set()
    alive: list[torch.Tensor] = []  # an identity is only good while the tensor lives

    def record(weight: str) -> Hook:
        def hook(module: nn.Module, x: torch.Tensor, others: tuple[Any, ...]) -> None:
            if linears[weight].experts and not is_understood(module, (x, *others)):
                strange.add(weight)
                return
            alive.append(x)
            key = (x.data_ptr(), x.storage_offset(), tuple(x.shape), x.stride(), x._version)
            power = _power(linears[weight], x)
            before = calls.get(weight)
            if before is None:
                calls[weight] = _Calls((key,), power)
            else:
                calls[weight] = _Calls((*before.keys, key), torch.maximum(before.power, power))

        return hook

    device = next(model.parameters()).device
    with observing(model, [(linear.module, record(weight)) for weight, linear in linears.items()]):
        model(**{key: value.to(device) for key, value in batch.items()})
    return {weight: found for weight, found in calls.items() if weight not in strange}


def _power(linear: LinearModule, x: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each feature that a weight is multiplied with, as `_Calls` has it."""
    rows = x.reshape(-1, x.shape[-1])
    received = (
        (hidden_units(linear.module, expert, rows) for expert in range(linear.experts))
        if linear.experts and not linear.weight.endswith(GATE_UP)
        else (rows,)
    )
    return torch.stack([features.double().square().mean(dim=0).cpu() for features in received]).max(dim=0).values


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
