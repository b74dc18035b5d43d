"""Tiny random models, built from configs: no network, deterministic, in eval mode."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from transformers import PreTrainedModel

VOCAB, HIDDEN, LAYERS = 64, 32, 3
_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GQA = dict(_SIZES, num_key_value_heads=2)

CAUSAL = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GQA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GQA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(_GQA, head_dim=8)),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GQA),
    # A sliding window shorter than the prompts, so that its caches forget.
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(_GQA, head_dim=8, sliding_window=8)),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
        ),
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES),
    "opt": ("OPTForCausalLM", "OPTConfig", dict(_SIZES, ffn_dim=48, word_embed_proj_dim=HIDDEN)),
    "phi": ("PhiForCausalLM", "PhiConfig", _SIZES),
}
SEQ_CLS = {
    "bert": ("BertForSequenceClassification", "BertConfig", dict(_SIZES, num_labels=3)),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", dict(_SIZES, num_labels=3)),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of that family."""
    model_name, config_name, sizes = {**CAUSAL, **SEQ_CLS}[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**sizes)
    model = getattr(transformers, model_name)(config).eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None  # every test chooses how many tokens it wants
    return model


def randomise(model: torch.nn.Module, scale: float = 0.5, seed: int = 1) -> None:
    """Give every adapter weight a random value, so that edits are large enough to see."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loreft_weights" in name and not name.endswith(".R"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
