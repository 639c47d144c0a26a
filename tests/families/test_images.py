"""Models of images are looked at with what their image processors make, whatever their configurations say."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import PreTrainedModel

from gramfuse_client.data.batches import Encoded
from gramfuse_client.data.examples import Examples
from gramfuse_client.measuring.gram import collect_grams
from gramfuse_model.derive_layout import derive_layout, plan_layout
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.loading.zero_head import plan_for
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError

LABELS = {"num_labels": 2, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VIT = {**SIZES, **LABELS, "image_size": 32, "patch_size": 8}
SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4, **LABELS}
TWO_TOWERS = {
    "text_config": {**SIZES, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "vision_config": {**SIZES, "image_size": 32, "patch_size": 8},
    **LABELS,
}
TASK = Task(task="image-classification", labels=("a", "b"))


@pytest.fixture
def base_of(tmp_path: Path) -> Callable[..., tuple[Plan, Base]]:
    """Return a function that makes a pico model of a type, with an image processor, and loads it."""

    def make(kind: str, settings: dict[str, Any], processor: Any) -> tuple[Plan, Base]:
        config = transformers.AutoConfig.for_model(kind, **settings)
        torch.manual_seed(3)
        model = transformers.AutoModelForImageClassification.from_config(config)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        plan = plan_for("x", str(tmp_path), TASK)
        return plan, load_base(plan, tmp_path)

    return make


def square(side: int, **settings: Any) -> Any:
    return transformers.ViTImageProcessor(size={"height": side, "width": side}, **settings)


def noise(side: int, count: int = 4) -> Examples:
    files = []
    for seed in range(count):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return Examples(files, None, [0] * count)


def averaged(layout: Layout) -> set[str]:
    return {tensor.name for tensor in layout.tensors if tensor.unmatched}


def kept(model: PreTrainedModel, pixels: torch.Tensor, weight: str) -> torch.Tensor:
    """The rows that a layer receives of an image, float64, without those that a change of nothing comes of."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(weight.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    features = model.base_model(pixel_values=pixels.requires_grad_())[0]
    handle.remove()
    generator = torch.Generator().manual_seed(1)
    (slope,) = torch.autograd.grad((features * torch.randn(features.shape, generator=generator)).sum(), seen)
    x = seen[0].detach().reshape(-1, seen[0].shape[-1])
    real = (x != 0).any(dim=1) & (slope.reshape(x.shape) != 0).any(dim=1)
    return x[real].double()


@pytest.mark.parametrize("said", [32, 36])
def test_what_a_swin_pads_of_the_images_that_it_gets_is_in_no_gram_matrix(
    said: int, base_of: Callable[..., tuple[Plan, Base]]
) -> None:
    """Images of 36 are padded inside to a multiple of the window; of 32, as the configuration may say, they are not."""
    plan, base = base_of("swin", SWIN | {"image_size": said}, square(36))
    layout = plan_layout(plan, base)
    attention = {f"swin.encoder.layers.1.blocks.{n}.attention.{one}_proj.weight" for n in (0, 1) for one in "qkvo"}
    assert averaged(layout) == attention | {"swin.encoder.layers.0.blocks.0.attention.o_proj.weight"}
    encoded = Encoded(noise(36), base.tokenizer, TASK)
    pixels = [row["pixel_values"].unsqueeze(0) for row in encoded]
    grams = collect_grams(base.model, [{"pixel_values": one} for one in pixels], layout, limit=10**9)
    groups = [group for group in layout.groups if group.name != "classifier"]
    assert groups
    for group in groups:
        x = torch.cat([kept(base.model.eval(), one.clone(), group.weights[0].weight) for one in pixels])
        assert grams[group.name].tokens == len(x)
        expected = (x.T @ x / len(x)).numpy()[np.triu_indices(group.d_in)]
        np.testing.assert_allclose(grams[group.name].mean(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_images_of_a_size_that_the_model_does_not_take_are_refused_before_anything_is_trained(
    base_of: Callable[..., tuple[Plan, Base]],
) -> None:
    plan, base = base_of("vit", VIT, square(64))
    with pytest.raises(ModelError, match=r"3 channels of 64 × 64 pixels.*\"size\".*preprocessor_config\.json"):
        plan_layout(plan, base)


def test_a_model_of_grey_images_gets_grey_ones_if_its_processor_says_so(
    base_of: Callable[..., tuple[Plan, Base]],
) -> None:
    plan, base = base_of("vit", VIT | {"num_channels": 1}, square(32, image_mean=[0.5], image_std=[0.5]))
    assert plan_layout(plan, base).groups
    encoded = Encoded(noise(40), base.tokenizer, TASK)
    batch = encoded.collate([encoded[0], encoded[1]])
    assert batch["pixel_values"].shape == (2, 1, 32, 32)
    plan, base = base_of("vit", VIT | {"num_channels": 1}, square(32))
    with pytest.raises(ModelError, match=r"3 channels.*\"image_mean\""):
        plan_layout(plan, base)


@pytest.mark.parametrize(
    "processor",
    [
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False),
        transformers.ViTImageProcessor(do_resize=False),
    ],
    ids=["shortest edge", "as they are"],
)
def test_a_processor_that_makes_images_of_many_sizes_is_refused(
    processor: Any, base_of: Callable[..., tuple[Plan, Base]]
) -> None:
    settings = {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8, "layer_type": "basic", **LABELS}
    plan, base = base_of("resnet", settings, processor)
    with pytest.raises(ModelError, match=r"different sizes.*\"do_resize\""):
        plan_layout(plan, base)


@pytest.mark.parametrize(
    ("kind", "idle"),
    [("clip", ()), ("siglip", ("head.mlp.fc1", "head.mlp.fc2"))],  # nothing comes of SigLIP's pooling in a classifier
)
def test_a_model_whose_image_settings_stand_in_a_part_of_its_configuration_is_merged(
    kind: str, idle: tuple[str, ...], base_of: Callable[..., tuple[Plan, Base]]
) -> None:
    plan, base = base_of(kind, TWO_TOWERS, square(32))
    layout = plan_layout(plan, base)
    assert averaged(layout) == {f"vision_model.{name}.weight" for name in idle}
    single = {tensor.name for tensor in layout.tensors if tensor.context_free}
    first = "vision_model.encoder.layers.0.self_attn"
    assert single == {f"{first}.{name}_proj.weight" for name in "qkv"}
    assert len(layout.groups) == 3 + 4 + 1


def test_a_model_whose_configuration_says_nothing_of_images_is_looked_at_all_the_same(
    base_of: Callable[..., tuple[Plan, Base]],
) -> None:
    plan, base = base_of("pp_lcnet", {"scale": 0.25, **LABELS}, square(64))
    assert not hasattr(base.model.config, "image_size")
    assert any(tensor.buffer for tensor in plan_layout(plan, base).tensors)


def test_a_model_that_takes_images_as_tokens_is_refused_by_the_name_of_its_processor(
    base_of: Callable[..., tuple[Plan, Base]],
) -> None:
    colours = np.random.default_rng(0).uniform(-1, 1, (512, 3)).tolist()
    processor = transformers.ImageGPTImageProcessor(clusters=colours, size={"height": 4, "width": 4})
    settings = {"vocab_size": 513, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, **LABELS}
    plan, base = base_of("imagegpt", settings, processor)
    with pytest.raises(ModelError, match=r"ImageGPTImageProcessor.*input_ids.*pixel_values"):
        plan_layout(plan, base)


def two_towers() -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = transformers.CLIPModel(transformers.CLIPConfig(**TWO_TOWERS)).eval()
    return model


def test_what_a_model_asks_for_that_a_batch_has_not_is_said() -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ModelError, match=r"CLIPModel .*pixel_values.*input_ids"):
        derive_layout(two_towers(), {"pixel_values": images})
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0], [1, 8, 9, 2], [1, 10, 2, 0]])
    both = {"pixel_values": images, "input_ids": ids, "attention_mask": (ids != 0).long()}
    layout = derive_layout(two_towers(), both, Merge(context_free="full"))
    rows = {group.name.partition(".")[0]: group.rows for group in layout.groups}
    assert rows["text_model"] == ("input",)
    assert any(name.startswith("vision_model.") for name in averaged(layout))  # more rows than texts have tokens
