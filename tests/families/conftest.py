"""Pico models of every family that gramfuse knows, made by the family's own configuration class."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tests.conftest import WORDS

SPREAD = {"initializer_range": 0.2}
"""Of the random weights: with the families' own 0.02, layers this narrow hardly change what goes through them."""

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, **SPREAD}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
BERT_LIKE = {**SIZES, **NO_DROPOUT, "max_position_embeddings": 40, "pad_token_id": 0}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 8,
    "max_relative_positions": 32,
}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 3,
}
GPT2 = {"n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **SPREAD}
LLAMA = {**SIZES, **TOKENS, "initializer_range": 0.3, "num_key_value_heads": 1, "max_position_embeddings": 40}
PICTURE = {"image_size": 8, "patch_size": 4, "num_channels": 3}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", BERT_LIKE),
    "distilbert": (
        "DistilBertModel",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0}
        | {"seq_classif_dropout": 0.0, "max_position_embeddings": 40, **SPREAD},
    ),
    "roberta": ("RobertaModel", BERT_LIKE),
    "deberta-v2": ("DebertaV2Model", BERT_LIKE | DEBERTA | {"share_att_key": False, "conv_kernel_size": 3}),
    "deberta-v3": ("DebertaV2Model", BERT_LIKE | DEBERTA),
    "electra": ("ElectraModel", BERT_LIKE | {"embedding_size": 12}),
    "albert": ("AlbertModel", BERT_LIKE | {"embedding_size": 12, "classifier_dropout_prob": 0.0}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2 | TOKENS | {"attn_pdrop": 0.0}),
    "llama": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "mixtral": (
        "MixtralForCausalLM",
        LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
    "longformer": ("LongformerModel", BERT_LIKE | {"attention_window": 8, "max_position_embeddings": 64}),
    "big-bird": ("BigBirdModel", BERT_LIKE | {"block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64}),
    "funnel": (
        "FunnelModel",
        {"d_model": 16, "d_head": 8, "d_inner": 24, "n_head": 2, "block_sizes": [1, 1], "num_decoder_layers": 1}
        | {"hidden_dropout": 0.0, "attention_dropout": 0.0, **SPREAD},
    ),
    "xlnet": (
        "XLNetModel",
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "dropout": 0.0, **SPREAD, **TOKENS},
    ),
    "vit": ("ViTModel", SIZES | NO_DROPOUT | PICTURE),
}
"""The model class that is saved, and what its configuration says; all else is the family's default."""


def make(family: str, vocabulary: int, tokens: int) -> PreTrainedModel:
    """A model of two layers, 16 features wide, with random weights.

    Args:
        vocabulary: the words of the tests' data.
        tokens: those of the tokenizer.
    """
    name, settings = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(14)
    known = {} if family == "vit" else {"vocab_size": vocabulary}
    model = kind(kind.config_class(**settings, **known)).eval()
    if family != "vit":
        model.resize_token_embeddings(tokens)
    if family == "t5-gated":  # as T5 1.1 has it, whose configuration does not say so any more
        model.lm_head.weight = torch.nn.Parameter(torch.randn(tokens, 16))
    return model


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory, pico_tokenizer: Any) -> Callable[[str], Path]:
    """Return a function: where a family's pico model lies, with its tokenizer or image processor."""
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            directory = made[family] = tmp_path_factory.mktemp(family)
            model = make(family, 4 + len(WORDS), len(pico_tokenizer))
            model.save_pretrained(directory)
            if family == "vit":
                size = {"height": 8, "width": 8}
                transformers.ViTImageProcessor(size=size).save_pretrained(directory)
            else:
                tokenizer = copy.deepcopy(pico_tokenizer)
                side = "left" if family == "xlnet" else "right"
                tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side
                tokenizer.save_pretrained(directory)
        return made[family]

    return find
