"""Tiny models of many transformers architectures, as settings on top of their default configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

from gramfuse_protocol.contract.task import TaskName


class Architecture(NamedTuple):
    """One architecture, for one task.

    Args:
        settings: of its configuration, where they differ from the defaults.
        side: padding side of its tokenizer.
        type: `model_type` of its configuration, if it differs from its name in ARCHITECTURES.
        class_name: of its model, if transformers has several for the task.
    """

    task: TaskName
    settings: dict[str, Any]
    side: str = "right"
    type: str = ""
    class_name: str = ""


LABEL: TaskName = "classification"
TAG: TaskName = "token-classification"
ANSWER: TaskName = "sequence-to-sequence"
WRITE: TaskName = "causal-lm"
SEE: TaskName = "image-classification"

PLACES = 48
"""Number of positions."""

TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ENCODER = {**SIZES, "max_position_embeddings": PLACES, "pad_token_id": 0}
DECODER = {**SIZES, "max_position_embeddings": PLACES, "num_key_value_heads": 1, **TOKENS}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 8,
    "max_relative_positions": 32,
}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": PLACES, "pad_index": 0}
REFORMER = {
    **{"hidden_size": 16, "attention_head_size": 8, "feed_forward_size": 24, "num_attention_heads": 2},
    **{"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4, "is_decoder": False},
    **{"axial_pos_embds": False, "max_position_embeddings": PLACES, "pad_token_id": 0},
}
T5 = {
    **{"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3},
}
BART = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": PLACES},
    **{"decoder_start_token_id": 3, "forced_eos_token_id": None, "forced_bos_token_id": None, **TOKENS},
}
PROPHETNET = {
    **{"hidden_size": 16, "num_encoder_layers": 2, "num_decoder_layers": 2, "encoder_ffn_dim": 24},
    **{"decoder_ffn_dim": 24, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "num_buckets": 8},
    **{"relative_max_distance": 16, "max_position_embeddings": PLACES, "decoder_start_token_id": 2, **TOKENS},
}
GPT2 = {"n_positions": PLACES, "n_embd": 16, "n_layer": 2, "n_head": 2, **TOKENS}
XGLM = {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24, "max_position_embeddings": PLACES}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
VIT = {**SIZES, "image_size": 16, "patch_size": 4}
SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16], "image_size": 16}
FOUR = {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
LEVIT = {
    **{"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]},
    **{"key_dim": [8, 8, 8], "drop_path_rate": 0, "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2]},
    "down_ops": [["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 3, 2, 2, 2]],
}
HIERA = {
    **{"image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4], "embed_dim": 8, "depths": [1, 1]},
    **{"num_heads": [1, 2], "num_query_pool": 1, "masked_unit_size": [4, 4], "query_stride": [2, 2]},
}

ARCHITECTURES: dict[str, Architecture] = {
    # Encoders of text
    "bert": Architecture(LABEL, ENCODER),
    "distilbert": Architecture(
        LABEL, {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": PLACES}
    ),
    "roberta": Architecture(LABEL, ENCODER),
    "roberta-prelayernorm": Architecture(LABEL, ENCODER),
    "xlm-roberta": Architecture(TAG, ENCODER),
    "xlm-roberta-xl": Architecture(LABEL, ENCODER),
    "camembert": Architecture(TAG, ENCODER),
    "xmod": Architecture(LABEL, ENCODER | {"languages": ["en"], "default_language": "en"}),
    "data2vec-text": Architecture(LABEL, ENCODER),
    "deberta": Architecture(LABEL, ENCODER | DEBERTA),
    "deberta-v2": Architecture(LABEL, ENCODER | DEBERTA | {"share_att_key": False, "conv_kernel_size": 3}),
    "deberta-v3": Architecture(LABEL, ENCODER | DEBERTA | {"share_att_key": True}, type="deberta-v2"),
    "electra": Architecture(LABEL, ENCODER | {"embedding_size": 12}),
    "albert": Architecture(LABEL, ENCODER | {"embedding_size": 12}),
    "mpnet": Architecture(LABEL, ENCODER),
    "mobilebert": Architecture(
        LABEL, ENCODER | {"embedding_size": 12, "intra_bottleneck_size": 8, "true_hidden_size": 8}
    ),
    "squeezebert": Architecture(
        LABEL,
        ENCODER
        | {"embedding_size": 16, "q_groups": 2, "k_groups": 2, "v_groups": 2}
        | {"post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2},
    ),
    "ernie": Architecture(LABEL, ENCODER),
    "megatron-bert": Architecture(LABEL, ENCODER),
    "roformer": Architecture(LABEL, ENCODER | {"embedding_size": 16}),
    "rembert": Architecture(LABEL, ENCODER | {"input_embedding_size": 12}),
    "ibert": Architecture(LABEL, ENCODER),
    "layoutlm": Architecture(LABEL, ENCODER),
    "luke": Architecture(LABEL, ENCODER | {"entity_vocab_size": 10, "entity_emb_size": 8}),
    "esm": Architecture(LABEL, ENCODER | {"mask_token_id": 1, "position_embedding_type": "rotary"}),
    "xlm": Architecture(LABEL, XLM),
    "flaubert": Architecture(LABEL, XLM),
    "modernbert": Architecture(
        LABEL,
        ENCODER
        | TOKENS
        | {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3},
    ),
    "eurobert": Architecture(LABEL, DECODER),
    "nomic_bert": Architecture(LABEL, ENCODER),
    "longformer": Architecture(LABEL, ENCODER | {"attention_window": 8, "max_position_embeddings": 64}),
    "big_bird": Architecture(LABEL, ENCODER | {"block_size": 4, "num_random_blocks": 1}),
    "xlnet": Architecture(LABEL, {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, **TOKENS}, "left"),
    "funnel": Architecture(
        LABEL,
        {
            "d_model": 16,
            "d_head": 8,
            "d_inner": 24,
            "n_head": 2,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            **TOKENS,
        },
    ),
    "mra": Architecture(LABEL, ENCODER),
    "perceiver": Architecture(
        LABEL,
        {"num_latents": 6, "d_latents": 16, "d_model": 12, "num_blocks": 1, "num_self_attends_per_block": 2}
        | {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "max_position_embeddings": PLACES},
    ),
    "nystromformer": Architecture(LABEL, ENCODER | {"conv_kernel_size": 3}),
    "convbert": Architecture(LABEL, ENCODER | {"embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 2}),
    "fnet": Architecture(LABEL, ENCODER),
    "reformer": Architecture(LABEL, REFORMER | {"attn_layers": ["local", "lsh"]}),
    "yoso": Architecture(LABEL, ENCODER),
    "canine": Architecture(
        LABEL,
        ENCODER
        | {"num_hash_functions": 2, "num_hash_buckets": 32, "downsampling_rate": 2, "max_position_embeddings": 512},
    ),
    # Encoders with decoders
    "t5": Architecture(ANSWER, T5),
    "t5-gated": Architecture(ANSWER, T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, type="t5"),
    "t5-classifier": Architecture(LABEL, T5, type="t5"),
    "mt5": Architecture(ANSWER, T5),
    "umt5": Architecture(ANSWER, T5),
    "longt5": Architecture(ANSWER, T5 | {"local_radius": 3}),
    "switch_transformers": Architecture(
        ANSWER, T5 | {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    ),
    "bart": Architecture(ANSWER, BART),
    "bart-classifier": Architecture(LABEL, BART, type="bart"),
    "mbart": Architecture(ANSWER, BART),
    "pegasus": Architecture(ANSWER, BART),
    "pegasus_x": Architecture(ANSWER, BART | {"block_size": 8, "num_global_tokens": 4}),
    "bigbird_pegasus": Architecture(ANSWER, BART | {"block_size": 4, "num_random_blocks": 1}),
    "blenderbot": Architecture(ANSWER, BART),
    "blenderbot-small": Architecture(ANSWER, BART),
    "m2m_100": Architecture(ANSWER, BART),
    "plbart": Architecture(ANSWER, BART),
    "led": Architecture(
        ANSWER,
        BART
        | {"attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": PLACES},
    ),
    "marian": Architecture(ANSWER, BART),
    "prophetnet": Architecture(ANSWER, PROPHETNET),
    # Decoders
    "gpt2": Architecture(WRITE, GPT2),
    "gpt2-classifier": Architecture(LABEL, GPT2, type="gpt2"),
    "openai-gpt": Architecture(WRITE, GPT2),
    "gpt_bigcode": Architecture(WRITE, GPT2),
    "gpt_neo": Architecture(
        WRITE,
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
        | {"window_size": 8, "max_position_embeddings": PLACES, **TOKENS},
    ),
    "gpt_neox": Architecture(LABEL, ENCODER | TOKENS),
    "gptj": Architecture(WRITE, GPT2 | {"rotary_dim": 4}),
    "codegen": Architecture(WRITE, GPT2 | {"rotary_dim": 4, "n_head": 4, "n_ctx": PLACES}),
    "ctrl": Architecture(LABEL, GPT2 | {"dff": 24}),
    "opt": Architecture(
        LABEL,
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16}
        | {"max_position_embeddings": PLACES, **TOKENS},
    ),
    "biogpt": Architecture(WRITE, ENCODER | TOKENS),
    "xglm": Architecture(WRITE, XGLM | TOKENS),
    "bloom": Architecture(LABEL, {"hidden_size": 16, "n_layer": 2, "n_head": 2, **TOKENS}),
    "mpt": Architecture(
        LABEL, {"d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": PLACES, **TOKENS}
    ),
    "falcon": Architecture(WRITE, ENCODER | TOKENS),
    "llama": Architecture(WRITE, DECODER),
    "llama-classifier": Architecture(LABEL, DECODER, "left", type="llama"),
    "mistral": Architecture(LABEL, DECODER),
    "qwen2": Architecture(LABEL, DECODER, "left"),
    "qwen3": Architecture(WRITE, DECODER | {"head_dim": 8}, "left"),
    "gemma": Architecture(LABEL, DECODER | {"head_dim": 8}),
    "gemma2": Architecture(WRITE, DECODER | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "gemma3_text": Architecture(LABEL, DECODER | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "phi": Architecture(LABEL, DECODER | {"partial_rotary_factor": 0.5}),
    "phi3": Architecture(WRITE, DECODER),
    "starcoder2": Architecture(LABEL, DECODER),
    "olmo": Architecture(WRITE, DECODER),
    "olmo2": Architecture(WRITE, DECODER),
    "stablelm": Architecture(LABEL, DECODER),
    "granite": Architecture(WRITE, DECODER),
    "cohere": Architecture(WRITE, DECODER),
    "smollm3": Architecture(LABEL, DECODER),
    "glm": Architecture(LABEL, DECODER | {"head_dim": 8}),
    "mixtral": Architecture(WRITE, DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": Architecture(WRITE, DECODER | EXPERTS | {"shared_expert_intermediate_size": 12}),
    "qwen3_moe": Architecture(WRITE, DECODER | EXPERTS | {"head_dim": 8}),
    "olmoe": Architecture(WRITE, DECODER | EXPERTS),
    "granitemoe": Architecture(WRITE, DECODER | {"num_local_experts": 4}),
    "gpt_oss": Architecture(WRITE, DECODER | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8}),
    "mamba": Architecture(WRITE, {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **TOKENS}),
    "rwkv": Architecture(WRITE, {"hidden_size": 16, "num_hidden_layers": 2, "context_length": PLACES, **TOKENS}),
    "recurrent_gemma": Architecture(
        WRITE, DECODER | {"lru_width": 16, "attention_window_size": 8, "num_hidden_layers": 3}
    ),
    # Pictures
    "vit": Architecture(SEE, VIT),
    "deit": Architecture(SEE, VIT, class_name="DeiTForImageClassification"),
    "beit": Architecture(SEE, VIT),
    "data2vec-vision": Architecture(SEE, VIT),
    "dinov2": Architecture(SEE, VIT),
    "dinov2_with_registers": Architecture(SEE, VIT),
    "vit_msn": Architecture(SEE, VIT),
    "ijepa": Architecture(SEE, VIT),
    "clip": Architecture(SEE, {"vision_config": VIT}),
    "siglip": Architecture(SEE, {"vision_config": VIT}),
    "swin": Architecture(SEE, SWIN | {"image_size": 16}),
    "swin, padded inside": Architecture(SEE, SWIN | {"image_size": 18}, type="swin"),
    "swinv2": Architecture(SEE, SWIN | {"image_size": 16}),
    "hiera": Architecture(SEE, HIERA),
    "levit": Architecture(SEE, LEVIT, class_name="LevitForImageClassification"),
    "mobilevit": Architecture(
        SEE,
        {"image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]}
        | {"num_attention_heads": 2},
    ),
    "segformer": Architecture(SEE, FOUR | {"image_size": 32}),
    "pvt": Architecture(SEE, FOUR | {"image_size": 64, "mlp_ratios": [2, 2, 2, 2]}),
    "pvt_v2": Architecture(SEE, FOUR | {"image_size": 64, "mlp_ratios": [2, 2, 2, 2]}),
    "focalnet": Architecture(
        SEE, STAGES | {"patch_size": 2, "embed_dim": 8, "focal_levels": [1, 1], "focal_windows": [3, 3]}
    ),
    "swiftformer": Architecture(SEE, {"image_size": 32, "depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]}),
    "convnext": Architecture(SEE, STAGES | {"num_stages": 2}),
    "convnextv2": Architecture(SEE, STAGES | {"num_stages": 2}),
    "poolformer": Architecture(SEE, {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 32}),
    "resnet": Architecture(SEE, STAGES | {"embedding_size": 8, "layer_type": "basic"}),
    "regnet": Architecture(SEE, STAGES | {"embedding_size": 8, "groups_width": 4}),
    "bit": Architecture(SEE, STAGES | {"embedding_size": 8, "num_groups": 2}),
    "mobilenet_v1": Architecture(SEE, {"image_size": 32, "depth_multiplier": 0.1}),
    "mobilenet_v2": Architecture(SEE, {"image_size": 32, "depth_multiplier": 0.1}),
    "pp_lcnet": Architecture(SEE, {"image_size": 32, "scale": 0.25, "stem_channels": 8, "class_expand": 32}),
    "mobilevitv2": Architecture(SEE, {"image_size": 64, "width_multiplier": 0.25}),
}
"""The architectures of the table in docs/tasks.md, in order."""
