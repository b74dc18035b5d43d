"""Every family of models, one body: inject, train, save, load, disable, generate, unload."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from conftest import randomise
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_reft import LoreftConfig

R, D, LAYERS, VOCAB, NEW = 4, 32, 2, 64, 4
IMAGE = 60  # the token that stands for a piece of an image
SPEC = "f2+l2"

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=D,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GQA = dict(num_key_value_heads=2)
HEAD = dict(GQA, head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=4, mamba_expand=2)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
LLAVA = dict(
    text_config=dict(SIZES, **GQA, model_type="llama"),
    vision_config=dict(VISION, model_type="clip_vision_model", image_size=4, patch_size=2),
    image_token_id=IMAGE,
)
QWEN_VL = dict(
    text_config=dict(SIZES, **GQA, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2])),
    vision_config=dict(depth=3, patch_size=2, spatial_merge_size=1, temporal_patch_size=1),
    image_token_id=IMAGE,
)


@dataclass(frozen=True)
class Family:
    name: str
    """Of its classes: `<name>ForCausalLM` and `<name>Config`, unless given below."""
    sizes: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    config: str = ""
    task: str = "CAUSAL_LM"
    without: tuple[str, ...] = ()
    """Components that its blocks do not have by a known name."""
    left_pads: bool = True
    """Whether the base model answers a left-padded prompt as it does the prompt alone."""

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        head = {"SEQ_CLS": "ForSequenceClassification", "FEATURE_EXTRACTION": "Model"}.get(self.task, "ForCausalLM")
        config = getattr(transformers, self.config or f"{self.name}Config")(**self.sizes)
        model = getattr(transformers, self.model or f"{self.name}{head}")(config).eval()
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.pad_token_id = 0
            model.generation_config.eos_token_id = None
        return model


def text(name, model="", config="", left_pads=True, without=(), **sizes):
    return Family(name, {**SIZES, **sizes}, model, config, left_pads=left_pads, without=without)


FAMILIES = [
    text("Llama", **GQA),
    text("Llama4", config="Llama4TextConfig", **HEAD, intermediate_size_mlp=48, num_local_experts=2),
    text("Qwen2", **GQA),
    text("Qwen2Moe", **GQA, **EXPERTS, shared_expert_intermediate_size=16),
    text("Qwen3", **HEAD),
    text("Qwen3Moe", **HEAD, **EXPERTS),
    text("Mistral", **GQA),
    text("Mixtral", **GQA, num_local_experts=4),
    text("Gemma2", **HEAD),
    text("Gemma3", config="Gemma3TextConfig", **HEAD),
    text("Phi3", **GQA),
    text("Olmo2", **GQA),
    text("GPT2", model="GPT2LMHeadModel"),
    text("GPTNeoX"),
    text("OPT", ffn_dim=48, word_embed_proj_dim=D),
    text("Falcon"),
    text("Bloom"),
    text("Mpt"),
    text("GPTJ", rotary_dim=4),
    text("Starcoder2", **GQA),
    text("Granite", **GQA),
    text("SmolLM3", **GQA),
    text("DeepseekV3", n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
         moe_intermediate_size=16, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8),
    text("Jamba", **GQA, attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False),
    text("FalconH1", **HEAD, **MAMBA2),
    text("Bamba", **GQA, **MAMBA2, attn_layer_indices=[1]),
    text("Mamba"),
    Family("Llava", LLAVA, model="LlavaForConditionalGeneration"),
    Family("Qwen2_5_VL", QWEN_VL, model="Qwen2_5_VLForConditionalGeneration"),
    Family("Bert", SIZES, task="SEQ_CLS"),
    Family("Roberta", SIZES, task="SEQ_CLS"),
    Family("DebertaV2", SIZES, task="SEQ_CLS"),
    Family("ModernBert", SIZES, task="SEQ_CLS"),
    Family("DistilBert", SIZES, task="SEQ_CLS"),
    Family("T5", dict(SIZES, d_ff=48, d_kv=8), model="T5ForConditionalGeneration", task="SEQ_2_SEQ_LM"),
    Family("Bart", SIZES, model="BartForConditionalGeneration", task="SEQ_2_SEQ_LM"),
]
