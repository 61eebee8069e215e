"""Tiny configurations of the same structure as a family's default one.

Sizes are set by the names of the fields; whatever chooses between forms of a layer (activations,
scoring functions, groups, shared experts, kinds of layers) keeps its value.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.families.discover import EXPERT_FIELDS, Family, field_names, model_class, transformers
from moec.families.settings import SETTINGS

VOCABULARY = 128
# Fields by what they hold -> their tiny value.
_SIZES: dict[int, tuple[str, ...]] = {
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"),
    512: ("max_position_embeddings", "max_seq_len"),
    96: (
        "intermediate_size",
        "d_ff",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "intermediate_size_mlp",
    ),
    64: (
        *("hidden_size", "d_model", "out_hidden_size", "text_hidden_size", "projector_hidden_size"),
        *("dense_intermediate_size", "prefix_dense_intermediate_size", "ffn_hidden_size"),
        *("output_proj_dims", "vision_hidden_size", "num_position_embeddings"),
        *("position_embedding_size", "projection_intermediate_size", "projection_hidden_size"),
    ),
    48: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim"),
        *("shared_intermediate_size", "moe_shared_expert_intermediate_size"),
        *("shared_experts_intermediate_size",),
    ),
    32: ("image_size", "expert_ffn_hidden_size", "moe_hidden_size", "ple_embed_dim", "rel_extent"),
    24: ("q_lora_rank", "swa_q_lora_rank"),
    16: (
        *("head_dim", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "sliding_window"),
        *("index_topk", "index_head_dim", "linear_key_head_dim", "linear_value_head_dim"),
        *("linear_head_dim", "mamba_d_head", "mamba_d_state", "mamba_chunk_size", "d_kv"),
        *("mamba_head_dim", "ssm_state_size", "chunk_size", "swa_head_dim", "sliding_window_size"),
        *("attention_chunk_size", "block_size", "keep_window_size", "part_features"),
        *("num_mel_bins", "o_lora_rank", "router_hidden_size", "swa_kv_lora_rank"),
        *("swa_qk_nope_head_dim", "swa_v_head_dim", "kv_channels"),
        *("indexer_head_dim", "indexer_budget", "num_patches"),
    ),
    8: (
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        *("qk_rope_head_dim", "swa_qk_rope_head_dim", "mamba_n_heads", "mamba_num_heads"),
        *("hidden_size_per_layer_input", "downsample_hidden_size", "gated_norm_rank", "hc_lowrank"),
        *("subsampling_conv_channels", "rotary_dim", "canvas_length", "expert_capacity"),
    ),
    4: (
        *(
            "num_attention_heads",
            "num_heads",
            "n_heads",
            "linear_num_heads",
            "linear_num_value_heads",
        ),
        *("linear_conv_kernel_dim", "encoder_attention_heads", "decoder_attention_heads"),
        *(
            "swa_num_attention_heads",
            "num_sliding_attention_heads",
            "index_block_size",
            "index_kpool",
        ),
        *("mamba_dt_rank", "zero_expert_num", "d_rel", "indexer_compress_ratio", "pos_emb_height"),
        *("pos_emb_width", "hc_sinkhorn_iters"),
    ),
    2: (
        *("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers"),
        *("decoder_layers", "num_decoder_layers", "num_experts_per_tok", "moe_topk", "moe_k"),
        *("top_k_experts", "moe_top_k", "index_n_heads", "linear_num_key_heads", "mamba_expand"),
        *("o_groups", "index_topk_blocks", "hc_mult", "hc_count", "heads_per_ngram"),
        *("encoder_sparse_step", "decoder_sparse_step", "indexer_n_heads", "split_ngram_parts"),
        *("n_layers_per_attn_res_block", "n_groups"),
    ),
    1: (
        *("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "mamba_n_groups"),
        *("num_sparse_encoder_layers", "num_sparse_decoder_layers", "indexer_kv_heads"),
        "bos_token_id",
    ),
    0: (
        *("pad_token_id", "num_mtp_layers", "num_nextn_predict_layers", "decoder_start_token_id"),
        *(
            "router_jitter_noise",
            "dropout",
            "attention_dropout",
            "dropout_rate",
            "moe_token_dropout",
        ),
        *("encoder_layerdrop", "decoder_layerdrop"),
    ),
}
_TINY = {name: value for value, names in _SIZES.items() for name in names}
# Sizes that a configuration without a default still needs.
_NEEDED = EXPERT_FIELDS | {
    "num_experts_per_tok",
    "moe_topk",
    "top_k_experts",
    "moe_intermediate_size",
}
# Fields that count layers at the start without experts: one is enough.
_DENSE_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


def tiny_config(family: Family) -> Any:
    """A tiny configuration of a family, around its backbone if it takes any."""
    given = SETTINGS.get(family.name, {})
    inner = {}
    if family.backbone:
        backbone = transformers().CONFIG_MAPPING[family.backbone]
        inner["text_config"] = shrunk(backbone, SETTINGS.get(family.backbone, {}))
    return shrunk(family.config, {**inner, **given})


def shrunk(config: type, given: Mapping[str, Any]) -> Any:
    """A configuration of a class with small sizes; ``given`` settings win.

    A mapping in ``given`` under the name of an inner configuration has settings for that one.
    """
    base = transformers().PreTrainedConfig
    default = config() if _has_default(config) else None
    inner = {
        name: shrunk(type(value), given.get(name, {}))
        for name, value in (vars(default).items() if default is not None else ())
        if isinstance(value, base) and not isinstance(given.get(name), base)
    }
    for name, found in getattr(config, "sub_configs", {}).items():
        if default is None and found is not transformers().AutoConfig:
            inner.setdefault(name, shrunk(found, given.get(name, {})))
    own = {k: v for k, v in given.items() if k not in inner}
    settings = {**_sizes(config, default), **_tokens(config), **own, **inner}
    return config(**{k: v for k, v in settings.items() if v is not ...})


def _has_default(config: type) -> bool:
    try:
        config()
    except Exception:  # some families have no default; a config.json is their only source
        return False
    return True


def _sizes(config: type, default: Any) -> dict[str, Any]:
    """Tiny values for the fields of a class that its default uses."""
    names = field_names(config)
    own = vars(default) if default is not None else {}
    sizes = {
        n: type(own[n])(min(v, own[n]))
        for n, v in _TINY.items()
        if n in names and _is_size(own.get(n))
    }
    sizes.update({n: _TINY[n] for n in names & _NEEDED if n in own and own[n] is None})
    if "qk_rope_head_dim" in names:
        sizes.pop("head_dim", None)  # follows from its two parts
    sizes.update(_heads(names, own), **_groups(names, own), **_layers(names, own))
    return sizes


def _is_size(value: Any) -> bool:
    """Whether a size is given: an absent one means another form, or that it follows from others."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _heads(names: frozenset[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of queries stay groups: two heads of keys for four, or as many as there are."""
    found = {}
    for heads, keys in (
        ("num_attention_heads", "num_key_value_heads"),
        ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ):
        few = own.get(keys)
        if keys in names and few is not None:
            found[keys] = 4 if own.get(heads) == few else min(2, few)
    return found


def _groups(names: frozenset[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of experts stay groups; one group stays one."""
    grouped = "n_group" in names and (own.get("n_group") or 1) > 1
    return {"n_group": 4, "topk_group": 2} if grouped else {}


def _layers(names: frozenset[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of every kind: of those without experts, and of those that lists name."""
    total = own.get("num_hidden_layers")
    dense = {n: 1 for n in _DENSE_LAYERS if n in names and (own.get(n) or 0) > 0}
    lists = {n: v for n, v in own.items() if n in names and _is_list_of(v, total)}
    kept = _one_of_each(list(lists.values()))
    if not kept:
        return {**dense, **({"num_hidden_layers": 3} if dense and _is_size(total) else {})}
    found = {n: [v[i] for i in kept] for n, v in lists.items()}
    return {**dense, **found, "num_hidden_layers": len(kept)}


def _is_list_of(value: Any, count: Any) -> bool:
    """Whether a list says something of each layer; numbers of layers, all different, do not."""
    kinds = {repr(member) for member in value} if isinstance(value, list | tuple) else set()
    return isinstance(value, list | tuple) and len(value) == count and len(kinds) < max(count, 3)


def _one_of_each(lists: list[Sequence[Any]]) -> list[int]:
    """The first places where every member of every list has been seen; at least two."""
    seen: set[tuple[int, str]] = set()
    kept = []
    for place, members in enumerate(zip(*lists, strict=True)):
        new = {(which, repr(member)) for which, member in enumerate(members)} - seen
        if new:
            kept.append(place)
            seen |= new
    return [0, 1] if len(kept) == 1 and len(lists[0]) > 1 else kept


def _tokens(config: type) -> dict[str, Any]:
    """Identifiers of special tokens, distinct and below the size of the vocabulary."""
    names = sorted(n for n in field_names(config) if n.endswith(("_token_id", "_token_index")))
    taken = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    special = [n for n in names if n not in taken]
    tokens = {n: VOCABULARY - 1 - i for i, n in enumerate(special)}
    return {**tokens, **({"eos_token_id": 2} if "eos_token_id" in names else {})}


def build(family: Family, config: Any = None) -> Any:
    """The family's model with a head, from its tiny configuration."""
    config = tiny_config(family) if config is None else config
    found = model_class(type(config)) or _by_name(family)
    return found(config).eval()


def _by_name(family: Family) -> Any:
    """A model class of a family that no auto class knows, by its ``config_class``."""
    module = importlib.import_module(
        family.config.__module__.replace("configuration_", "modeling_")
    )
    named = [m for m in vars(module).values() if getattr(m, "config_class", None) is family.config]
    return [m for m in named if m.forward is not torch.nn.Module.forward][-1]
