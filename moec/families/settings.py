"""Settings of tiny models that no general rule gives: what belongs together in one family.

``...`` leaves a field to its default.
"""

from __future__ import annotations

from typing import Any

_SPARSE = ["dense", "sparse"]
_DSA = {"num_key_value_heads": 4, "qk_rope_head_dim": 0}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **more}}


SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2": {"text_config": {"num_key_value_heads": 4, "mlp_layer_types": _SPARSE}},
    "deepseek_v4": {"index_topk": 4, "swiglu_limit": 0.5},
    "dots1": {"norm_topk_prob": True, "n_shared_experts": 1, "n_group": 4, "topk_group": 2},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [48, 32],
            "mlp_layer_types": _SPARSE,
            **_rope(mrope_section=[3, 3, 2]),
        },
        "vision_config": {"patch_size": 4},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {
        "text_config": _rope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
        "vision_config": {"patch_size": 4},
    },
    "glm5_next": {"text_config": {**_DSA, "swiglu_limit": 0.5}},
    "gpt_oss": {"swiglu_limit": 0.5},
    "granitemoehybrid": {"layer_types": ["mamba", "full_attention"]},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 8, "moe_topk": 2},
    "jamba": {
        "num_hidden_layers": 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "llama4": {"moe_layers": [0, 1]},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8, "moe_topk": 3},
    "muse_spark": {
        "audio_config": {
            "num_hidden_layers": 2,
            "patch_sizes": (4, 4),
            "hidden_sizes": (16, 32),
            "depths": (1, 1),
        },
        "vision_config": {"patch_size": 8},
    },
    "nemotron3_5_transcribe": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64}}}
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2, "patch_size": 8}},
    "qwen3_omni_moe": {"vision_start_token_id": 120},
    "qwen3_vl_moe": {"text_config": _rope(mrope_section=[2, 3, 3])},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "step3p7": {"text_config": {"sliding_window": 16, "mlp_layer_types": _SPARSE}},
    "vitpose_backbone": {
        "image_size": [32, 24],
        "patch_size": [8, 8],
        "num_experts": 3,
        "part_features": 16,
    },
}
