"""What the generic reduction of a default config does not get right, by model type.

``default`` holds arguments for the default config itself: what must be set before it is reduced. ``...`` deletes a field.
"""

from __future__ import annotations

from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def sections(*sizes: int, **more: Any) -> dict[str, Any]:
    """Rotary parameters with one section per axis (time, height, width), in pairs of a head."""
    return {"rope_parameters": {**ROPE, "mrope_section": list(sizes), **more}}


# Gemma 4 E2B: inputs per block, keys and values of earlier blocks in the last ones, which have wider FFNs.
GEMMA4_E = {
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "per_layer_config": ...,
    "global_head_dim": 32,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}
GEMMA4_12B = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "per_layer_config": ...,
    "global_head_dim": 32,
}
# Gemma 4 26B-A4B: experts beside the FFN, fewer key/value heads in full attention, values that are the keys.
GEMMA4_A = {
    **GEMMA4_12B,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
}
LFM2 = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
MINIMAX_M3 = {**DENSE_FIRST, "layer_types": ["full_attention", "minimax_m3_sparse"]}
INKLING2 = {
    "num_hidden_layers": 4,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "n_layers_per_attn_res_block": 2,
}
LOOP = {
    **INKLING2,
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "loop_num_passes": 2,
    "loop_gate_rank": 8,
}
GEMMA3N = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "intermediate_size": [96] * 6,
    "activation_sparsity_pattern": [0.5] + [0.0] * 5,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "latent_channels": 32, "embed_dim": 8, "num_res_blocks": 1}
DOTS3 = {
    "per_layer_config": {
        2: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 8}
    }
}
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
VISION_DEEPSTACK = {"vision_config": {"deepstack_visual_indexes": [0, 1]}}

CHANGES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "text_config": {"vocab_size": 320, "output_vocab_size": ...},
        "audio_config": {"hidden_size": 32, "codebook_dim": 32, "codebook_size": 16, "num_filters": 4},
        "vision_config": {**VQ, "codebook_size": 16, "attn_resolutions": []},
        "image_token_offset": 270,
        "audio_token_offset": 286,
    },
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "hidden_size_global": 64,
        },
        "global_config": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
    },
    "chameleon": {"vocabulary_map": {"<image>": 300, "IMGIMGA": 301}, "image_token_id": 300, "vq_config": VQ},
    "codegen": {"rotary_dim": 8},
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "moe_top_k": 2},
    },
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse"]}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dory": {
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": DOTS3,
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 64},
    },
    "dots3_note_text": DOTS3,
    "emu3": {
        "vocabulary_map": {"<image>": 300, "<|extra_200|>": 301, "<|visual token 000000|>": 302},
        "image_token_id": 300,
        "vq_config": {**VQ, "codebook_size": 16, "attn_resolutions": [1], "hidden_size": 16},
    },
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [32, 24], **sections(3, 3, 2)}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "flint": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention"] + ["full_attention"],
        "mlp_only_layers": [0],
    },
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": GEMMA4_A},
    "gemma4_text": GEMMA4_E,
    "gemma4_unified": {"text_config": GEMMA4_12B},
    "gemma4_unified_text": GEMMA4_12B,
    "glm46v": {"text_config": sections(2, 3, 3)},
    "glm4v": {"text_config": sections(2, 3, 3)},
    "glm4v_moe": {"text_config": sections(1, 1, 2, partial_rotary_factor=0.5)},
    "glm5_next": {
        "text_config": {"index_kpool": 4},
        "projection_intermediate_size": 48,
        "vision_config": {"projection_intermediate_size": 48},
    },
    "glm_ocr": {"text_config": sections(2, 3, 3)},
    "glmga": {"text_config": sections(2, 3, 3)},
    "gptj": {"rotary_dim": 8},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0], [-2, 1]],
        "spatial_target_layers": [0, 1],
        "vision_config": {"hidden_size": 64},
        "qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64},
    },
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": ...},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"text_config": {"head_dim": 16, **sections(2, 3, 3)}, "vision_config": {"max_image_size": 64}},
    "hy_v4_vl": {
        "text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}},
        "vision_config": {"max_image_size": 64},
    },
    "inkling2": {"text_config": INKLING2},
    "inkling2_loop": {"text_config": LOOP},
    "inkling2_loop_text": LOOP,
    "inkling2_text": INKLING2,
    "inkling_mm_model": {"text_config": DENSE_FIRST},
    "inkling_text": DENSE_FIRST,
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "janus": {
        "vision_config": {"projection_dim": 64, "num_image_tokens": 16},
        "vq_config": {**VQ, "num_embeddings": 16, "num_patches": 4, "projection_dim": 64, "image_token_embed_dim": 64},
    },
    "laguna": {"layer_types": ["full_attention", "sliding_attention"]},
    "lfm2": LFM2,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_vl": {"text_config": LFM2},
    "llama4": {"vision_config": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}},
    "mamba2": {"num_heads": 8},
    "mellum": {**DENSE_FIRST, "layer_types": ["sliding_attention", "full_attention"]},
    "minimax_m3_vl": {"text_config": MINIMAX_M3},
    "minimax_m3_vl_text": MINIMAX_M3,
    "ministral": {"head_dim": 16},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_glimmer": {"out_hidden_size": 64, "projector_hidden_size": 48},
    "muse_spark": {
        "out_hidden_size": 64,
        "projector_hidden_size": 48,
        "audio_config": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "out_hidden_size": 64},
    },
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"projector_hidden_size": 48, "vision_hidden_size": 32, "vision_config": {"max_img_size": 32}},
    "paddleocr_vl": {"text_config": sections(2, 3, 3)},
    "qwen2_5_omni_thinker": {"text_config": sections(2, 3, 3)},
    "qwen2_5_vl": {"text_config": sections(2, 3, 3), "vision_config": {"fullatt_block_indexes": [1]}},
    "qwen2_vl": {"text_config": sections(2, 3, 3)},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "rwkv": {"attention_hidden_size": 64},
    "step3p7": {
        "text_config": {
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        }
    },
    "xlnet": {"d_head": 16, "d_inner": 96},
    "xlstm": {"embedding_dim": 64, "num_blocks": 2, "num_hidden_layers": 2, "ffn_round_up_to_multiple_of": 16},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 16,
        "adapter_rank": 8,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [2, 5],
    },
    "zaya": {"num_experts_per_tok": 1},
}
