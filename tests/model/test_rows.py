"""Which rows of a layer count: what models do with padding, chunks and dimensions, and what cannot be matched."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from gramfuse_client.measuring.gram import collect_grams
from gramfuse_model.derive_layout import derive_layout
from gramfuse_model.layers import ALIKE, kind_of
from gramfuse_model.probing.batch import alone, masks_of
from gramfuse_model.probing.rows import find_rows
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import ModelError

WINDOW = 8
LENGTHS = (3, 7, 4, 6)


def batch_of(lengths: tuple[int, ...] = LENGTHS, *, left: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(2, 30, (len(lengths), width), generator=generator)
    mask = torch.tensor([[n < length for n in range(width)] for length in lengths])
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


class Reader(nn.Module):
    """Mixes the tokens of a text, and puts out their mean; subclasses say what its layer `watched` receives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Embedding(30, 6)
        self.watched, self.other, self.classifier = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        real = attention_mask.unsqueeze(-1).float()
        x = self.table(input_ids)
        mean = (x * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
        self.read(x + mean, attention_mask)
        return SimpleNamespace(logits=self.classifier(self.pooled(mean.squeeze(1), x)))

    def pooled(self, mean: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return mean

    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(x)


class PadsInside(Reader):
    """As Longformer does, to a multiple of its window."""

    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(functional.pad(x, (0, 0, 0, -x.shape[1] % WINDOW), value=0.3))


class PadsInsideBefore(Reader):
    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(functional.pad(x, (0, 0, -x.shape[1] % WINDOW, 0), value=0.3))


class Turned(Reader):
    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(x.transpose(0, 1))


class TurnedAndPadded(Reader):
    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(functional.pad(x, (0, 0, 0, -x.shape[1] % WINDOW), value=0.3).transpose(0, 1))


class Flat(Reader):
    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(x.reshape(-1, 6))


class Packed(Reader):
    """Real tokens only, one text after the other: there is no padding to leave out, and no rule that says it."""

    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(x[mask.bool()])


class Halves(Reader):
    """As Funnel does."""

    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(functional.avg_pool1d(x.transpose(1, 2), 2, ceil_mode=True).transpose(1, 2))


class Backwards(Reader):
    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(x.flip(1))


class Neighbours(Reader):
    """What a token's neighbour is, padding or nothing, enters its row."""

    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(x + functional.pad(x[:, 1:], (0, 0, 0, 1)))


class Places(Reader):
    """A table as long as the longest text of the batch."""

    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(self.table.weight[: x.shape[1]] * 1.0)


class Table(Reader):
    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(self.table.weight[:7] * 1.0)


class Latents(Reader):
    """More rows for each text than a short one has tokens: they may be tokens and padding."""

    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(x[:, :1] * self.table.weight[:9])


class Pooled(Reader):
    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(x[:, 0])


class OncePerChunk(Reader):
    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        for chunk in x.split(4, dim=1):
            self.watched(chunk)


class Routed(Reader):
    """An expert that takes the tokens that it likes, padding too."""

    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(x[x[..., 0] > 0])


class Twice(Reader):
    """Tokens, then one row for each text: these are no table, and count each."""

    def read(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.watched(x)
        self.watched(x[:, 0])


def layout_of(model: nn.Module) -> Layout:
    return derive_layout(model, batch_of(), Merge(context_free="full"))


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (Reader, ("input",)),
        (PadsInside, ("input",)),
        (Turned, ("turned",)),
        (TurnedAndPadded, ("turned",)),
        (Flat, ("input",)),
        (Pooled, ("all",)),
        (Twice, ("input", "all")),
        (PadsInsideBefore, None),
        (Packed, None),
        (Halves, None),
        (Backwards, None),
        (Neighbours, None),
        (Places, None),
        (Latents, None),
        (OncePerChunk, None),
        (Routed, None),
    ],
)
def test_rows_of_tokens_count_whatever_a_model_does_inside_and_else_the_weight_is_averaged(
    kind: Callable[[], Reader], rows: tuple[str, ...] | None
) -> None:
    model = kind()
    layout = layout_of(model)
    (tensor,) = (tensor for tensor in layout.tensors if tensor.name == "watched.weight")
    assert tensor.merge == ("mean" if rows is None else "regmean")
    assert tensor.unmatched == (rows is None)
    groups = {group.name: group for group in layout.groups}
    assert ("watched" in groups) == (rows is not None)
    if rows is None:
        return
    assert groups["watched"].rows == rows
    # The oracle: what the layer receives of each text by itself, without padding of the batch or of the model.
    batch = batch_of((5, 2, 7, 3, 6), seed=3)
    masks = masks_of(model, batch)
    seen: list[torch.Tensor] = []
    model.watched.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    real = []
    with torch.no_grad():
        for index, length in enumerate((5, 2, 7, 3, 6)):
            seen.clear()
            model(**alone(batch, masks, index))
            own = [x.transpose(0, 1) if "turned" in rows else x for x in seen]
            real += [x.reshape(-1, 6)[:length] if kind is not Pooled else x for x in own]
    expected = torch.cat(real).double()
    for size in (1, 2, 5):
        parts = [{key: value[n : n + size] for key, value in batch.items()} for n in range(0, 5, size)]
        gram = collect_grams(model, parts, layout, limit=10**6)["watched"]
        assert gram.tokens == len(expected)
        packed = (expected.T @ expected / len(expected)).numpy()[np.triu_indices(6)]
        np.testing.assert_allclose(gram.mean(), packed, rtol=1e-5, atol=1e-6)


def test_a_table_counts_once_whatever_the_batches() -> None:
    model = Table()
    layout = layout_of(model)
    (group,) = (group for group in layout.groups if group.name == "watched")
    assert group.rows == ("table",)
    batch = batch_of()
    grams = [
        collect_grams(
            model, [{k: v[n : n + size] for k, v in batch.items()} for n in range(0, 4, size)], layout, limit=10**6
        )["watched"].mean()
        for size in (1, 4)
    ]
    np.testing.assert_allclose(grams[0], grams[1], rtol=1e-6)
    x = model.table.weight.detach()[:7].double()
    np.testing.assert_allclose(grams[0], (x.T @ x / 7).numpy()[np.triu_indices(6)], rtol=1e-5)


class LastPlace(Reader):
    """A classifier of what stands at the last place, be it padding: as XLNet's, which is padded on the left."""

    def pooled(self, mean: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return mean + x[:, -1]


class Blind(Reader):
    """Does not look at the mask, as FNet."""

    def pooled(self, mean: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=1)


def test_outputs_that_depend_on_padding_are_refused_with_the_side_on_which_they_do_not() -> None:
    with pytest.raises(ModelError, match=r'on the right.*"padding_side": "left"'):
        derive_layout(LastPlace(), batch_of())
    derive_layout(LastPlace(), batch_of(left=True))
    with pytest.raises(ModelError, match=r"on the right; .*on the left, they differ too"):
        derive_layout(Blind(), batch_of())


@pytest.mark.parametrize("lengths", [(5,), (5, 5)])
def test_texts_of_one_length_show_as_much_as_others(lengths: tuple[int, ...]) -> None:
    for kind, rows in ((Reader, ("input",)), (PadsInside, ("input",)), (Turned, ("turned",)), (Halves, None)):
        model = kind()
        padded = batch_of((*lengths, 7), left=True)  # as a tokenizer gives them that pads to a number of tokens
        cut = {key: value[:-1] for key, value in padded.items()}
        for batch in (batch_of(lengths), {"input_ids": batch_of(lengths)["input_ids"]}, cut):
            if batch is cut and kind is PadsInside:
                continue  # which pads behind what is padded before
            assert find_rows(model, batch, {"watched.weight": model.watched}) == {"watched.weight": rows}
    with pytest.raises(ModelError, match="2 tokens"):
        find_rows(Reader(), batch_of((2, 2)), {})


@pytest.mark.parametrize("name", ALIKE)
def test_a_class_that_is_taken_for_a_linear_layer_computes_what_one_does(name: str) -> None:
    module, _, own = name.rpartition(".")
    layer = getattr(importlib.import_module(module), own)(5, 3)
    assert kind_of(layer) is kind_of(nn.Linear(5, 3))
    x = torch.randn(4, 5)
    torch.testing.assert_close(layer(x), functional.linear(x, layer.weight, layer.bias))


def test_embeddings_of_tokens_are_measured_as_the_tokens_are(pico_bert: Path) -> None:
    """Given as `inputs_embeds`, they are padded too, and so is what sees them without context."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(pico_bert, num_labels=2).eval()

    def embedded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        table = model.get_input_embeddings()
        return {"inputs_embeds": table(batch["input_ids"]).detach(), "attention_mask": batch["attention_mask"]}

    layout = derive_layout(model, embedded(batch_of()))
    assert layout.digest == derive_layout(model, batch_of()).digest
    batch = batch_of((5, 2, 7, 3, 6), seed=3)
    by_tokens = collect_grams(model, [batch], layout, limit=10**6)
    for size in (1, 5):
        parts = [{key: value[n : n + size] for key, value in batch.items()} for n in range(0, 5, size)]
        grams = collect_grams(model, [embedded(part) for part in parts], layout, limit=10**6)
        for name, gram in by_tokens.items():
            assert grams[name].tokens == gram.tokens
            np.testing.assert_allclose(grams[name].mean(), gram.mean(), rtol=1e-4, atol=1e-6)
    same = embedded(batch_of((5, 5)))
    assert derive_layout(model, same).digest == layout.digest


class Listener(nn.Module):
    """Makes a row of every two samples of a sound, and puts out the mean of the real ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.ear, self.watched, self.classifier = nn.Conv1d(1, 6, 2, 2), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        x = self.watched(self.ear(input_values.unsqueeze(1)).transpose(1, 2))
        real = attention_mask[:, ::2].unsqueeze(-1).float()
        return SimpleNamespace(logits=self.classifier((x * real).sum(dim=1) / real.sum(dim=1)))


def test_padding_of_a_sound_is_in_no_gram_matrix() -> None:
    def sounds(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        mask = torch.tensor([[n < length for n in range(max(lengths))] for length in lengths])
        samples = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
        return {"input_values": samples * mask, "attention_mask": mask.long()}

    layout = derive_layout(Listener(), sounds((8, 20, 12)), Merge(context_free="full"))
    assert [group.name for group in layout.groups] == ["classifier"]
    assert {tensor.name for tensor in layout.tensors if tensor.unmatched} == {"watched.weight"}
    assert collect_grams(Listener(), [sounds((8, 20, 12))], layout, limit=10**6)["classifier"].tokens == 3


def test_a_mask_that_goes_with_no_input_is_refused_wherever_it_comes() -> None:
    batch = batch_of()
    layout = derive_layout(Reader(), batch, Merge(context_free="full"))
    for mask in (batch["attention_mask"][:, :3], batch["attention_mask"][:, None, None]):
        odd = batch | {"attention_mask": mask}
        with pytest.raises(ModelError, match=r"attention_mask \(4, "):
            derive_layout(Reader(), odd)
        with pytest.raises(ModelError, match=r"attention_mask \(4, "):
            collect_grams(Reader(), [odd], layout, limit=10**6)
