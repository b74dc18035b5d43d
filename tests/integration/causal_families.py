"""Every causal language model of transformers, built tiny: the sizes that each of their configs needs.

A family that stands in none of these tables is built with `SIZES` alone.
"""

import inspect
from typing import Any

import conftest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

D, LAYERS, VOCAB = conftest.HIDDEN, 2, conftest.VOCAB

NOT_BUILT = {
    "gemma3n": "its image tower needs `timm`; `gemma3n_text` is tried",
    "gemma4_assistant": "it drafts for another model, whose keys and values it reads, and does not run alone",
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values it reads, and does not run alone",
    "musicgen": "`AutoModelForCausalLM` cannot build it: it takes the config of its decoder, which writes audio codes",
    "musicgen_melody": "as `musicgen`",
}
"""Families that cannot be built tiny, or do not run by themselves, and why."""

SIZES: dict[str, Any] = dict(
    conftest.SIZES,
    num_hidden_layers=LAYERS,
    d_model=D,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    n_positions=64,
    sliding_window=4,  # less than the prompts, so that caches forget
    is_decoder=True,
    # Linear attention
    linear_head_dim=8,
    linear_num_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    # Experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    # Decoders that have an encoder elsewhere
    decoder_layers=LAYERS,
    decoder_attention_heads=4,
    decoder_ffn_dim=48,
    encoder_layers=LAYERS,
    encoder_attention_heads=4,
    encoder_ffn_dim=48,
    ffn_dim=48,
)
LATENT = dict(
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
    head_dim=4,
    num_key_value_heads=4,
)
"""For latent attention, such as DeepSeek's."""

VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2
)
PART = dict(
    conftest.DIMENSIONS,
    num_hidden_layers=LAYERS,
    vocab_size=VOCAB,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=4, mamba_expand=2)
LINEAR = dict(layer_types=["linear_attention", "full_attention"])
SLIDING = dict(layer_types=["sliding_attention", "full_attention"])
CONVOLUTION = dict(layer_types=["conv", "full_attention"])

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": LINEAR,
    "bamba": dict(MAMBA2, attn_layer_indices=[1]),
    "blt": dict(
        encoder_hash_byte_group_vocab=16,
        **{f"{part}_config": dict(PART) for part in ("patcher", "encoder", "decoder", "global")},
    ),
    "codegen": dict(rotary_dim=4),
    "cohere_compass_text": dict(
        rope_parameters={"full_attention": dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])}
    ),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0), ffn_config=dict(ffn_hidden_size=16)),
    "dots1": dict(n_shared_experts=1),
    "dots3_note": dict(vision_config=dict(adapter_out_dim=D), audio_config=dict(adapter_out_dim=D)),
    "dots3_note_text": dict(qk_rope_head_dim=4, head_dim=16, layer_types=["indexed_attention"] * 2, index_topk=64),
    "falcon_h1": dict(MAMBA2, mamba_d_ssm=64),
    "fuyu": dict(text_config=dict(PART, model_type="persimmon")),
    "gemma3": dict(vision_config=VISION, mm_tokens_per_image=4),
    "gemma3n_text": dict(
        SLIDING,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "gemma4_text": dict(SLIDING, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB),
    "gemma4_unified": dict(vision_config=dict(mm_embed_dim=8)),
    "gemma4_unified_text": SLIDING,
    "got_ocr2": dict(
        text_config=dict(PART, model_type="qwen2"),
        vision_config=dict(VISION, window_size=2, output_channels=8, global_attn_indexes=[1], mlp_dim=16),
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=4),
    "gptj": dict(rotary_dim=4),
    "granitemoehybrid": dict(MAMBA2, layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2),
    "kimi_linear": LINEAR,
    "lfm2_moe": CONVOLUTION,
    "lfm3": CONVOLUTION,
    "longcat_flash": dict(
        num_layers=LAYERS, ffn_hidden_size=48, expert_ffn_hidden_size=16, moe_topk=2, zero_expert_num=2
    ),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=4),
    "minimax": dict(LINEAR, sliding_window=None),
    "moshi": dict(audio_vocab_size=VOCAB, sliding_window=64),  # its own cache is wrong beyond the window
    "moss_transcribe_diarize": dict(
        text_config=dict(PART, head_dim=8, model_type="qwen3"),
        audio_config=dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16),
    ),
    "nemotron_h": dict(mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=4),
    "prophetnet": dict(num_encoder_layers=LAYERS, num_decoder_layers=LAYERS, num_decoder_attention_heads=4),
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp_text": dict(
        layer_types=["linear_attention", "indexed_attention"],
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=64,
        indexer_compress_ratio=2,
    ),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "reformer": dict(attn_layers=["local", "lsh"], axial_pos_embds=False, attention_head_size=8, feed_forward_size=48),
    "roc_bert": dict(pronunciation_vocab_size=16, shape_vocab_size=16, pronunciation_embed_dim=8, shape_embed_dim=8),
    "rwkv": dict(attention_hidden_size=D),
    "xlnet": dict(n_layer=LAYERS, n_head=4, d_inner=48, attn_type="uni"),
    "xlstm": dict(hidden_size=128, num_heads=4, chunk_size=4),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "hybrid"], n_mamba_heads=2),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"], n_mamba_heads=8, chunk_size=4, mamba_d_state=8),
    "zaya": dict(num_experts_per_tok=1),
}

NAMES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_BUILT))


def build(name: str) -> PreTrainedModel:
    """Build a tiny random model of that family, in float32."""
    config_class = CONFIG_MAPPING[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**_sizes(config_class))).float().eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def _sizes(config: type[PretrainedConfig]) -> dict[str, Any]:
    """Return the sizes that a config of that class, or of its parts, has fields for."""
    special = SPECIAL.get(config.model_type, {})
    fields = set(inspect.signature(config).parameters) | set(config.attribute_map)
    sizes = _known(SIZES | (LATENT if "kv_lora_rank" in fields else {}), config, fields)
    for name, part in config.sub_configs.items():
        if name not in special and hasattr(part, "attribute_map"):  # not `AutoConfig`
            is_text = "text" in name or "decoder" in name
            sizes[name] = _sizes(part) if is_text else _known(VISION, part, set(inspect.signature(part).parameters))
    return {**sizes, **special}


def _known(sizes: dict[str, Any], config: type[PretrainedConfig], fields: set[str]) -> dict[str, Any]:
    read_only = {name for name in sizes if isinstance(own := getattr(config, name, None), property) and not own.fset}
    return {name: size for name, size in sizes.items() if name in (fields | set(config.attribute_map)) - read_only}
