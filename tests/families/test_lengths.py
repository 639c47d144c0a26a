"""How long a text a model takes, against the model itself: one of that length runs, and a longer one fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.loading.zero_head import plan_for
from gramfuse_model.probing.lengths import check_lengths, room_of
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError, PlanError

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
ANSWERS = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
ANSWERS |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0}
ANSWERS |= {"bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3, "forced_eos_token_id": None}

TABLES: dict[str, tuple[dict[str, Any], int | None]] = {
    "bert": ({**SIZES, "max_position_embeddings": 40}, 40),
    "roberta": ({**SIZES, "max_position_embeddings": 42, "pad_token_id": 0}, 41),  # rows begin behind that of padding
    "opt": ({**SIZES, "max_position_embeddings": 40, "ffn_dim": 24, "word_embed_proj_dim": 16}, 40),  # two more rows
    "longformer": ({**SIZES, "max_position_embeddings": 42, "pad_token_id": 0, "attention_window": 8}, 41),
    "gpt2": ({"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}, 40),
    "marian": ({**ANSWERS, "max_position_embeddings": 40}, 40),  # sines, in a table all the same
    "ctrl": ({"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 24}, 40),  # looked up by an index
    "bart": ({**ANSWERS, "max_position_embeddings": 40}, 40),
    "llama": ({**SIZES, "max_position_embeddings": 40}, None),
    "bloom": ({"hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
    "t5": ({"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}, None),
    "deberta-v2": ({**SIZES, "relative_attention": True, "position_biased_input": False, "position_buckets": 4}, None),
}
"""A configuration by type of model, and how many tokens it takes; None is any number."""

ROTARY = {"rope_theta": 100.0}
LONG = ROTARY | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 2.0}
DYNAMIC = ROTARY | {"rope_type": "dynamic", "factor": 4.0}
DECODER = {**SIZES, "initializer_range": 0.3, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 3}
DEPENDING: dict[str, dict[str, Any]] = {
    "llama": {**DECODER, "max_position_embeddings": 40, "rope_parameters": DYNAMIC},
    "phi3": {
        **DECODER,
        "max_position_embeddings": 80,
        "original_max_position_embeddings": 40,
        "rope_parameters": LONG | {"original_max_position_embeddings": 40},
    },
    "gemma3_text": {
        **DECODER,
        "head_dim": 8,
        "layer_types": ["full_attention"],
        "max_position_embeddings": 40,
        "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": ROTARY | {"rope_type": "default"}},
    },
}
"""Configurations whose rotary positions are others in a batch with a text of more than 40 tokens."""

CONSTRAINED: dict[str, dict[str, Any]] = {
    "nystromformer": {**SIZES, "num_landmarks": 8, "segment_means_seq_len": 16, "max_position_embeddings": 130},
    "canine": {**SIZES, "num_hash_functions": 4, "num_hash_buckets": 512},
}


@pytest.fixture
def base_of(tmp_path: Path, pico_tokenizer: Any) -> Callable[..., tuple[Base, Task]]:
    """Return a function that makes a pico model of a type, and loads it for a task."""

    def make(kind: str, settings: dict[str, Any], longest: int = 128, target: int = 32) -> tuple[Base, Task]:
        words = {} if kind == "canine" else {"vocab_size": len(pico_tokenizer)}
        config = transformers.AutoConfig.for_model(kind, **{**words, **settings})
        answers = config.is_encoder_decoder
        auto = transformers.AutoModelForSeq2SeqLM if answers else transformers.AutoModel
        torch.manual_seed(2)
        auto.from_config(config).save_pretrained(tmp_path)
        (transformers.CanineTokenizer() if kind == "canine" else pico_tokenizer).save_pretrained(tmp_path)
        about: dict[str, Any] = {"max_length": longest, "target_length": target}
        labels = ("a", "b")
        task = (
            Task(task="sequence-to-sequence", **about)
            if answers
            else Task(task="classification", labels=labels, **about)
        )
        return load_base(plan_for("x", str(tmp_path), task), tmp_path), task

    return make


def runs(base: Base, tokens: int, targets: int) -> bool:
    ids = torch.full((1, tokens), 5)
    labels = {"labels": torch.full((1, targets), 5)} if base.model.config.is_encoder_decoder else {}
    try:
        with torch.no_grad():
            base.model(input_ids=ids, attention_mask=torch.ones_like(ids), **labels)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", TABLES)
def test_texts_longer_than_the_table_of_positions_are_refused_before_anything_is_trained(
    kind: str, base_of: Callable[..., tuple[Base, Task]]
) -> None:
    settings, most = TABLES[kind]
    base, task = base_of(kind, settings)
    found = room_of(base, 128, 128)
    assert {room.tokens for room in found.values()} == (set() if most is None else {most})
    if most is None:
        check_lengths(base, [task], trains=True)
        assert runs(base, 128, 32)
        return
    assert runs(base, most, 5)
    assert not runs(base, most + 1, 5)
    with pytest.raises(PlanError, match=f"max-length is 128, .* {most} tokens .*max-length to at most {most}"):
        check_lengths(base, [task], trains=True)
    check_lengths(base, [task.model_copy(update={"max_length": most})], trains=True)
    if base.model.config.is_encoder_decoder:
        assert not runs(base, 5, most + 1)
        with pytest.raises(PlanError, match="target-length is 64"):
            check_lengths(base, [task.model_copy(update={"max_length": most, "target_length": 64})], trains=True)


@pytest.mark.parametrize(("window", "rows", "most"), [(8, 44, 40), (32, 64, 64), (64, 100, 64), (256, 256, 256)])
def test_a_model_that_pads_to_whole_windows_takes_texts_of_these(
    window: int, rows: int, most: int, base_of: Callable[..., tuple[Base, Task]]
) -> None:
    places = {"max_encoder_position_embeddings": rows, "max_decoder_position_embeddings": 48}
    base, task = base_of("led", {**ANSWERS, **places, "attention_window": window}, longest=most + 1)
    assert room_of(base, most + 1, 128)["input"].tokens == most
    assert runs(base, most, 5)
    assert not runs(base, most + 1, 5)
    with pytest.raises(PlanError, match=f"max-length is {most + 1}, .*'led.encoder.embed_positions.weight'"):
        check_lengths(base, [task], trains=True)
    check_lengths(base, [task.model_copy(update={"max_length": most})], trains=True)


def test_a_table_that_is_shorter_than_the_public_text_in_characters_is_refused_by_its_places(
    base_of: Callable[..., tuple[Base, Task]], tmp_path: Path
) -> None:
    base, task = base_of("bert", {**SIZES, "vocab_size": 384, "max_position_embeddings": 64}, longest=32)
    base = replace(base, tokenizer=transformers.ByT5Tokenizer())
    check_lengths(base, [task], trains=True)
    with pytest.raises(ModelError, match=r"positions for 64 tokens .*position_embeddings.* public test text"):
        plan_layout(plan_for("x", str(tmp_path), task), base)
    canine, _ = base_of("canine", {**SIZES, "max_position_embeddings": 48, "num_hash_buckets": 512})
    assert room_of(canine, 128, 1)["input"].tokens == 48
    with pytest.raises(PlanError, match=r"max-length is 128, .* 48 tokens"):
        check_lengths(canine, [task.model_copy(update={"max_length": 128})], trains=False)


@pytest.mark.parametrize("kind", DEPENDING)
def test_a_length_from_which_on_a_model_computes_something_else_beside_a_long_text_is_refused(
    kind: str, base_of: Callable[..., tuple[Base, Task]]
) -> None:
    base, task = base_of(kind, DEPENDING[kind], longest=2000)
    with pytest.raises(
        PlanError, match=r"max-length is 2,000, .* 40 tokens .*rope_type is '\w+'.*max-length to at most 40"
    ):
        check_lengths(base, [task], trains=True)
    check_lengths(base, [task.model_copy(update={"max_length": 40})], trains=True)

    def beside(tokens: int) -> torch.Tensor:
        """What it says of a short text that is in a batch with a long one."""
        short = torch.arange(5, 15) % 30 + 4
        ids = torch.zeros(2, tokens, dtype=torch.long)
        ids[0, :10], ids[1] = short, torch.arange(tokens) % 30 + 4
        with torch.no_grad():
            out: torch.Tensor = base.model(input_ids=ids, attention_mask=(ids != 0).long()).logits[0]
        return out

    alike = beside(40)
    torch.testing.assert_close(alike, beside(20), rtol=1e-4, atol=1e-5)
    assert (beside(41) - alike).norm() > 1e-3 * alike.norm()


@pytest.mark.parametrize("kind", CONSTRAINED)
def test_a_model_that_takes_some_lengths_only_is_refused(kind: str, base_of: Callable[..., tuple[Base, Task]]) -> None:
    base, task = base_of(kind, CONSTRAINED[kind])
    with pytest.raises(ModelError, match=r"text of \d+ tokens: "):
        check_lengths(base, [task], trains=False)


def test_a_model_that_takes_some_lengths_only_while_it_trains_can_be_measured(
    base_of: Callable[..., tuple[Base, Task]],
) -> None:
    shapes = {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 8], "attn_layers": ["local"]}
    chunks = {"local_attn_chunk_length": 8, "max_position_embeddings": 128, "pad_token_id": 0, "is_decoder": False}
    base, task = base_of("reformer", {"hidden_size": 16, "num_attention_heads": 2, **shapes, **chunks})
    check_lengths(base, [task], trains=False)
    with pytest.raises(ModelError, match="in training"):
        check_lengths(base, [task], trains=True)
    assert not base.model.training
