"""Which rows of a layer's input are tokens: found by running examples together, padded, and each of them alone.

Shapes do not tell it. Longformer and LED pad a text inside to a multiple of their window, XLNet has the batch in the
second dimension, Funnel halves a text on its way, and a table of positions may be as long as the longest text. What is
true of a row that counts is that it has one value, whatever stands beside its example. So a few examples run as a
padded batch, and each alone without padding; a reading of the rows (`gramfuse_model.probing.hooks.rows_of`) is taken
only if it finds in the batch what the examples have alone. A layer without such a reading is not merged in closed form.

What a model puts out is read in the same way. If it is not the same in a batch as alone, padding enters what the model
computes, and nothing that is measured in batches would be right.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from gramfuse_model.heads import head_parameters, is_encoder_decoder
from gramfuse_model.layers import linear_modules
from gramfuse_model.probing.batch import PLACED, TARGETS, Batch, alone, chosen, has_places, masks_of, with_shorter
from gramfuse_model.probing.hooks import Hook, by_example, observing, rows_of, run
from gramfuse_protocol.contract.layout import Rows
from gramfuse_protocol.errors import ModelError

TOLERANCE = 1e-4
"""Share of their length by which rows may differ and be the same; rounding makes it 1e-6 or less."""

TEXTS, IMAGES = 5, 3
"""Examples that run alone."""

WIDTH = 8
"""Rows are compared by so many random projections, so that no activations have to be kept."""

OUTPUTS = ""
"""Stands for what the model puts out among the names of modules."""


class _Reading(NamedTuple):
    kind: Rows
    inner: bool = False
    """Whether there are rows after those of the text, which are padding that the model added."""


def find_rows(
    model: nn.Module, batch: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[Rows, ...] | None]:
    """Return for each call of each module which rows of its input count, or None if that cannot be told.

    Modules that are not called are left out. Of inputs that are neither tokens, nor their embeddings, nor
    pixels, and that no mask goes with, all rows count.

    Args:
        batch: keyword arguments of the model's forward. For a model with encoder and decoder, a text and its target
            must differ in length.
        modules: by name, whose inputs have features in their last dimension.

    Raises:
        ModelError: if what the model puts out for an example depends on what else is in its batch, or on padding; or if
            the batch cannot show it.
    """
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    masks = masks_of(model, batch)
    if not masks and "pixel_values" not in batch:
        calls = _run(model, batch, modules)
        every: Rows = "all"
        return {name: (every,) * len(calls[name]) for name in modules if name in calls}
    if "input" in masks and _is_one(masks["input"].sum(dim=1)):
        batch = with_shorter(batch, masks, getattr(model, "config", None))
        masks = masks_of(model, batch)
    few = _telling(model, batch, masks)
    batch, masks = chosen(batch, few), chosen(masks, few)
    head = _head(model)
    found = _readings(model, batch, masks, {**modules, **head})
    if _depends(found, head):
        raise ModelError(_padding_matters(model, batch, masks, head))
    idle = _idle(model, batch, modules) if "pixel_values" in batch else frozenset()
    return {
        name: None if None in found[name] or name in idle else tuple(reading.kind for reading in found[name] if reading)
        for name in modules
        if name in found
    }


def _telling(model: nn.Module, batch: Batch, masks: Batch) -> list[int]:
    """Return the indices of a few examples of different lengths, or of a few images.

    Raises:
        ModelError: if there are none.
    """
    if "input" not in masks:
        if len(batch["pixel_values"]) < 2:
            raise ModelError("the batch that a layout is made on has one image; it takes two that differ")
        return list(range(min(IMAGES, len(batch["pixel_values"]))))
    lengths = masks["input"].sum(dim=1)
    order = lengths.argsort(stable=True).tolist()
    places = torch.linspace(0, len(order) - 1, min(TEXTS, len(order))).round().long().tolist()
    few = [order[place] for place in places]
    if _is_one(lengths):
        raise ModelError(
            f"all texts of the batch that a layout is made on have {int(lengths[0])} tokens, so that it cannot be seen "
            "which rows of a layer are tokens; take longer ones"
        )
    if is_encoder_decoder(model) and "target" not in masks:
        raise ModelError("the batch that a layout is made on has no targets ('labels'); the model's decoder needs them")
    if "target" in masks and torch.equal(lengths[few], masks["target"].sum(dim=1)[few]):
        raise ModelError(
            "inputs and targets of the batch that a layout is made on have one length, so that their rows cannot be "
            "told apart; take other targets"
        )
    return few


def _is_one(lengths: torch.Tensor) -> bool:
    return int(lengths.min()) == int(lengths.max())


def _head(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear modules of a model's head by the names of their weights."""
    if not isinstance(model, PreTrainedModel):
        return {}
    head = head_parameters(model)
    return {linear.weight: linear.module for linear in linear_modules(model) if linear.weight in head}


def _readings(
    model: nn.Module, batch: Batch, masks: Batch, modules: Mapping[str, nn.Module]
) -> dict[str, list[_Reading | None]]:
    """Return the reading of each call of each module, and of the outputs."""
    together = _run(model, batch, modules)
    examples = len(next(iter(batch.values())))
    single = [_run_alone(model, alone(batch, masks, index), modules) for index in range(examples)]
    found: dict[str, list[_Reading | None]] = {}
    for name, calls in together.items():
        if any(len(one.get(name, ())) != len(calls) for one in single):
            found[name] = [None] * len(calls)
        else:
            found[name] = [_reading(x, [one[name][n] for one in single], masks) for n, x in enumerate(calls)]
    if any(reading and reading.inner for readings in found.values() for reading in readings):
        other = _run(model, _with_other_padding(batch, masks), modules)
        for name, readings in found.items():
            found[name] = [
                reading if reading is None or not reading.inner or _is_padding(x, y, reading.kind, masks) else None
                for reading, x, y in zip(readings, together[name], other[name], strict=True)
            ]
    return found


def _run(
    model: nn.Module, batch: Batch, modules: Mapping[str, nn.Module], what: str = "a batch of examples"
) -> dict[str, list[torch.Tensor]]:
    """Run a model and return projections of what modules receive, and of what it puts out, if that is known."""
    calls: dict[str, list[torch.Tensor]] = {}
    latest: list[Any] = [
        None,
        None,
        None,
    ]  # the last tensor, its version and projection; the next module may get it too

    def record(name: str) -> Hook:
        def hook(_: nn.Module, x: torch.Tensor, __: tuple[Any, ...]) -> None:
            if x is not latest[0] or x._version != latest[1]:
                latest[:] = x, x._version, _projected(x)
            calls.setdefault(name, []).append(latest[2])

        return hook

    with observing(model, [(module, record(name)) for name, module in modules.items()]):
        result = run(model, batch, what)
        outputs = getattr(result, "logits", getattr(result, "last_hidden_state", None))
        if outputs is not None:
            calls[OUTPUTS] = [_projected(outputs)]
    return calls


def _run_alone(model: nn.Module, example: Batch, modules: Mapping[str, nn.Module]) -> dict[str, list[torch.Tensor]]:
    """Do that with one example.

    Raises:
        ModelError: if the model fails on it: some take no text that is shorter than what they pool.
    """
    try:
        return _run(model, example, modules, "a single example")
    except ModelError as error:
        raise ModelError(f"{error}. It would fail on a silo's data too; take another model") from error.__cause__


def _projected(x: torch.Tensor) -> torch.Tensor:
    directions = torch.randn(x.shape[-1], WIDTH, generator=torch.Generator().manual_seed(x.shape[-1]))
    return x.float() @ directions.to(x.device)


def _reading(x: torch.Tensor, single: list[torch.Tensor], masks: Batch) -> _Reading | None:
    """Return how the rows of a batch are read so that they are those of its examples alone.

    Args:
        x: of the batch, (…, WIDTH).
        single: of each example.
    """
    if all(_same(one, x) for one in single):
        return _Reading("table")
    inner = None
    kinds: tuple[Rows, ...] = ("input", "turned", "target")
    for kind in kinds:
        mask = masks.get("input" if kind == "turned" else kind)
        if mask is None:
            continue
        try:
            own = [rows_of(one, kind, mask[n][mask[n]].unsqueeze(0)) for n, one in enumerate(single)]
            rows = rows_of(x, kind, mask)
        except ValueError:
            continue
        if _same(rows, torch.cat(own)):
            if all(part.numel() == one.numel() for part, one in zip(own, single, strict=True)):
                return _Reading(kind)
            inner = inner or (_Reading(kind, inner=True) if kind != "target" else None)
    flat = [one.reshape(-1, WIDTH) for one in single]
    least = int(masks["input"].sum(dim=1).min()) if "input" in masks else len(flat[0])
    # Fewer rows than the shortest text has tokens, and as many for each example: no padding is among them.
    if len({len(one) for one in flat}) == 1 and len(flat[0]) <= least and _same_sum(x.reshape(-1, WIDTH), flat):
        return _Reading("all")
    return inner


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm())


def _same_sum(rows: torch.Tensor, single: list[torch.Tensor]) -> bool:
    """Whether rows are those of single examples in any order: as many, with the same sum of x xᵀ."""
    return len(rows) == sum(map(len, single)) and _same(rows.T @ rows, sum(one.T @ one for one in single))  # type: ignore[arg-type]


def _with_other_padding(batch: Batch, masks: Batch) -> Batch:
    """Return a batch with what stands in the middle of its longest text in the place of all padding of its texts."""
    mask = masks["input"]
    longest = int(mask.sum(dim=1).argmax())
    changed = dict(batch)
    for key in PLACED:
        if key in batch and has_places(batch[key], mask):
            words = batch[key][longest, mask[longest]]
            there = mask.view(*mask.shape, *[1] * (batch[key].dim() - 2))
            changed[key] = torch.where(there, batch[key], words[len(words) // 2])
    return changed


def _is_padding(x: torch.Tensor, other: torch.Tensor, kind: Rows, masks: Batch) -> bool:
    """Whether the rows that padding has by a reading are padding's: they change with it, or are zero, and no others do.

    So it is seen that the rows of a text stand in its order; those that a model adds come after them.
    """
    mask = masks["input"]
    if x.shape != other.shape:
        return False
    rows, moved = (
        by_example(part, kind, mask)[:, : mask.shape[1]].flatten(2).norm(dim=2) for part in (x, x - other)
    )  # (examples, length)
    changed = moved > TOLERANCE * rows
    return not bool(changed[mask].any()) and bool((changed | (rows == 0))[~mask].all())


def _depends(found: Mapping[str, list[_Reading | None]], head: Iterable[str]) -> bool:
    """Whether a model's outputs depend on padding. A head of zeros does not show it; what enters the head does."""
    return any(None in found[name] for name in (OUTPUTS, *head) if name in found)


def _padding_matters(model: nn.Module, batch: Batch, masks: Batch, head: Mapping[str, nn.Module]) -> str:
    """Say that a model's outputs depend on padding, and whether they do on the other side too."""
    what = f"the base model's outputs ({type(model).__name__}) are not the same for an example alone and in a batch"
    if "input" not in masks:
        return f"{what}, so what is measured would depend on how examples are put into batches; take another model"
    told = _other_filler(model, batch, masks["input"])
    if told is not None:
        return f"{what}: {told}"
    left = bool(masks["input"][:, -1].all())
    here, there = ("left", "right") if left else ("right", "left")
    turned = _padded_on_the_other_side(batch, masks["input"], left=left)
    if _depends(_readings(model, turned, masks_of(model, turned), head), head):
        remedy = "nor on the other side: padding enters what it computes for real tokens. Take another model"
    else:
        remedy = f'on the {there} they are. Set "padding_side": "{there}" in its tokenizer_config.json'
    return f"{what} padded on the {here}; {remedy}"


def _other_filler(model: nn.Module, batch: Batch, mask: torch.Tensor) -> str | None:
    """Say that a model takes another token for padding than its batch is padded with, if it does."""
    if not isinstance(model, PreTrainedModel) or "input_ids" not in batch:
        return None
    told, used = model.config.get_text_config().pad_token_id, set(batch["input_ids"][~mask].tolist())
    if told is None or len(used) != 1 or told in used:
        return None
    (token,) = used
    return (
        f"its configuration says that padding is token {told}, and texts are padded with token {token}; set "
        f'"pad_token_id": {token} in its config.json'
    )


def _padded_on_the_other_side(batch: Batch, mask: torch.Tensor, *, left: bool) -> Batch:
    order = (~mask if left else mask).int().argsort(dim=1, stable=True)
    example = torch.arange(len(mask), device=mask.device).unsqueeze(1)
    return {
        key: value[example, order] if key not in TARGETS and has_places(value, mask) else value
        for key, value in batch.items()
    }


def _idle(model: nn.Module, batch: Batch, modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the modules some of whose rows are zeros, or change nothing of what the model's body makes of an image.

    They are what a model pads inside, to a multiple of its window (Swin): what a layer receives is padded with zeros,
    and of what comes of those nothing is kept. All images being of one size, batches do not show it.
    """
    body = _body_for_images(model)
    inputs: list[tuple[str, torch.Tensor]] = []

    def record(name: str) -> Hook:
        return lambda _, x, __: (
            inputs.append((name, x)) if x.requires_grad else None
        )  # a table does not come of the image

    images = batch["pixel_values"].clone().requires_grad_()
    with observing(model, [(module, record(name)) for name, module in modules.items()], gradients=True):
        features = run(body, {"pixel_values": images}, "images")[0]
    if not inputs:
        return frozenset()
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features.device)
    slopes = torch.autograd.grad((features * weights).sum(), [x for _, x in inputs], allow_unused=True)
    return frozenset(
        name
        for (name, x), slope in zip(inputs, slopes, strict=True)
        if slope is None or _has_zeros(x, len(images)) or _has_zeros(slope, len(images))
    )


def _has_zeros(x: torch.Tensor, images: int) -> bool:
    """Whether a row is all zeros, at the same place of each image if each has as many rows."""
    zeros = (x.detach().reshape(-1, x.shape[-1]) == 0).all(dim=1)
    return bool((zeros.view(images, -1).all(dim=0) if len(zeros) % images == 0 else zeros).any())


def _body_for_images(model: nn.Module) -> nn.Module:
    """Return the part of a model that takes images without a head; of some (CLIP, SigLIP) it is not `base_model`."""
    body = model.base_model if isinstance(model, PreTrainedModel) else model
    if body is not model:
        return body
    takes = (part for part in model.children() if "pixel_values" in inspect.signature(part.forward).parameters)
    return next(takes, model)
