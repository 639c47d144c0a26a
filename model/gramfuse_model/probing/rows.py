"""Finds the token rows of a layer's input, by running examples as a padded batch and one by one.

Shapes are not enough: Longformer and LED pad texts internally to a multiple of their window, XLNet has the batch in the
second dimension, Funnel halves the sequence, and a position table can be as long as the longest text. But a row that
counts has the same value whatever else is in its example's batch. So a few examples run as a padded batch, and each one
alone without padding. A reading of the rows (`gramfuse_model.probing.hooks.rows_of`) is accepted only if it extracts
the same rows from the batch as from the single examples. A layer without such a reading is not merged in closed form.

A model's outputs are read in the same way. If they differ between batch and single examples, padding affects the
model's outputs, and nothing measured in batches would be correct.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from gramfuse_model.heads import head_parameters, is_encoder_decoder
from gramfuse_model.layers import linear_modules
from gramfuse_model.probing.batch import PLACED, TARGETS, Batch, alone, chosen, has_places, masks_of, with_shorter
from gramfuse_model.probing.hooks import Hook, by_example, observing, rows_of, run
from gramfuse_protocol.contract.layout import RowKind
from gramfuse_protocol.errors import ModelError

TOLERANCE = 1e-4
"""Relative difference below which rows count as equal; rounding causes 1e-6 or less."""

TEXTS, IMAGES = 5, 3
"""Maximum number of examples that run alone."""

WIDTH = 8
"""Number of random projections by which rows are compared, so that activations need not be stored."""

OUTPUTS = ""
"""Name of the model's outputs among the names of modules."""


class _Reading(NamedTuple):
    kind: RowKind
    inner: bool = False
    """Whether the model's internal padding adds rows after those of the text."""


def find_rows(
    model: nn.Module, batch: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[RowKind, ...] | None]:
    """Return which rows of the input count, for each call of each module; None if they cannot be identified.

    Modules that are not called are omitted. If inputs are neither tokens, embeddings nor pixels, and have no mask, all
    rows count.

    Args:
        batch: keyword arguments of the model's forward. For an encoder-decoder model, texts and targets must differ in
            length.
        modules: modules by name; the last dimension of their inputs must be features.

    Raises:
        ModelError: if the model's outputs for an example depend on padding or on the rest of its batch, or if the batch
            is not varied enough to show it.
    """
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    masks = masks_of(model, batch)
    if not masks and "pixel_values" not in batch:
        calls = _run(model, batch, modules)
        kind: RowKind = "all"
        return {name: (kind,) * len(calls[name]) for name in modules if name in calls}
    if "input" in masks and _all_equal(masks["input"].sum(dim=1)):
        batch = with_shorter(batch, masks, getattr(model, "config", None))
        masks = masks_of(model, batch)
    indices = _select_examples(model, batch, masks)
    batch, masks = chosen(batch, indices), chosen(masks, indices)
    head = _head(model)
    readings = _readings(model, batch, masks, {**modules, **head})
    if _outputs_differ(readings, head):
        raise ModelError(_padding_message(model, batch, masks, head))
    idle = _idle(model, batch, modules) if "pixel_values" in batch else frozenset()
    return {
        name: None if None in readings[name] or name in idle else tuple(r.kind for r in readings[name] if r)
        for name in modules
        if name in readings
    }


def _select_examples(model: nn.Module, batch: Batch, masks: Batch) -> list[int]:
    """Return the indices of a few examples with different lengths, or of a few images.

    Raises:
        ModelError: if the batch has no suitable examples.
    """
    if "input" not in masks:
        if len(batch["pixel_values"]) < 2:
            raise ModelError("the batch for deriving the layout has only one image; use at least two different images")
        return list(range(min(IMAGES, len(batch["pixel_values"]))))
    lengths = masks["input"].sum(dim=1)
    order = lengths.argsort(stable=True).tolist()
    ranks = torch.linspace(0, len(order) - 1, min(TEXTS, len(order))).round().long().tolist()
    selected = [order[rank] for rank in ranks]
    if _all_equal(lengths):
        raise ModelError(
            f"all texts in the batch for deriving the layout have {int(lengths[0])} tokens, so a layer's token rows "
            "cannot be identified; use longer texts"
        )
    if is_encoder_decoder(model) and "target" not in masks:
        raise ModelError("the batch for deriving the layout has no targets ('labels'), which the model's decoder needs")
    if "target" in masks and torch.equal(lengths[selected], masks["target"].sum(dim=1)[selected]):
        raise ModelError(
            "inputs and targets in the batch for deriving the layout have the same lengths, so their rows cannot be "
            "distinguished; use other targets"
        )
    return selected


def _all_equal(lengths: torch.Tensor) -> bool:
    return int(lengths.min()) == int(lengths.max())


def _head(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear modules of a model's head, by the names of their weights."""
    if not isinstance(model, PreTrainedModel):
        return {}
    head = head_parameters(model)
    return {linear.weight: linear.module for linear in linear_modules(model) if linear.weight in head}


def _readings(
    model: nn.Module, batch: Batch, masks: Batch, modules: Mapping[str, nn.Module]
) -> dict[str, list[_Reading | None]]:
    """Return the reading of each call of each module, and of the outputs; None where there is none."""
    together = _run(model, batch, modules)
    examples = len(next(iter(batch.values())))
    single = [_run_alone(model, alone(batch, masks, index), modules) for index in range(examples)]
    readings: dict[str, list[_Reading | None]] = {}
    for name, calls in together.items():
        if any(len(example.get(name, ())) != len(calls) for example in single):
            readings[name] = [None] * len(calls)
        else:
            readings[name] = [_reading(x, [one[name][n] for one in single], masks) for n, x in enumerate(calls)]
    if any(reading and reading.inner for of_module in readings.values() for reading in of_module):
        other = _run(model, _with_other_padding(batch, masks), modules)
        for name, of_module in readings.items():
            readings[name] = [
                reading if reading is None or not reading.inner or _is_padding(x, y, reading.kind, masks) else None
                for reading, x, y in zip(of_module, together[name], other[name], strict=True)
            ]
    return readings


def _run(
    model: nn.Module, batch: Batch, modules: Mapping[str, nn.Module], what: str = "a batch of examples"
) -> dict[str, list[torch.Tensor]]:
    """Run a model and return projections of the modules' inputs, and of the model's outputs if it has known ones."""
    calls: dict[str, list[torch.Tensor]] = {}
    # The last tensor, its version and its projection: the next module often receives the same tensor.
    latest: list[Any] = [None, None, None]

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
    """Run a model on one example, as `_run` does.

    Raises:
        ModelError: if the model fails on it: some models need a minimum length for pooling.
    """
    try:
        return _run(model, example, modules, "a single example")
    except ModelError as error:
        raise ModelError(f"{error}. It would fail on a silo's data too; use another model") from error.__cause__


def _projected(x: torch.Tensor) -> torch.Tensor:
    directions = torch.randn(x.shape[-1], WIDTH, generator=torch.Generator().manual_seed(x.shape[-1]))
    return x.float() @ directions.to(x.device)


def _reading(x: torch.Tensor, single: list[torch.Tensor], masks: Batch) -> _Reading | None:
    """Return the reading that extracts the same rows from a batch as from its single examples; None if there is none.

    Args:
        x: projected input of the batch, (…, WIDTH).
        single: projected inputs of each example alone.
    """
    if all(_same(one, x) for one in single):
        return _Reading("table")
    inner = None
    kinds: tuple[RowKind, ...] = ("input", "turned", "target")
    for kind in kinds:
        mask = masks.get("input" if kind == "turned" else kind)
        if mask is None:
            continue
        try:
            expected = [rows_of(one, kind, mask[n][mask[n]].unsqueeze(0)) for n, one in enumerate(single)]
            rows = rows_of(x, kind, mask)
        except ValueError:
            continue
        if _same(rows, torch.cat(expected)):
            if all(part.numel() == one.numel() for part, one in zip(expected, single, strict=True)):
                return _Reading(kind)
            inner = inner or (_Reading(kind, inner=True) if kind != "target" else None)
    flat = [one.reshape(-1, WIDTH) for one in single]
    shortest = int(masks["input"].sum(dim=1).min()) if "input" in masks else len(flat[0])
    # Equally many rows for each example, and no more than the shortest text has tokens: none of them is padding.
    if len({len(one) for one in flat}) == 1 and len(flat[0]) <= shortest and _same_sum(x.reshape(-1, WIDTH), flat):
        return _Reading("all")
    return inner


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm())


def _same_sum(rows: torch.Tensor, single: list[torch.Tensor]) -> bool:
    """Return whether rows are those of the single examples in any order: the same number and the same sum of x xᵀ."""
    return len(rows) == sum(map(len, single)) and _same(rows.T @ rows, sum(one.T @ one for one in single))  # type: ignore[arg-type]


def _with_other_padding(batch: Batch, masks: Batch) -> Batch:
    """Return a batch in which the middle token of its longest text replaces all padding."""
    mask = masks["input"]
    longest = int(mask.sum(dim=1).argmax())
    changed = dict(batch)
    for key in PLACED:
        if key in batch and has_places(batch[key], mask):
            words = batch[key][longest, mask[longest]]
            real = mask.view(*mask.shape, *[1] * (batch[key].dim() - 2))
            changed[key] = torch.where(real, batch[key], words[len(words) // 2])
    return changed


def _is_padding(x: torch.Tensor, other: torch.Tensor, kind: RowKind, masks: Batch) -> bool:
    """Return whether a reading's padding rows are padding: only they change with the padding, or they are zero.

    This confirms that a text's rows are in its order, followed by the model's internal padding.
    """
    mask = masks["input"]
    if x.shape != other.shape:
        return False
    rows, moved = (
        by_example(part, kind, mask)[:, : mask.shape[1]].flatten(2).norm(dim=2) for part in (x, x - other)
    )  # (examples, length)
    changed = moved > TOLERANCE * rows
    return not bool(changed[mask].any()) and bool((changed | (rows == 0))[~mask].all())


def _outputs_differ(readings: Mapping[str, list[_Reading | None]], head: Iterable[str]) -> bool:
    """Return whether a model's outputs depend on padding; the head's inputs show it even if the head is zero."""
    return any(None in readings[name] for name in (OUTPUTS, *head) if name in readings)


def _padding_message(model: nn.Module, batch: Batch, masks: Batch, head: Mapping[str, nn.Module]) -> str:
    """Return the error message for a model whose outputs depend on padding, after testing the other padding side."""
    problem = f"the base model ({type(model).__name__}) gives different outputs for an example alone and in a batch"
    if "input" not in masks:
        return f"{problem}, so measurements would depend on how examples are batched; use another model"
    mismatch = _pad_token_mismatch(model, batch, masks["input"])
    if mismatch is not None:
        return f"{problem}: {mismatch}"
    left = bool(masks["input"][:, -1].all())
    side, other_side = ("left", "right") if left else ("right", "left")
    turned = _padded_on_the_other_side(batch, masks["input"], left=left)
    if _outputs_differ(_readings(model, turned, masks_of(model, turned), head), head):
        remedy = f"padded on the {other_side}, they differ too: padding affects real tokens. Use another model"
    else:
        remedy = (
            f'padded on the {other_side}, they are the same. Set "padding_side": "{other_side}" in its '
            "tokenizer_config.json"
        )
    return f"{problem} padded on the {side}; {remedy}"


def _pad_token_mismatch(model: nn.Module, batch: Batch, mask: torch.Tensor) -> str | None:
    """Describe the difference between a model's pad token and the batch's; None if they agree."""
    if not isinstance(model, PreTrainedModel) or "input_ids" not in batch:
        return None
    configured, used = model.config.get_text_config().pad_token_id, set(batch["input_ids"][~mask].tolist())
    if configured is None or len(used) != 1 or configured in used:
        return None
    (token,) = used
    return (
        f"its configuration names pad token {configured}, but texts are padded with token {token}; set "
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
    """Return the modules with input rows that are zero, or that do not affect the body's output for an image.

    Such rows are internal padding to a multiple of the model's window (Swin): a layer's input is padded with zeros, and
    the results for them are discarded. All images have one size, so comparing batches does not show it.
    """
    body = _body_for_images(model)
    inputs: list[tuple[str, torch.Tensor]] = []

    def record(name: str) -> Hook:
        # Inputs without gradients, such as tables, do not depend on the image.
        return lambda _, x, __: inputs.append((name, x)) if x.requires_grad else None

    images = batch["pixel_values"].clone().requires_grad_()
    with (
        _without_zero_weights(modules.values()),
        observing(model, [(module, record(name)) for name, module in modules.items()], gradients=True),
    ):
        features = run(body, {"pixel_values": images}, "images")[0]
        if not inputs:
            return frozenset()
        weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features.device)
        gradients = torch.autograd.grad((features * weights).sum(), [x for _, x in inputs], allow_unused=True)
    return frozenset(
        name
        for (name, x), gradient in zip(inputs, gradients, strict=True)
        if gradient is None or _has_zero_row(x, len(images)) or _has_zero_row(gradient, len(images))
    )


@contextmanager
def _without_zero_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give weights that are all zero, as those of new adapters are, random values; on exit they are zero again.

    Behind a weight of zeros, nothing would seem to affect the output.
    """
    zero = [
        weight for module in modules if (weight := getattr(module, "weight", None)) is not None and not weight.any()
    ]
    generator = torch.Generator().manual_seed(0)
    try:
        for weight in zero:
            weight.data = torch.randn(weight.shape, generator=generator).to(weight)
        yield
    finally:
        for weight in zero:
            weight.data = torch.zeros_like(weight.data)


def _has_zero_row(x: torch.Tensor, images: int) -> bool:
    """Return whether a row is zero, at the same position in each image if they have equally many rows."""
    zeros = (x.detach().reshape(-1, x.shape[-1]) == 0).all(dim=1)
    return bool((zeros.view(images, -1).all(dim=0) if len(zeros) % images == 0 else zeros).any())


def _body_for_images(model: nn.Module) -> nn.Module:
    """Return the part of a model that takes images, without the head; for CLIP and SigLIP it is not `base_model`."""
    body = model.base_model if isinstance(model, PreTrainedModel) else model
    if body is not model:
        return body
    image_parts = (part for part in model.children() if "pixel_values" in inspect.signature(part.forward).parameters)
    return next(image_parts, model)
